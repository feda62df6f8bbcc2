"""A model's loss on the validation split of prepared text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from overnight.data import DataConfig
from overnight.data.dataset import Dataset, MixtureDataset, open_dataset
from overnight.data.loader import Batch
from overnight.data.mixture import Concatenation
from overnight.distributed.world import World
from overnight.evaluation.passages import cut_windows, evaluate_passages, gather_results
from overnight.evaluation.perplexity import (
    TextLoss,
    evaluate_language_model,
    evaluation_rows,
    text_units,
)
from overnight.evaluation.scores import VALIDATION_LOSSES, Numbers, Score, TaskResult, score_text
from overnight.model.gpt import GPT
from overnight.preparation.prepare import ensure_prepared
from overnight.terminal import progress, quote
from overnight.tokenizer.tokenizer import Tokenizer

METRICS = ("nats_per_token", "perplexity_per_token", "bits_per_byte", "bits_per_character")


@dataclass(frozen=True)
class ValidationSet:
    """The text, and how it is evaluated."""

    dataset: Dataset | MixtureDataset
    tokens: int | None
    """Number of tokens; all if None."""
    stride: int | None
    """New ids of each window; a whole context without overlap if None."""

    def check_tokenizer(self, tokenizer: Tokenizer, model: str, folder: Path) -> None:
        """Raise ValueError unless the text is encoded with the model's tokenizer, which is in `folder`."""
        own = self.dataset.tokenizer
        if own.fingerprint != tokenizer.fingerprint:
            raise ValueError(
                f"{model} uses the tokenizer {tokenizer.name}, but {self.dataset.folder} is encoded with "
                f"{own.name}: prepare that text with --tokenizer {quote(str(folder))}"
            )

    def measure(self, model: GPT, precision: str, world: World) -> TextLoss:
        """The nats of the text, the same in all processes, with a progress bar."""
        dataset = self.dataset
        stream = dataset.stream("validation", model.config.context_length, seed=0)
        tokens = min(self.tokens or stream.tokens, stream.tokens - 1)
        with progress("validation", tokens, "tokens") as advance:
            if self.stride is not None:
                return self._measure_windows(model, precision, world, advance)

            def counted() -> Iterator[Batch]:
                for batch in stream.evaluation_batches(evaluation_rows(model), self.tokens):
                    yield batch
                    advance(batch.targets.numel())

            token_bytes, separator = dataset.tokenizer.token_bytes(), dataset.document_separator
            return evaluate_language_model(model, counted(), token_bytes, precision, separator, world)

    def score(self, losses: Sequence[TextLoss]) -> list[Score]:
        """The model's loss in all units, with published results on text of the same source and tokenizer.

        A second loss is the baseline's, which is then compared.
        """
        kind = "pieces" if self.stride is None else "windows"
        first, *others = score_text("validation", METRICS, losses, kind)
        if self.dataset.tokenizer.name != "gpt2":
            return [first, *others]
        published = VALIDATION_LOSSES.get(str(self.dataset.record().get("source")), ())
        return [dataclasses.replace(first, references=published), *others]

    def _measure_windows(
        self, model: GPT, precision: str, world: World, advance: Callable[[int], None]
    ) -> TextLoss:
        """`measure` with overlapping windows, which do not cross the texts of a mixture."""
        context_length = model.config.context_length
        stream = self.dataset.stream("validation", context_length, seed=0)
        parts = [(stream, self.tokens)]
        if isinstance(stream, Concatenation):
            parts = list(zip(stream.streams, stream.evaluation_tokens(self.tokens), strict=True))
        texts = []
        for part, count in parts:
            batches = list(part.evaluation_batches(1, count))
            texts.append(np.concatenate([batches[0].ids[0, :1], *(batch.targets[0] for batch in batches)]))
        windows = [window for ids in texts for window in cut_windows(ids, context_length, self.stride)]
        own: list[tuple[int, Numbers]] = []
        for index, result in evaluate_passages(model, windows, precision, world):
            own.append((index, result))
            advance(windows[index].scored * world.size)
        token_bytes = self.dataset.tokenizer.token_bytes()
        targets_N = torch.from_numpy(np.concatenate([ids[1:] for ids in texts]))
        units = text_units(token_bytes, torch.bincount(targets_N, minlength=len(token_bytes)))
        return TaskResult(windows, gather_results(own, world)).text_loss(units)


def open_validation_set(config: DataConfig, tokens: int | None, stride: int | None) -> ValidationSet:
    """The validation split of prepared text. Raises ValueError for a stride with packing=documents."""
    dataset = open_dataset(ensure_prepared(config))
    if stride is not None and dataset.document_separator is not None:
        raise ValueError(
            "--stride cannot be used with packing=documents, where no window crosses documents: leave it out"
        )
    return ValidationSet(dataset, tokens, stride)
