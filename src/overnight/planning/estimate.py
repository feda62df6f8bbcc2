"""How long a run takes, what it writes and what it costs: arithmetic on a recipe, without torch."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from overnight.conversion.open_model import open_model
from overnight.data import DataConfig
from overnight.data.shards import read_manifest, token_format
from overnight.model.model_config import PRESETS, ModelConfig
from overnight.preparation.prepare_config import PrepareConfig, output_folder
from overnight.recipe import Recipe
from overnight.tokenizer.open_tokenizer import load_tokenizer
from overnight.training.batch import BatchPlan

BYTES_PER_SAVED_PARAMETER = 12  # a weight and AdamW's two moments, float32
BYTES_PER_SAVED_TENSOR = 110  # its line in the header of a safetensors file
BYTES_BESIDE_TENSORS = 1500  # state.json and MANIFEST.json
BYTES_PER_METRICS_LINE = 220
GPT2_VOCABULARY = 50_257
FORWARD_SHARE = 1 / 3  # of a training pass: backward takes twice as many operations as forward
RELEASED = {
    "gpt2": "gpt2-124m",
    "gpt2-medium": "gpt2-350m",
    "gpt2-large": "gpt2-774m",
    "gpt2-xl": "gpt2-1558m",
}


class TokenCounts(NamedTuple):
    """What is known of a recipe's text before it is trained on."""

    vocab_size: int
    folder: Path | str | None
    """Where its shards lie, for a message; None if it is not all prepared yet."""
    tokens: int | None
    """Of both splits."""
    validation_tokens: int | None


def find_token_counts(config: DataConfig, vocab_size: int | None) -> TokenCounts:
    """The recipe's text, from its manifest where it is prepared; `vocab_size` is the recipe's own.

    Nothing is prepared or downloaded for this. Raises ValueError where the vocabulary can't be known yet.
    """
    if config.mixture:
        return _find_all(config, vocab_size)
    folder = find_prepared(config)
    if folder is None:
        return TokenCounts(vocab_size or _vocabulary(config), None, None, None)
    manifest = read_manifest(folder)
    validation = manifest.tokens("validation")
    return TokenCounts(manifest.vocab_size, folder, manifest.tokens("train") + validation, validation)


def _find_all(config: DataConfig, vocab_size: int | None) -> TokenCounts:
    """The sources of a mixture as one text."""
    parts = [
        find_token_counts(dataclasses.replace(config, data=source.path, mixture=()), vocab_size)
        for source in config.mixture
    ]
    counts = [(part.tokens, part.validation_tokens) for part in parts]
    if any(None in pair for pair in counts):
        return TokenCounts(parts[0].vocab_size, None, None, None)
    tokens, validation_tokens = (sum(filter(None, each)) for each in zip(*counts, strict=True))
    folders = ", ".join(str(part.folder) for part in parts)
    return TokenCounts(parts[0].vocab_size, folders, tokens, validation_tokens)


def find_prepared(config: DataConfig) -> Path | None:
    """The folder of shards that a run would use as it is; None if it would prepare one, or fail to."""
    folder = Path(config.data)
    if not (folder / "manifest.json").is_file():
        try:
            folder = output_folder(PrepareConfig(source=config.data, tokenizer=config.tokenizer))
        except ValueError:  # there is nothing of that name
            return None
    return folder if (folder / "manifest.json").is_file() else None


def _vocabulary(config: DataConfig) -> int:
    """How many ids the tokenizer will have, from its name; a folder's or file's from its content."""
    name = config.tokenizer
    if name == "gpt2":
        return GPT2_VOCABULARY
    if name == "characters":
        raise ValueError(
            f"how many characters {config.data} has is known once it is prepared: run "
            f"`overnight prepare {config.data} --tokenizer characters`, or give --vocab-size"
        )
    if size := re.fullmatch(r"bpe-([0-9]+)", name):
        return int(size[1])
    return load_tokenizer(name).vocab_size


def model_config_of(recipe: Recipe, vocab_size: int) -> ModelConfig:
    """The sizes of the model that a run would train: those of `init_from` if there is one."""
    if recipe.init_from is None:
        return dataclasses.replace(recipe.model, vocab_size=recipe.model.vocab_size or vocab_size)
    if recipe.init_from in RELEASED and not Path(recipe.init_from).is_dir():
        sizes = PRESETS[RELEASED[recipe.init_from]]
    else:
        sizes = open_model(recipe.init_from).model.config
    return dataclasses.replace(sizes, dropout=recipe.model.dropout)


