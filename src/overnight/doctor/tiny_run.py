"""A small version of a recipe, on a small text, which can be checked within seconds.

It keeps the recipe's settings and is built by the functions that build a run. Its sizes are smaller, and
dropout is off so that results are reproducible.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

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
from overnight.distributed.world import World
from overnight.model.model_config import ModelConfig
from overnight.preparation.prepare import prepare_shards
from overnight.preparation.prepare_config import PrepareConfig
from overnight.recipe import Recipe, SamplesConfig, with_settings
from overnight.run.setup import RunSetup, build_run, initial_weights, resolve_on
from overnight.training.batch import BatchConfig
from overnight.training.schedule import ScheduleConfig

LAYERS, CHANNELS, CONTEXT = 2, 128, 128  # at most
ROWS, MICRO_BATCHES = 2, 4
TEXT_TOKENS = 100_000  # of each split
DOCUMENT_TOKENS = 2_000  # longer documents are cut, so that both splits get some
VALIDATION_FRACTION = 0.5


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


def shrink(recipe: Recipe, sizes: ModelConfig, folder: Path, world: World, text: str = "") -> TinyRun:
    """`recipe` with a model of at most 2 layers and 128 channels, on the shards in `folder`.

    `text` describes them if they are not the recipe's.
    """
    channels = sizes.n_embd // sizes.n_head
    heads = max(1, min(sizes.n_head, CHANNELS // channels))
    model = ModelConfig(
        n_layer=min(sizes.n_layer, LAYERS),
        n_head=heads,
        n_embd=heads * channels,
        context_length=min(sizes.context_length, CONTEXT),
        vocab_size=None,
        dropout=0.0,
    )
    small = Recipe(
        run_name=recipe.run_name,
        seed=recipe.seed,
        data=DataConfig(data=str(folder), packing=recipe.data.packing),
        model=model,
        optimizer=recipe.optimizer,
        schedule=ScheduleConfig(total_steps=1000, learning_rate_decay="constant"),
        batch=BatchConfig(tokens_per_step=MICRO_BATCHES * ROWS * model.context_length, micro_batch_size=ROWS),
        compute=recipe.compute,
        samples=SamplesConfig(sample_prompts=()),
        guard=recipe.guard,
    )
    small = with_settings(
        small,
        device=world.device,
        precision="fp32",
        compile=False,
        loss="full" if recipe.compute.loss == "fp8" else recipe.compute.loss,
        processes=None,
        sharding=None,
    )
    words = {"n_layer": "layers", "n_embd": "channels", "context_length": "positions"}
    reductions = [
        f"{getattr(model, name):,} of {getattr(sizes, name):,} {word}"
        for name, word in words.items()
        if getattr(model, name) != getattr(sizes, name)
    ]
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
    source = scratch / "text.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    folder = scratch / "shards"
    config = PrepareConfig(
        source=str(source),
        tokenizer=tokenizer,
        out=str(folder),
        workers=1,
        validation_fraction=VALIDATION_FRACTION,
    )
    prepare_shards(config)
    return folder
