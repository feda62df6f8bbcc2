"""What the checks of a recipe need: its text, its plan, and a small version that trains within seconds.

The small version keeps the recipe's settings and is built by the functions that build a run. Its sizes are
smaller, and dropout is off so that results are reproducible.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from overnight.conversion.open_model import open_model
from overnight.data import DataConfig
from overnight.data.dataset import open_dataset
from overnight.data.loader import Batch
from overnight.data.shards import (
    SPLITS,
    chunks,
    load_prepared_tokenizer,
    open_tokens,
    places_of,
    read_manifest,
)
from overnight.data.text_files import find_files
from overnight.distributed.world import World, open_world
from overnight.doctor import DoctorConfig
from overnight.files import cache_path
from overnight.model.model_config import ModelConfig
from overnight.planning import PlanConfig
from overnight.planning.command import estimate_plan
from overnight.planning.estimate import find_text, find_token_counts, model_config_of
from overnight.planning.plan import Plan
from overnight.preparation.prepare import ensure_prepared, prepare_shards
from overnight.preparation.prepare_commands import JobText, find_recipe_texts
from overnight.preparation.prepare_config import PrepareConfig
from overnight.preparation.sources import source_name
from overnight.recipe import Recipe, SamplesConfig, plain_recipe, with_settings
from overnight.run.setup import RunSetup, build_run, initial_weights, resolve_on
from overnight.terminal import shell_command
from overnight.training.batch import BatchConfig
from overnight.training.schedule import Schedule, ScheduleConfig

UNKNOWN_CHARACTERS = 322  # assumed vocabulary while a text's own characters are not counted yet
SMALL_BYTES = 20_000_000  # text up to this size is prepared in seconds

LAYERS, CHANNELS, CONTEXT = 2, 128, 128  # of the small version, at most
ROWS, MICRO_BATCHES = 2, 4
TEXT_TOKENS = 100_000  # of each split
DOCUMENT_TOKENS = 2_000  # longer documents are cut, so that both splits get some


class DoctorContext:
    """The recipe, its text, its plan and its small version, each built once, on first use.

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
        paths = [each.path for each in data.mixture] or [data.data]
        for path, text in zip(paths, find_recipe_texts(data, name, with_files=True), strict=True):
            self._find_shards(path, text)
        guessed = UNKNOWN_CHARACTERS if data.tokenizer == "characters" else None
        self.text = find_token_counts(data, self.recipe.model.vocab_size or guessed)
        self.sizes = model_config_of(self.recipe, self.text.vocab_size)

    def _find_shards(self, path: str, text: JobText) -> None:
        """Add a text to `folders` or `missing`; prepares it if that takes seconds."""
        data = self.recipe.data
        if text.is_remote:
            self.missing.append(f"{path} is remote: each shard is verified when it is read")
        elif prepared := find_text(path, data):
            self.folders.append(prepared)
        elif is_small_and_local(path):
            one = dataclasses.replace(data, data=path, mixture=(), shuffle_window=None)
            self.folders.append(Path(ensure_prepared(one).data))
        else:
            if not text.prepare:
                source_name(path)  # raises ValueError if the source does not exist
            command = text.prepare or ("overnight", "prepare", path)
            self.missing.append(f"{text.folder} is not prepared yet: {shell_command(*command[1:])}")

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

    @cached_property
    def plan(self) -> Plan:
        """The plan of the whole run."""
        return estimate_plan(PlanConfig(**vars(self.recipe)), self.name, self.text)

    @property
    def schedule(self) -> Schedule:
        """The learning rate of the whole run."""
        resolved = self.plan.resolved
        peak = self.recipe.optimizer.peak_learning_rate
        return Schedule(resolved.recipe.schedule, peak, resolved.plan, resolved.total_steps)


def is_small_and_local(path: str) -> bool:
    """True for text that `overnight prepare` can prepare within seconds and without a network."""
    if path == "python-docs":
        return True
    if path == "shakespeare":
        return cache_path("shakespeare", "input.txt").is_file()
    return Path(path).exists() and sum(file.bytes for file in find_files(path)) <= SMALL_BYTES


@dataclass(frozen=True)
class TinyRun:
    """A small recipe, and the processes that it runs in."""

    recipe: Recipe
    world: World
    reductions: str = ""
    """The reduced sizes, as text; "" if there are none."""

    def build(self, **compute: object) -> RunSetup:
        """A new run with these fields of ComputeConfig changed: always the same weights and rows."""
        recipe = with_settings(self.recipe, **compute)
        dataset = open_dataset(recipe.data)
        model, weights = initial_weights(recipe, dataset, None)
        return build_run(resolve_on(recipe, model, dataset, self.world), dataset, weights, self.world)


