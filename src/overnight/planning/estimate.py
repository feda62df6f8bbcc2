"""Counts of a run, its disk space and its duration: arithmetic on a recipe, without a device."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from overnight.conversion.open_model import open_model
from overnight.data import DataConfig
from overnight.data.shards import MANIFEST, read_manifest, token_format
from overnight.model.model_config import ModelConfig
from overnight.model.presets import PRESETS
from overnight.preparation.identity import find_prepared, text_request
from overnight.preparation.prepare_commands import find_recipe_text
from overnight.preparation.sources import NAMED_SOURCES
from overnight.recipe import Recipe, Resolved
from overnight.terminal import shell_command
from overnight.tokenizer.open_tokenizer import load_tokenizer
from overnight.training import OptimizerConfig
from overnight.training.batch import ROWS_AT_MOST
from overnight.training.moments import count_saved_tensors, saved_bytes

BYTES_PER_SAVED_TENSOR = 110  # its entry in the header of a safetensors file
BYTES_OF_CHECKPOINT_METADATA = 1500  # state.json and MANIFEST.json
BYTES_PER_METRICS_LINE = 220
GPT2_VOCABULARY = 50_257
FORWARD_SHARE = 1 / 3  # of a training pass: backward takes twice the operations of forward
RELEASED = {
    "gpt2": "gpt2-124m",
    "gpt2-medium": "gpt2-350m",
    "gpt2-large": "gpt2-774m",
    "gpt2-xl": "gpt2-1558m",
}


class TokenCounts(NamedTuple):
    """The known sizes of a recipe's text before training."""

    vocab_size: int
    folder: str | None
    """Its folders of shards, for messages; None unless all text is prepared."""
    tokens: int | None
    """Number of tokens of both splits."""
    validation_tokens: int | None


def find_token_counts(config: DataConfig, vocab_size: int | None) -> TokenCounts:
    """The counts in the manifests of prepared text; `vocab_size` is the recipe's own.

    Prepares and downloads nothing. Raises ValueError where the vocabulary is not known yet.
    """
    paths = [source.path for source in config.mixture] or [config.data]
    folders = []
    for path in paths:
        if (folder := find_text(path, config)) is None:
            return TokenCounts(vocab_size or _vocabulary(path, config), None, None, None)
        folders.append(folder)
    manifests = [read_manifest(folder) for folder in folders]
    return TokenCounts(
        vocab_size=manifests[0].vocab_size,
        folder=", ".join(map(str, folders)),
        tokens=sum(each.tokens("train") + each.tokens("validation") for each in manifests),
        validation_tokens=sum(each.tokens("validation") for each in manifests),
    )


def find_text(path: str, config: DataConfig) -> Path | None:
    """The folder of shards that a run would read; None if it would have to prepare one, and for a URL."""
    if (Path(path) / MANIFEST).is_file():
        return Path(path)
    is_text = path in NAMED_SOURCES or Path(path).exists()
    return find_prepared(text_request(path, config)) if is_text else None


def _vocabulary(path: str, config: DataConfig) -> int:
    """The vocabulary size of a tokenizer, from its name, or from its files."""
    name = config.tokenizer
    if name == "gpt2":
        return GPT2_VOCABULARY
    if name == "characters":
        command = find_recipe_text(path, config)[1] or ("overnight", "prepare", path, "--tokenizer", name)
        raise ValueError(
            f"the number of characters in {path} is known once it is prepared: run "
            f"`{shell_command(*command[1:])}`, or give --vocab-size"
        )
    if size := re.fullmatch(r"bpe-([0-9]+)", name):
        return int(size[1])
    return load_tokenizer(name).vocab_size


def model_config_of(recipe: Recipe, vocab_size: int) -> ModelConfig:
    """The sizes of the model that a run would train: those of `init_from` if there is one."""
    if recipe.init_from is None:
        sizes = recipe.model
    elif recipe.init_from in RELEASED and not Path(recipe.init_from).is_dir():
        sizes = PRESETS[RELEASED[recipe.init_from]]
    else:
        sizes = open_model(recipe.init_from).model.config
    vocab_size = sizes.vocab_size or vocab_size
    return dataclasses.replace(sizes, vocab_size=vocab_size, dropout=recipe.model.dropout)


