"""A small likeness of a recipe, on a small piece of its text: what can be checked whole in seconds.

It has the recipe's settings, and goes through the functions that a run goes through. Only sizes are less,
and noise is off: what is compared must be the same each time.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from overnight import __version__
from overnight.config import from_toml, to_toml
from overnight.data import DataConfig
from overnight.data.dataset import open_dataset
from overnight.data.shards import Manifest, ShardWriter, Tokens, open_tokens, read_manifest, write_manifest
from overnight.distributed.launcher import exit_process
from overnight.distributed.world import World, join_world
from overnight.doctor.check import SetUp
from overnight.model.model_config import ModelConfig
from overnight.recipe import CheckpointsConfig, EvaluationConfig, Recipe, SamplesConfig
from overnight.run import setup
from overnight.run.setup import RunSetup
from overnight.run_directory import write_atomically
from overnight.tokenizer.characters import Characters
from overnight.training import step
from overnight.training.batch import BatchConfig
from overnight.training.schedule import ScheduleConfig

LAYERS, CHANNELS, CONTEXT = 2, 128, 128  # at most
ROWS, MICRO_BATCHES = 2, 4
TRAINING_TOKENS, VALIDATION_TOKENS = 200_000, 20_000
STEPS_IN_PROCESSES = 2
FEWEST_IDS = 258  # of the tokenizer that stands in: 256 bytes, end-of-text, and one to begin with
FIRST_CHARACTER = 0x10000  # beyond are enough for any vocabulary, none of them a surrogate
IN_PROCESS = (
    "import sys; from overnight.doctor.tiny_run import train_in_process; train_in_process(sys.argv[1])"
)


@dataclass(frozen=True)
class TinyRun:
    """A recipe made small, and where it computes."""

    recipe: Recipe
    world: World
    less: str
    """What is less than in the recipe, in words; "" if nothing."""

    def build_run(self, **compute: object) -> RunSetup:
        """As a run does it, with these fields of the recipe's ComputeConfig."""
        changed = dataclasses.replace(self.recipe.compute, **compute)  # type: ignore[arg-type]
        return _build_run(dataclasses.replace(self.recipe, compute=changed), self.world)

    def build(self, **compute: object) -> SetUp:
        """Model, optimizer, and what trains them."""
        built = self.build_run(**compute)
        return SetUp(built.state, built.training)


def _build_run(recipe: Recipe, world: World) -> RunSetup:
    dataset = open_dataset(recipe.data)
    model, weights = setup.initial_weights(recipe, dataset, None)
    return setup.build_run(setup.resolve_on(recipe, model, dataset, world), dataset, weights, world)


