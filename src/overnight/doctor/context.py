"""What the checks of a recipe need."""

from __future__ import annotations

import dataclasses
import shlex
from functools import cached_property
from pathlib import Path

from overnight.conversion.open_model import open_model
from overnight.data.text_files import find_files, is_remote
from overnight.distributed.world import open_world
from overnight.doctor import DoctorConfig
from overnight.doctor.tiny_run import TinyRun, prepare_made_up_text, prepare_piece, shrink
from overnight.planning import PlanConfig
from overnight.planning.command import estimate_plan
from overnight.planning.estimate import find_prepared, find_token_counts, model_config_of
from overnight.planning.plan import Plan
from overnight.preparation.prepare import ensure_prepared
from overnight.preparation.prepare_commands import find_listed_commands, find_recipe_text
from overnight.preparation.sources import source_name
from overnight.recipe import plain_recipe
from overnight.run.setup import RunSetup
from overnight.run_directory import cache_folder
from overnight.training.schedule import Schedule

UNKNOWN_CHARACTERS = 322  # assumed vocabulary while a text's own characters are not counted yet
SMALL_BYTES = 20_000_000  # text up to this size is prepared in seconds


class DoctorContext:
    """The recipe, its text, its plan and its tiny run, each built once, on first use.

    Raises ValueError as `overnight train` would.
    """

    def __init__(self, config: DoctorConfig, name: str, scratch: Path) -> None:
        self.config, self.name, self.scratch = config, name, scratch
        self.recipe = plain_recipe(config)
        self.is_pretraining = self.recipe.init_from is None
        self.world = open_world(self.recipe.compute.device)
        self.baseline = None if config.baseline is None else open_model(config.baseline)
        if self.baseline is not None and not (self.baseline.origin / "config.json").is_file():
            raise ValueError(f"baseline={config.baseline} is not a Hugging Face folder or name")
        self.folders: list[Path] = []
        """Folders of the recipe's shards on this machine."""
        self.missing: list[str] = []
        """The reason why a text has no shards, and the remedy; one sentence for each such text."""
        data = self.recipe.data
        for path in [each.path for each in data.mixture] or [data.data]:
            self._find_shards(path)
        guessed = UNKNOWN_CHARACTERS if data.tokenizer == "characters" else None
        self.text = find_token_counts(data, self.recipe.model.vocab_size or guessed)
        self.sizes = model_config_of(self.recipe, self.text.vocab_size)

    def _find_shards(self, path: str) -> None:
        """Add a text to `folders` or `missing`; prepares it if that takes seconds."""
        data = self.recipe.data
        if "://" in path:
            self.missing.append(f"{path} is remote: each shard is verified when it is read")
        elif prepared := find_prepared(path, data.tokenizer):
            self.folders.append(prepared)
        else:
            folder, command = find_recipe_text(path, data)
            if is_small_and_local(path):
                ensure_prepared(dataclasses.replace(data, data=path, mixture=(), shuffle_window=None))
                self.folders.append(Path(folder))
                return
            command = find_listed_commands(self.name).get(folder, command)
            if not command:
                source_name(path)  # raises ValueError if the source does not exist
                command = ("overnight", "prepare", path)
            self.missing.append(f"{folder} is not prepared yet: {shlex.join(command)}")

    @cached_property
    def tiny_run(self) -> TinyRun:
        """The small version of the recipe, on a part of its text or, if that can't be read, made-up text."""
        if self.folders:
            try:
                piece = prepare_piece(self.folders[0], self.scratch / "piece")
                tiny = shrink(self.recipe, self.sizes, piece, self.world)
                tiny.build()
                return tiny
            except (ValueError, OSError):  # the checks of the text report what is wrong with it
                pass
        made_up = prepare_made_up_text(self.scratch / "made-up")
        return shrink(self.recipe, self.sizes, made_up, self.world, "a made-up text")

    def build(self, **compute: object) -> RunSetup:
        """A new tiny run with these fields of ComputeConfig changed."""
        return self.tiny_run.build(**compute)

    @cached_property
    def plan(self) -> Plan:
        """The plan of the whole run."""
        return estimate_plan(PlanConfig(**vars(self.recipe)), self.name, self.text)

    @property
    def schedule(self) -> Schedule:
        """The learning rate of the whole run."""
        resolved = self.plan.resolved
        recipe = resolved.recipe
        peak = recipe.optimizer.peak_learning_rate
        return Schedule(recipe.schedule, peak, resolved.plan, resolved.total_steps)


def is_small_and_local(path: str) -> bool:
    """True for text that `overnight prepare` can prepare within seconds and without a network."""
    if path == "python-docs":
        return True
    if path == "shakespeare":
        return (cache_folder() / "shakespeare" / "input.txt").is_file()
    if is_remote(path) or not Path(path).exists():
        return False
    return sum(file.bytes for file in find_files(path)) <= SMALL_BYTES
