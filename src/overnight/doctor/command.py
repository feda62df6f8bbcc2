"""The command `overnight doctor`: a recipe checked before the night, through the functions that train it."""

from __future__ import annotations

import dataclasses
import json
import random
import shlex
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from overnight.config import raise_problems
from overnight.conversion.open_model import OpenedModel, open_model
from overnight.data import DataConfig
from overnight.data.shards import Manifest, read_manifest
from overnight.data.text_files import find_files, is_remote
from overnight.distributed.world import SINGLE_PROCESS, World, open_world
from overnight.doctor import CHECKS, DoctorConfig, data_checks, generation_checks, model_checks, tiny_run
from overnight.doctor import run_checks as run_checks_module
from overnight.doctor.check import (
    COLUMNS,
    Check,
    CheckResult,
    SetUp,
    checks_to_json,
    describe_checks,
    run_check,
    skipped,
    summarize_checks,
)
from overnight.doctor.tiny_run import TinyRun
from overnight.hardware import native_precision
from overnight.model.model_config import ModelConfig
from overnight.planning import command as planning_command
from overnight.planning.command import ResourceEstimate
from overnight.planning.estimate import TokenCounts, find_prepared, find_token_counts, model_config_of
from overnight.preparation.prepare import ensure_prepared
from overnight.preparation.prepare_commands import find_recipe_text, find_told_commands
from overnight.preparation.sources import source_name
from overnight.recipe import Recipe, load_recipe
from overnight.recipe_options import changed_options
from overnight.run_directory import cache_folder
from overnight.terminal import duration, echo, quiet
from overnight.training.compute import can_compile
from overnight.training.schedule import Schedule

DEPENDS_ON = dict.fromkeys(("accumulation", "overfit", "checkpoint", "processes"), "gradients")
"""What can't be told before another check has passed: without its gradients no step can be taken."""


def run(config: DoctorConfig, name: str) -> int:
    """Check the recipe `name`, changed as `config` has it; returns 0 if all is well, 1 if a check failed.

    Writes nothing but what `overnight train` would prepare first. Raises ValueError for what could not be
    trained at all.
    """
    raise_problems(config.problems(), f"recipe {config.run_name}")
    started_at = time.perf_counter()
    done: dict[str, Check] = {}
    with tempfile.TemporaryDirectory(prefix="overnight-doctor-") as scratch, _left_as_found():
        examination: DoctorContext = open_doctor_context(config, name, Path(scratch))
        if not config.json:
            echo("\n".join(examination.describe()))
        for check in run_checks(examination.checks(), config.only or CHECKS):
            done[check.name] = check
            if not config.json:
                echo("\n".join(describe_checks(check)))
    seconds = time.perf_counter() - started_at
    if config.json:
        sys.stdout.write(json.dumps(checks_to_json(name, done.values(), seconds), indent=2) + "\n")
    failed = [check.name for check in done.values() if check.finding.passed is False]
    echo(summarize_checks(done.values(), seconds))
    words = shlex.join([name, *changed_words(config, name)])
    echo(
        f"mend {' and '.join(failed)}, then: overnight doctor {words}"
        if failed
        else f"next: overnight train {words}"
    )
    return 1 if failed else 0


def run_checks(checks: Mapping[str, Callable[[], CheckResult]], names: tuple[str, ...]) -> Iterator[Check]:
    """Do the checks of these names, in their own order, one by one."""
    failed: set[str] = set()
    for name in CHECKS:
        if name not in names:
            continue
        if DEPENDS_ON.get(name) in failed:
            yield Check(name, skipped(f"it can't be told before {DEPENDS_ON[name]} is mended"), 0.0)
            continue
        with quiet(True):
            check = run_check(name, checks[name])
        if check.finding.passed is False:
            failed.add(name)
        yield check


def changed_words(config: DoctorConfig, name: str) -> list[str]:
    """The options by which the recipe was changed, for the next command."""
    recipe = Recipe(**{field.name: getattr(config, field.name) for field in dataclasses.fields(Recipe)})
    return changed_options(recipe, load_recipe(name))


@contextmanager
def _left_as_found() -> Iterator[None]:
    """Afterwards Python's and torch's noise, torch's threads and its precision are what they were."""
    threads, products = torch.get_num_threads(), torch.get_float32_matmul_precision()
    noise = random.getstate()  # torch's launcher draws from it
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(noise)
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(products)


# ---------------------------------------------------------------- what `overnight doctor` has before it


SOME_CHARACTERS = 322  # tiny shakespeare's vocabulary, where the text's own can't be known yet
OfText = Callable[[Path, Manifest], CheckResult]