def shrink(recipe: Recipe, sizes: ModelConfig, folder: Path, device: str) -> tuple[Recipe, str]:
    """`recipe` with a model of at most 2 layers and 128 channels, on the shards in `folder`; what is less."""
    channels = sizes.n_embd // sizes.n_head
    heads = max(1, min(sizes.n_head, CHANNELS // channels))
    model = dataclasses.replace(
        sizes,
        n_layer=min(sizes.n_layer, LAYERS),
        n_head=heads,
        n_embd=heads * channels,
        context_length=min(sizes.context_length, CONTEXT),
        vocab_size=None,
        dropout=0.0,
    )
    small = dataclasses.replace(
        recipe,
        init_from=None,
        trackers=(),
        data=dataclasses.replace(DataConfig(data=str(folder)), packing=recipe.data.packing),
        model=model,
        schedule=ScheduleConfig(total_steps=1000, learning_rate_decay="constant"),
        batch=BatchConfig(tokens_per_step=MICRO_BATCHES * ROWS * model.context_length, micro_batch_size=ROWS),
        compute=dataclasses.replace(
            recipe.compute,
            device=device,
            precision="fp32",
            compile=False,
            loss="full" if recipe.compute.loss == "fp8" else recipe.compute.loss,
            processes=None,
            sharding=None,
        ),
        evaluation=EvaluationConfig(),
        samples=SamplesConfig(sample_prompts=()),
        checkpoints=CheckpointsConfig(),
    )
    return small, _describe(sizes, model)


def _describe(sizes: ModelConfig, model: ModelConfig) -> str:
    words = {
        "n_layer": "{} of {} layers",
        "n_embd": "{} of {} channels",
        "context_length": "{} of {} positions",
    }
    less = [
        form.format(f"{getattr(model, name):,}", f"{getattr(sizes, name):,}")
        for name, form in words.items()
        if getattr(model, name) != getattr(sizes, name)
    ]
    return ", ".join([*less, *(["no dropout"] if sizes.dropout else [])])


# ---------------------------------------------------------------- its text


def cut_text(source: Path, folder: Path) -> None:
    """Fill `folder` with the beginning of both splits of the shards in `source`.

    Whether they are sound is for others to say; raises ValueError or OSError if nothing can be read.
    """
    manifest = read_manifest(source)
    splits = {
        split: _beginning(source, manifest, split, most)
        for split, most in (("train", TRAINING_TOKENS), ("validation", VALIDATION_TOKENS))
    }
    _write(folder, manifest.vocab_size, manifest.end_of_text, splits)


def _beginning(source: Path, manifest: Manifest, split: str, most: int) -> Tokens:
    pieces: list[Tokens] = []
    for shard in manifest.shards(split):
        if (left := most - sum(piece.size for piece in pieces)) > 0:
            pieces.append(open_tokens(source / shard.name)[:left])
    return np.concatenate(pieces)


def make_text(folder: Path, vocab_size: int) -> None:
    """Fill `folder` with ids without meaning, a few of them frequent, in documents of some hundred."""
    vocab_size = max(vocab_size, FEWEST_IDS)
    drawn = np.random.default_rng(0)
    splits = {}
    for split, count in (("train", TRAINING_TOKENS), ("validation", VALIDATION_TOKENS)):
        ids = (drawn.zipf(1.3, count) - 1) % (vocab_size - 1)
        ids[::300] = vocab_size - 1
        splits[split] = ids.astype(np.uint32)
    _write(folder, vocab_size, vocab_size - 1, splits)


def _write(folder: Path, vocab_size: int, end_of_text: int, splits: dict[str, Tokens]) -> None:
    """Shards, their manifest, and a tokenizer of so many ids that stands in for theirs."""
    folder.mkdir()
    shards = {}
    for split, ids in splits.items():
        writer = ShardWriter(folder, split, vocab_size, max(1, ids.size))
        writer.add(ids.astype(np.uint32), ids.size)
        shards[split] = writer.finish()
    tokenizer = Characters(map(chr, range(FIRST_CHARACTER, FIRST_CHARACTER + vocab_size - FEWEST_IDS + 1)))
    tokenizer.save(folder / "tokenizer")
    manifest = Manifest(
        overnight_version=__version__,
        source="a piece to check with",
        licence="",
        request={},
        split_rule="",
        tokenizer=tokenizer.name,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=vocab_size,
        end_of_text=end_of_text,
        documents=2,
        duplicate_documents=0,
        empty_documents=0,
        skipped_documents=0,
        repaired_documents=0,
        train=shards["train"],
        validation=shards["validation"],
    )
    write_manifest(folder, manifest)


# ---------------------------------------------------------------- in processes


def train_steps(recipe: Recipe, world: World) -> list[tuple[float, float]]:
    """Loss and gradient norm of the first steps."""
    built = _build_run(recipe, world)
    results = [step.train_step(built.state, built.training) for _ in range(STEPS_IN_PROCESSES)]
    return [(result.loss, result.grad_norm) for result in results]


def write_task(recipe: Recipe, folder: Path) -> None:
    """What `train_in_process` reads."""
    write_atomically(folder / "task.toml", to_toml(recipe))


def train_in_process(folder: str) -> None:
    """In one of several processes: do the steps of the recipe that lies in `folder`, and end the process."""
    text = (Path(folder) / "task.toml").read_text(encoding="utf-8")
    recipe = from_toml(Recipe, text, "task.toml")
    with join_world("cpu", recipe.compute.timeout_seconds) as world:
        steps = train_steps(recipe, world)
        if world.is_main:
            write_atomically(Path(folder) / "steps.json", json.dumps(steps))
    exit_process(0)


def read_steps(folder: Path) -> list[tuple[float, float]]:
    """What the main process has written."""
    return [(loss, norm) for loss, norm in json.loads((folder / "steps.json").read_text(encoding="utf-8"))]