@dataclass(frozen=True, kw_only=True)
class RunCounts:
    """What a run does, counted."""

    steps: int
    micro_batches: int
    """Of all steps together."""
    tokens: int
    evaluations: int
    evaluated_tokens: int | None
    """Of all evaluations together; None if the text, all of which is to be judged, is not prepared yet."""
    sampled_tokens: int
    checkpoints: int
    checkpoint_bytes: int
    """Of one."""


def count_run(recipe: Recipe, plan: BatchPlan, validation_tokens: int | None) -> RunCounts:
    """What a run of a decided recipe does from its first step to its last."""
    steps = recipe.schedule.total_steps
    assert steps is not None
    evaluation, samples, checkpoints = recipe.evaluation, recipe.samples, recipe.checkpoints
    evaluations = count_times(evaluation.evaluate_every_steps, steps)
    evaluations += evaluations > 0  # one before the first step
    sampled = len(samples.sample_prompts) * samples.sample_tokens
    tokens = plan.tokens_before(steps)
    return RunCounts(
        steps=steps,
        micro_batches=tokens // (plan.micro_batch_size * plan.tokens_per_row),
        tokens=tokens,
        evaluations=evaluations,
        evaluated_tokens=_times(
            evaluations, evaluated_tokens_of(evaluation.evaluation_tokens, validation_tokens)
        ),
        sampled_tokens=count_times(samples.sample_every_steps, steps) * sampled,
        checkpoints=max(1, count_times(checkpoints.checkpoint_every_steps, steps)),
        checkpoint_bytes=checkpoint_bytes(recipe.model),
    )


def count_times(every_steps: int | None, steps: int) -> int:
    """How often something happens that happens each so many steps, and after the last; 0 if it is off."""
    return 0 if every_steps is None else -(-steps // every_steps)


def evaluated_tokens_of(asked: int | None, validation_tokens: int | None) -> int | None:
    """Of one evaluation: what was asked for, as far as there is so much; None if that is not known."""
    known = [count for count in (asked, validation_tokens and validation_tokens - 1) if count is not None]
    return min(known, default=None)


def _times(count: int, each: int | None) -> int | None:
    return 0 if not count else None if each is None else count * each


def checkpoint_bytes(model: ModelConfig) -> int:
    """Of one checkpoint on the disk."""
    tensors = 3 * (4 + 12 * model.n_layer)
    parameters = BYTES_PER_SAVED_PARAMETER * model.parameter_count()
    return parameters + tensors * BYTES_PER_SAVED_TENSOR + BYTES_BESIDE_TENSORS


class StepCost(NamedTuple):
    """How long each part of the work takes, in seconds; 0 where it is not known and not counted."""

    micro_batch: float
    update: float
    """The optimizer's part of a step."""
    start: float
    """What the first step takes longer than the others: compilation, above all."""
    evaluated_token: float
    sampled_token: float
    saved_byte: float

    def step(self, micro_batches: int) -> float:
        """Of a step with so many micro-batches."""
        return micro_batches * self.micro_batch + self.update


def predict_seconds(work: RunCounts, pace: StepCost) -> dict[str, float]:
    """How long the run takes, by what it does meanwhile."""
    return {
        "training": work.micro_batches * pace.micro_batch + work.steps * pace.update,
        "evaluation": (work.evaluated_tokens or 0) * pace.evaluated_token,
        "samples": work.sampled_tokens * pace.sampled_token,
        "checkpoints": work.checkpoints * work.checkpoint_bytes * pace.saved_byte,
        "compilation": pace.start,
    }


def predict_disk(recipe: Recipe, work: RunCounts, text: TokenCounts) -> dict[str, int]:
    """Bytes that the run takes on the disk at most, by what they hold.

    Of a text that is not prepared yet, as many tokens as the run reads: it has no more than these to show.
    """
    width = token_format(text.vocab_size).dtype.itemsize
    kept = recipe.checkpoints.count_kept(work.steps)
    return {
        "shards": width * (work.tokens if text.tokens is None else text.tokens),
        "checkpoints": (kept + 1) * work.checkpoint_bytes,  # the one being written is one more
        "metrics": work.steps * BYTES_PER_METRICS_LINE,
    }


class Cost(NamedTuple):
    """In dollars."""

    run: float
    billion_tokens: float


def predict_cost(seconds: float, tokens: int, dollars_per_hour: float) -> Cost:
    """Of a run that takes so long and sees so many tokens."""
    dollars = seconds / 3600 * dollars_per_hour
    return Cost(dollars, dollars / tokens * 1e9)