@dataclass(frozen=True)
class DoctorContext:
    """Everything that is looked at; what takes time to make is made once, when it is first wanted."""

    config: DoctorConfig
    name: str
    recipe: Recipe
    scratch: Path
    world: World
    texts: list[LocalDataset]
    text: TokenCounts
    sizes: ModelConfig
    reference: OpenedModel | None

    def checks(self) -> dict[str, Callable[[], CheckResult]]:
        """What is to be done, by name."""
        full = self.config.full
        return {
            "shards": self._shards,
            "tokenizer": lambda: self._of_texts(data_checks.check_tokenizer),
            "boundaries": lambda: self._of_texts(
                lambda at, manifest: data_checks.check_boundaries(at, manifest, full=full)
            ),
            "disjoint": lambda: self._of_texts(
                lambda at, manifest: data_checks.check_disjoint(at, manifest, full=full)
            ),
            "contamination": self._contamination,
            "initial-loss": lambda: model_checks.check_initial_loss(self._build()),
            "gradients": lambda: model_checks.check_gradients(self._build()),
            "causality": lambda: generation_checks.check_causality(self._build()),
            "rows": self._rows,
            "accumulation": lambda: model_checks.check_accumulation(self._build),
            "overfit": lambda: model_checks.check_overfit(self._build()),
            "generation": lambda: generation_checks.check_generation(self._build()),
            "checkpoint": lambda: model_checks.check_saving(self._build, self.scratch / "checkpoints"),
            "precision": self._precision,
            "compiled": self._compiled,
            "processes": self._processes,
            "reference": self._reference,
            "schedule": self._schedule,
            "learning-rate": lambda: run_checks_module.check_peak(
                self.recipe.optimizer.peak_learning_rate, self.sizes.n_embd, begins_anew=self._begins_anew
            ),
            "memory": lambda: run_checks_module.check_memory(
                self.foresight.needed_bytes, self.foresight.usable_bytes, self.foresight.device_name
            ),
            "disk": lambda: run_checks_module.check_disk(
                self.foresight.disk_bytes, self.foresight.free_bytes
            ),
            "time": self._time,
        }

    def describe(self) -> list[str]:
        """What is looked at, in a few lines."""
        less = self.specimen.less
        where = f"{self.name} on {self.world.device}"
        words = f"the model is tried with {less}; memory, disk and time are the whole run's"
        return [where, *textwrap.wrap(words, COLUMNS)] if less else [where]

    @cached_property
    def specimen(self) -> TinyRun:
        """The recipe made small: on a piece of its own text, or, where that can't be read, on made-up ids."""
        folders = [at_hand.folder for at_hand in self.texts if at_hand.folder is not None]
        for folder in folders[:1]:
            try:
                tiny_run.cut_text(folder, self.scratch / "piece")
                found = self._shrink(self.scratch / "piece")
                found.build_run()
                return found
            except (ValueError, OSError):  # what is wrong with it is for the checks of the text to say
                continue
        tiny_run.make_text(self.scratch / "made-up", self.text.vocab_size)
        return self._shrink(self.scratch / "made-up")

    @cached_property
    def foresight(self) -> ResourceEstimate:
        """The recipe with everything decided, and what it needs."""
        return planning_command.estimate_resources(self.recipe, self.sizes, self.text, self.world.device)

    def _shrink(self, folder: Path) -> TinyRun:
        small, less = tiny_run.shrink(self.recipe, self.sizes, folder, self.world.device)
        return TinyRun(small, self.world, less)

    def _build(self, **compute: object) -> SetUp:
        return self.specimen.build(**compute)

    @property
    def _begins_anew(self) -> bool:
        return self.recipe.init_from is None

    # ------------------------------------------------------------ each that takes more than a line

    def _shards(self) -> CheckResult:
        missing = "; ".join(at_hand.why_not for at_hand in self.texts if at_hand.folder is None)
        found = self._of_texts(lambda at, _: data_checks.check_shards(at, full=self.config.full))
        return dataclasses.replace(found, cause=found.cause if found.passed is False else missing)

    def _of_texts(self, look: OfText) -> CheckResult:
        """One finding about all texts: the first that failed, or the first there is."""
        found = []
        for at_hand in self.texts:
            if at_hand.folder is None:
                found.append(skipped("there are no shards here to look at"))
                continue
            finding = look(at_hand.folder, read_manifest(at_hand.folder))
            if len(self.texts) > 1:
                finding = dataclasses.replace(finding, cause=f"{at_hand.folder}: {finding.cause}")
            found.append(finding)
        return min(found, key=lambda finding: {False: 0, True: 1, None: 2}[finding.passed])

    def _contamination(self) -> CheckResult:
        files, full = self.config.benchmarks, self.config.full
        if not files:
            return skipped("no benchmark's file was given: --benchmarks FILE ...")
        return self._of_texts(
            lambda at, manifest: data_checks.check_contamination(at, manifest, files, full=full)
        )

    def _rows(self) -> CheckResult:
        seen, validation = self.foresight, self.text.validation_tokens
        steps = seen.resolved.recipe.schedule.total_steps
        assert steps is not None
        trained = None if self.text.tokens is None else self.text.tokens - (validation or 0)
        return data_checks.check_rows(self._build(), seen.resolved.plan.tokens_before(steps), trained)

    def _precision(self) -> CheckResult:
        asked = self.recipe.compute.precision
        if asked == "fp32":
            return skipped("the recipe computes in float32 throughout")
        native = native_precision(self.world.device)
        return model_checks.check_precision(self._build, asked or ("bf16" if native == "fp32" else native))

    def _compiled(self) -> CheckResult:
        if self.recipe.compute.compile is False:
            return skipped("the recipe does not compile")
        if not can_compile() or self.world.device == "mps":
            return skipped("torch.compile finds no C++ compiler here, or can't be used on this device")
        return model_checks.check_compiled(self._build)

    def _processes(self) -> CheckResult:
        if not (dist.is_available() and dist.is_gloo_available()):
            return skipped("this torch has no gloo, by which processes on a CPU talk")
        small = self.specimen.recipe
        small = dataclasses.replace(small, compute=dataclasses.replace(small.compute, device="cpu"))

        def train_in_two() -> model_checks.Steps:
            folder = self.scratch / "two"
            folder.mkdir()
            tiny_run.write_task(small, folder)
            model_checks.run_in_two(tiny_run.IN_PROCESS, [str(folder)], folder / "logs")
            return tiny_run.read_steps(folder)

        return model_checks.check_processes(lambda: tiny_run.train_steps(small, SINGLE_PROCESS), train_in_two)

    def _reference(self) -> CheckResult:
        if self.reference is None:
            return skipped("no model was given: --baseline gpt2, or a Hugging Face folder")
        return generation_checks.check_reference(self.reference.model, self.reference.origin)

    def _schedule(self) -> CheckResult:
        """Of the whole run, as `build_training` makes it."""
        seen = self.foresight
        recipe, plan, steps = seen.resolved.recipe, seen.resolved.plan, seen.resolved.total_steps
        schedule = Schedule(recipe.schedule, recipe.optimizer.peak_learning_rate, plan, steps)
        return run_checks_module.check_schedule(
            schedule.learning_rate, steps, recipe.schedule, begins_anew=self._begins_anew
        )

    def _time(self) -> CheckResult:
        seconds, rests_on = planning_command.predict_time(self.foresight, self.text)
        return run_checks_module.check_time(seconds, duration(seconds), rests_on)


