"""Loss, perplexity and bits per byte of a model on a fixed set of tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Literal

import torch
from torch import Tensor

from overnight.data.loader import Batch
from overnight.distributed.world import SINGLE_PROCESS, World
from overnight.evaluation.passages import LOGITS_AT_ONCE, gather_results
from overnight.model.gpt import GPT, eval_mode
from overnight.model.kernels import find_documents
from overnight.model.loss import cross_entropy_nats
from overnight.training.compute import autocast

BATCH_TOKENS = 8192

Unit = Literal["token", "word", "byte", "character"]


@dataclass(frozen=True)
class Evaluation:
    """A model's loss on a text, in three units."""

    loss: float
    """Nats per token."""
    perplexity: float
    """e to the loss."""
    bits_per_byte: float
    """Bits per byte of the text: comparable across tokenizers."""
    evaluated_tokens: int
    """Target tokens, separators between documents included."""
    evaluated_bytes: int
    """Bytes of the target tokens; separators have none."""


@dataclass(frozen=True, kw_only=True)
class TextLoss:
    """One model's loss on each example of a text."""

    nats: tuple[float, ...]
    """Nats of each example: a window, a passage or a piece of a batch."""
    tokens: tuple[int, ...]
    """Target tokens of each example."""
    units: Mapping[Unit, float]
    """Total words, bytes and characters of the targets, as far as they are known."""

    def count(self, unit: Unit) -> float:
        """The number of tokens, words, bytes or characters."""
        return sum(self.tokens) if unit == "token" else self.units[unit]

    def per(self, unit: Unit) -> float:
        """Nats per token, word, byte or character."""
        return math.fsum(self.nats) / self.count(unit)

    def summary(self) -> Evaluation:
        """The loss of all examples together."""
        nats, tokens, text_bytes = math.fsum(self.nats), int(self.count("token")), int(self.count("byte"))
        loss = nats / tokens
        return Evaluation(loss, perplexity_of(loss), nats / math.log(2) / text_bytes, tokens, text_bytes)


def perplexity_of(nats: float) -> float:
    """Exponential of the mean; infinity beyond 709 nats per token, the limit of a float."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


def pool_losses(parts: Sequence[TextLoss]) -> TextLoss:
    """The loss on several texts together, as on one text."""
    return TextLoss(
        nats=tuple(chain.from_iterable(part.nats for part in parts)),
        tokens=tuple(chain.from_iterable(part.tokens for part in parts)),
        units={unit: sum(part.units[unit] for part in parts) for unit in parts[0].units},
    )


def evaluate_language_model(
    model: GPT,
    batches: Iterable[Batch],
    token_bytes: Sequence[bytes],
    precision: str = "fp32",
    document_separator: int | None = None,
    world: World = SINGLE_PROCESS,
) -> TextLoss:
    """The nats of all targets of `batches`, at most LOGITS_AT_ONCE targets an example.

    `token_bytes` are the bytes of each id. Targets early in a row have a short context, which makes the loss
    a little higher than with overlapping windows. With `document_separator`, the id that begins a document,
    attention does not cross documents, for a model trained with packing=documents. The batches are divided
    among the processes of `world`; the result is bitwise equal for any number of them. Raises
    ValueError for an empty text.
    """
    device = torch.device(world.device) if world.size > 1 else model.wte.weight.device
    counts_V = torch.zeros(len(token_bytes), dtype=torch.long)  # of each id among the targets
    tokens: list[int] = []
    own: list[tuple[int, tuple[float]]] = []
    remaining = iter(batches)
    with eval_mode(model), torch.no_grad(), autocast(device.type, precision):
        while waiting := list(islice(remaining, world.size)):
            starts = []  # index of each batch's first example
            for targets_N in (batch.targets.flatten() for batch in waiting):
                starts.append(len(tokens))
                counts_V += torch.bincount(targets_N, minlength=len(token_bytes))
                tokens += map(len, torch.split(targets_N, LOGITS_AT_ONCE))
            # If too few batches are left, a process reads another's: all run the same number of forward
            # passes, which gather a sharded model's weights.
            batch = waiting[min(world.rank, len(waiting) - 1)]
            ids_BT, targets_N = batch.ids.to(device), batch.targets.to(device).flatten()
            documents = None if document_separator is None else find_documents(ids_BT, document_separator)
            hidden_NC = model.trunk(ids_BT, documents=documents).flatten(0, 1)
            if world.rank < len(waiting):
                parts = (torch.split(each, LOGITS_AT_ONCE) for each in (hidden_NC, targets_N))
                for index, (hidden, targets) in enumerate(zip(*parts, strict=True), starts[world.rank]):
                    own.append((index, (cross_entropy_nats(model.head(hidden[None]), targets[None]).item(),)))
    units = text_units(token_bytes, counts_V)
    if not units["byte"]:
        raise ValueError("the validation split is empty: it has nothing to evaluate on")
    nats = tuple(nats for (nats,) in gather_results(own, world))
    return TextLoss(nats=nats, tokens=tuple(tokens), units=units)


def evaluation_rows(model: GPT) -> int:
    """Rows of a whole context to evaluate at once: BATCH_TOKENS in all."""
    return max(1, BATCH_TOKENS // model.config.context_length)


def text_units(token_bytes: Sequence[bytes], counts_V: Tensor) -> dict[Unit, float]:
    """Bytes and characters of a text with these counts of each id.

    A character belongs to its first byte's id: bytes that begin with the bits 10 continue one in UTF-8.
    """
    sizes_V2 = [(len(spelling), sum(byte & 0xC0 != 0x80 for byte in spelling)) for spelling in token_bytes]
    text_bytes, characters = (counts_V @ torch.tensor(sizes_V2)).tolist()
    return {"byte": text_bytes, "character": characters}
