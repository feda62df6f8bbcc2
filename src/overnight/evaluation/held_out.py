"""A model's loss on prepared text, with its interval."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from overnight.data import DataConfig
from overnight.data.dataset import Dataset, MixtureDataset, open_dataset
from overnight.data.loader import Batch
from overnight.data.mixture import Concatenation
from overnight.distributed.world import World
from overnight.evaluation.passages import cut_windows
from overnight.evaluation.perplexity import (
    TextLoss,
    count_characters,
    evaluation_rows,
    measure_language_model,
)
from overnight.evaluation.references import VALIDATION_LOSSES, PublishedResult
from overnight.evaluation.run_tasks import gather
from overnight.evaluation.tasks import evaluate_task
from overnight.model.gpt import GPT
from overnight.preparation.prepare import ensure_prepared
from overnight.terminal import progress
from overnight.tokenizer.tokenizer import Tokenizer

METRICS = ("nats_per_token", "perplexity_per_token", "bits_per_byte", "bits_per_character")


@dataclass(frozen=True)
class ValidationSet:
    """The text to be judged on, and how."""

    dataset: Dataset | MixtureDataset
    tokens: int | None
    """How many; all if None."""
    stride: int | None
    """How many new ids each window judges; None judges a window's all."""

    def references(self) -> tuple[PublishedResult, ...]:
        """What others reached on text of this source, in tokens of this tokenizer."""
        record = self.dataset.record()
        known = VALIDATION_LOSSES.get(str(record.get("source")), ())
        return known if self.dataset.tokenizer.name == "gpt2" else ()


def open_validation_set(config: DataConfig, tokens: int | None, stride: int | None) -> ValidationSet:
    """The held-out split of prepared text. Raises ValueError for a stride where documents stand alone."""
    dataset = open_dataset(ensure_prepared(config))
    if stride is not None and dataset.document_separator is not None:
        raise ValueError(
            "--stride does not go with packing=documents, where documents stand by themselves: leave it out"
        )
    return ValidationSet(dataset, tokens, stride)


def check_same_tokenizer(held_out: ValidationSet, tokenizer: Tokenizer, model: str, folder: Path) -> None:
    """Raise ValueError unless the text is written with the model's tokenizer, which lies in `folder`."""
    dataset = held_out.dataset
    if dataset.tokenizer.fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"{model} reads {tokenizer.name}, but {dataset.folder} is written with the "
            f"tokenizer {dataset.tokenizer.name}: prepare that text with --tokenizer {folder}"
        )


def measure_validation(held_out: ValidationSet, model: GPT, precision: str, world: World) -> TextLoss:
    """The nats of its tokens, by pieces, with a bar; the same in all processes."""
    dataset, wanted = held_out.dataset, held_out.tokens
    stream = dataset.stream("validation", model.config.context_length, seed=0)
    with progress("validation", wanted or stream.tokens - 1, "tokens") as advance:
        if held_out.stride is not None:
            return _measure_windows(held_out, model, precision, world, advance)

        def shown() -> Iterator[Batch]:
            for batch in stream.evaluation_batches(evaluation_rows(model), wanted):
                yield batch
                advance(batch.targets.numel())

        token_bytes = dataset.tokenizer.token_bytes()
        return measure_language_model(
            model, shown(), token_bytes, precision, dataset.document_separator, world
        )


def _measure_windows(
    held_out: ValidationSet, model: GPT, precision: str, world: World, advance: Callable[[int], None]
) -> TextLoss:
    """The same with a stride: each window knows what stands before it; of several texts, each by itself."""
    texts = list(_read_texts(held_out, model.config.context_length))
    passages = [
        passage for ids in texts for passage in cut_windows(ids, model.config.context_length, held_out.stride)
    ]
    mine = []
    for place, numbers in evaluate_task(model, passages, precision, world):
        mine.append((place, numbers))
        advance(passages[place].scored * world.size)
    targets = np.concatenate([ids[1:] for ids in texts])
    token_bytes = held_out.dataset.tokenizer.token_bytes()
    return TextLoss(
        nats=tuple(numbers[0] for numbers in gather(mine, world)),
        tokens=tuple(passage.scored for passage in passages),
        units={
            "byte": int(np.array([len(token_bytes) for token_bytes in token_bytes])[targets].sum()),
            "character": int(np.array(count_characters(token_bytes))[targets].sum()),
        },
    )


def _read_texts(held_out: ValidationSet, tokens_per_row: int) -> Iterator[NDArray[np.int64]]:
    """The ids of the held-out split in its own order; of a mixture, of each part."""
    stream, wanted = held_out.dataset.stream("validation", tokens_per_row, seed=0), held_out.tokens
    streams = stream.streams if isinstance(stream, Concatenation) else (stream,)
    counts = stream.evaluation_tokens(wanted) if isinstance(stream, Concatenation) else [wanted]
    for each, count in zip(streams, counts, strict=True):
        batches = list(each.evaluation_batches(1, count))
        yield np.concatenate([batches[0].ids[0, :1], *(batch.targets[0] for batch in batches)])