def step_batch(run: RunSetup) -> Batch:
    """All rows of the next step in one batch."""
    plan, step = run.training.plan, run.state.step
    first, rows = plan.rows(step, 0)
    return run.training.data.batch(first, rows * plan.micro_batches(step))


def _shrink_model(sizes: ModelConfig) -> ModelConfig:
    """The same switches in at most 2 layers and 128 channels; heads keep their channels.

    Projections do not begin at 0: otherwise no block would change a logit, and most gradients would be 0.
    """
    heads = max(1, min(sizes.n_head, CHANNELS // sizes.head_channels))
    context, channels = min(sizes.context_length, CONTEXT), heads * sizes.head_channels
    width, trained = sizes.feed_forward_width, sizes.trained_context_length
    return dataclasses.replace(
        sizes,
        n_layer=min(sizes.n_layer, LAYERS),
        n_head=heads,
        n_embd=channels,
        context_length=context,
        vocab_size=None,
        dropout=0.0,
        zero_projections=False,
        n_kv_head=None if sizes.n_kv_head is None else math.gcd(heads, sizes.n_kv_head),
        feed_forward_width=None if width is None else max(1, width * channels // sizes.n_embd),
        trained_context_length=None if trained is None else max(1, trained * context // sizes.context_length),
        short_window=None if sizes.short_window is None else min(sizes.short_window, context),
        latent_rank=None if sizes.latent_rank is None else min(sizes.latent_rank, channels),
    )


def shrink(recipe: Recipe, sizes: ModelConfig, folder: Path, world: World, text: str = "") -> TinyRun:
    """`recipe` with a model of at most 2 layers and 128 channels, on the shards in `folder`.

    `text` describes them if they are not the recipe's.
    """
    model = _shrink_model(sizes)
    small = Recipe(
        run_name=recipe.run_name,
        seed=recipe.seed,
        data=DataConfig(data=str(folder), packing=recipe.data.packing),
        model=model,
        optimizer=recipe.optimizer,
        schedule=ScheduleConfig(total_steps=1000, learning_rate_decay="constant"),
        batch=BatchConfig(tokens_per_step=MICRO_BATCHES * ROWS * model.context_length, micro_batch_size=ROWS),
        compute=dataclasses.replace(
            recipe.compute,
            device=world.device,
            precision="fp32",
            compile=False,
            loss="full" if recipe.compute.loss == "fp8" else recipe.compute.loss,
            processes=None,
            sharding=None,
        ),
        samples=SamplesConfig(sample_prompts=()),
        guard=recipe.guard,
    )
    words = {"n_layer": "layers", "n_embd": "channels", "context_length": "positions"}
    reductions = [
        f"{getattr(model, name):,} of {getattr(sizes, name):,} {word}"
        for name, word in words.items()
        if getattr(model, name) != getattr(sizes, name)
    ]
    reductions += ["projections that are not 0"] * sizes.zero_projections
    reductions += ["no dropout"] * (sizes.dropout > 0) + [text] * bool(text)
    return TinyRun(small, world, ", ".join(reductions))


def prepare_piece(source: Path, scratch: Path) -> Path:
    """A folder of shards of the beginning of `source`, prepared again with its tokenizer.

    Raises ValueError or OSError if it can't be read, or is not enough.
    """
    manifest = read_manifest(source)
    tokenizer = load_prepared_tokenizer(source, manifest)
    pieces, texts = [], []
    # Documents are split by a hash of their text: those of one split alone could all go there again.
    for split in SPLITS:
        missing = TEXT_TOKENS
        for shard in manifest.shards(split):
            pieces.append(open_tokens(source / shard.name)[:missing])
            missing -= pieces[-1].size
    ids = np.concatenate(pieces)
    for document in np.split(ids, places_of(manifest.end_of_text, ids)):
        content = document[document != manifest.end_of_text]
        texts += [tokenizer.decode(part.tolist()) for part in chunks(content, DOCUMENT_TOKENS)]
    return _prepare(texts, str(source / "tokenizer"), scratch)


def prepare_made_up_text(scratch: Path) -> Path:
    """A folder of shards of a text about numbers, in characters."""
    lines = (f"The number {number} times seven is {7 * number}, and so on.\n" for number in range(4_000))
    return _prepare(("".join(lines) for lines in zip(*[lines] * 20, strict=True)), "characters", scratch)


def _prepare(texts: Iterable[str], tokenizer: str, scratch: Path) -> Path:
    scratch.mkdir()
    source, folder = scratch / "text.jsonl", scratch / "shards"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    prepare_shards(
        PrepareConfig(
            source=str(source), out=str(folder), tokenizer=tokenizer, workers=1, validation_fraction=0.5
        )
    )
    return folder