@dataclass(frozen=True, kw_only=True)
class RunCounts:
    """Number of each operation in a run."""

    steps: int
    micro_batches: int
    """Number of micro-batches of all steps."""
    tokens: int
    evaluations: int
    evaluated_tokens: int | None
    """Tokens of all evaluations; None if a whole text is evaluated that is not prepared yet."""
    sampled_tokens: int
    checkpoints: int
    checkpoint_bytes: int
    """Bytes of one checkpoint."""


def count_run(resolved: Resolved, validation_tokens: int | None) -> RunCounts:
    """The counts of a run from its first step to its last."""
    recipe, batch, steps = resolved.recipe, resolved.plan, resolved.total_steps
    evaluation, samples = recipe.evaluation, recipe.samples
    evaluations = count_times(evaluation.evaluate_every_steps, steps)
    evaluations += evaluations > 0  # one more before the first step
    # The first token of the split has no context and is not predicted.
    limits = [evaluation.evaluation_tokens, validation_tokens and validation_tokens - 1]
    tokens_each = min((count for count in limits if count is not None), default=None)
    evaluated = None if evaluations and tokens_each is None else evaluations * (tokens_each or 0)
    sampled = len(samples.sample_prompts) * samples.sample_tokens
    tokens = batch.tokens_before(steps)
    return RunCounts(
        steps=steps,
        micro_batches=tokens // (batch.micro_batch_size * batch.tokens_per_row),
        tokens=tokens,
        evaluations=evaluations,
        evaluated_tokens=evaluated,
        sampled_tokens=count_times(samples.sample_every_steps, steps) * sampled,
        checkpoints=max(1, count_times(recipe.checkpoints.checkpoint_every_steps, steps)),
        checkpoint_bytes=checkpoint_bytes(resolved.model, recipe.optimizer),
    )


def possible_micro_batches(resolved: Resolved, processes: int) -> list[int]:
    """Rows per micro-batch that divide the rows of each process in the smallest step."""
    batch = resolved.recipe.batch
    smallest = batch.batch_ramp_start_tokens or batch.tokens_per_step
    rows = smallest // resolved.model.context_length // processes
    return [count for count in range(1, min(rows, ROWS_AT_MOST) + 1) if rows % count == 0]


def count_times(every_steps: int | None, steps: int) -> int:
    """Number of times that an event happens every `every_steps` and after the last step; 0 if off."""
    return 0 if every_steps is None else -(-steps // every_steps)


def checkpoint_bytes(model: ModelConfig, optimizer: OptimizerConfig) -> int:
    """Size of one checkpoint on the disk."""
    headers = count_saved_tensors(model, optimizer) * BYTES_PER_SAVED_TENSOR
    return saved_bytes(model, optimizer) + headers + BYTES_OF_CHECKPOINT_METADATA


def predict_disk(recipe: Recipe, counts: RunCounts, text: TokenCounts) -> dict[str, int]:
    """Largest number of bytes that the run takes on the disk, by use.

    Text that is not prepared yet is counted as the tokens that the run reads.
    """
    width = token_format(text.vocab_size).dtype.itemsize
    kept = recipe.checkpoints.count_kept(counts.steps)
    return {
        "shards": width * (counts.tokens if text.tokens is None else text.tokens),
        "checkpoints": (kept + 1) * counts.checkpoint_bytes,  # one more while it is written
        "metrics": counts.steps * BYTES_PER_METRICS_LINE,
    }


class StepCost(NamedTuple):
    """Seconds of each part of the work; 0 where a part is unknown or not counted."""

    micro_batch: float
    update: float = 0.0
    """Duration of the optimizer's update in a step."""
    start: float = 0.0
    """Additional duration of the first step, mainly compilation."""
    evaluated_token: float = 0.0
    sampled_token: float = 0.0
    saved_byte: float = 0.0

    def step(self, micro_batches: int) -> float:
        """Seconds of a step of `micro_batches`."""
        return micro_batches * self.micro_batch + self.update


CostRange = Sequence[StepCost]
"""Fast, likely, slow."""


def predict_seconds(counts: RunCounts, cost: StepCost) -> dict[str, float]:
    """Duration of the run, by use."""
    return {
        "training": counts.micro_batches * cost.micro_batch + counts.steps * cost.update,
        "evaluation": (counts.evaluated_tokens or 0) * cost.evaluated_token,
        "samples": counts.sampled_tokens * cost.sampled_token,
        "checkpoints": counts.checkpoints * counts.checkpoint_bytes * cost.saved_byte,
        "compilation": cost.start,
    }