def open_doctor_context(config: DoctorConfig, name: str, scratch: Path) -> DoctorContext:
    """Find text, sizes and device. Raises ValueError for what `overnight train` would refuse as well."""
    recipe = Recipe(**{field.name: getattr(config, field.name) for field in dataclasses.fields(Recipe)})
    world = open_world(recipe.compute.device)
    reference = None
    if config.baseline is not None:
        reference = open_model(config.baseline)
        if not (reference.origin / "config.json").is_file():
            raise ValueError(
                f"baseline={config.baseline} is a run of ours: give a Hugging Face folder or name"
            )
    at_hand = find_local_datasets(recipe.data, name)
    guessed = SOME_CHARACTERS if recipe.data.tokenizer == "characters" else None
    text = find_token_counts(recipe.data, recipe.model.vocab_size or guessed)
    return DoctorContext(
        config=config,
        name=name,
        recipe=recipe,
        scratch=scratch,
        world=world,
        texts=at_hand,
        text=text,
        sizes=model_config_of(recipe, text.vocab_size),
        reference=reference,
    )


# ---------------------------------------------------------------- which of a recipe's texts lie on this machine, prepared


SMALL_BYTES = 20_000_000  # of text: prepared in seconds


class LocalDataset(NamedTuple):
    """One text of a recipe."""

    path: str
    """As the recipe has it."""
    folder: Path | None
    """Its shards; None if there are none here."""
    why_not: str = ""
    """Why not, and what to do."""


def find_local_datasets(config: DataConfig, name: str) -> list[LocalDataset]:
    """All texts of the recipe `name`. Raises ValueError for one that is neither there nor known."""
    paths = [each.path for each in config.mixture] or [config.data]
    return [_find(dataclasses.replace(config, data=path, mixture=()), name) for path in paths]


def _find(config: DataConfig, name: str) -> LocalDataset:
    path = config.data
    if "://" in path:
        return LocalDataset(
            path, None, f"{path} lies elsewhere, and is verified shard by shard while it is read"
        )
    if prepared := find_prepared(config):
        return LocalDataset(path, prepared)
    folder, command = find_recipe_text(path, config)
    if is_small_and_local(path):
        ensure_prepared(dataclasses.replace(config, shuffle_window=None))
        return LocalDataset(path, Path(folder))
    command = find_told_commands(name).get(folder, command)
    if not command:
        source_name(path)  # refuses, with what to do, what is not there
        command = ("overnight", "prepare", path)
    return LocalDataset(path, None, f"{folder} is not prepared yet: {shlex.join(command)}")


def is_small_and_local(path: str) -> bool:
    """True of text that `overnight prepare` is done with in seconds, without a network."""
    if path == "python-docs":
        return True
    if path == "shakespeare":
        return (cache_folder() / "shakespeare" / "input.txt").is_file()
    if is_remote(path) or not Path(path).exists():
        return False
    return sum(file.bytes for file in find_files(path)) <= SMALL_BYTES
