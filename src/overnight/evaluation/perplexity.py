"""Loss, perplexity and bits per byte over a fixed set of tokens."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal

import torch

from overnight.data.loader import Batch
from overnight.distributed.world import SINGLE_PROCESS, World
from overnight.model.gpt import GPT, eval_mode
from overnight.model.kernels import find_documents
from overnight.model.loss import LossSum, cross_entropy_nats
from overnight.training.compute import autocast

LOGITS_AT_ONCE = 1024  # positions: all logits of a batch would take gigabytes, and more time


@dataclass(frozen=True)
class Evaluation:
    """A model's loss on some text, in three units."""

    loss: float
    """Nats per token."""
    perplexity: float
    """e to the loss."""
    bits_per_byte: float
    """Bits for each byte of the text; the only one that compares across tokenizers."""
    evaluated_tokens: int
    """Targets judged, separators between documents included."""
    evaluated_bytes: int
    """Bytes of text that these targets spell; separators spell none."""


def evaluate_language_model(
    model: GPT,
    batches: Iterable[Batch],
    token_bytes: Sequence[bytes],
    precision: str = "fp32",
    document_separator: int | None = None,
    world: World = SINGLE_PROCESS,
) -> Evaluation:
    """Judge `model` on every target of `batches`; see `measure_language_model`."""
    return sum_up(measure_language_model(model, batches, token_bytes, precision, document_separator, world))


def measure_language_model(
    model: GPT,
    batches: Iterable[Batch],
    token_bytes: Sequence[bytes],
    precision: str = "fp32",
    document_separator: int | None = None,
    world: World = SINGLE_PROCESS,
) -> TextLoss:
    """The nats of all targets of `batches`, LOGITS_AT_ONCE at a time; `token_bytes` says what each id spells.

    A target near the start of its row is judged on a short context, which makes the loss a little
    higher than with a sliding window. `document_separator` is the id at which a document begins that is judged by
    itself, for a model that is trained so; None where a row is one text to the model. Training state and
    random state are left as they were. The batches are divided among the processes of `world`, and the result
    is the same to the digit for any number of them: nats are added up exactly. Raises ValueError if there
    is no text.
    """
    device = torch.device(world.device) if world.size > 1 else model.wte.weight.device
    spelling = torch.tensor([list(map(len, token_bytes)), count_characters(token_bytes)])
    spelled = torch.zeros(2, dtype=torch.long)
    pieces: list[list[tuple[float, int]]] = []
    with eval_mode(model), torch.no_grad(), autocast(device.type, precision):
        for batch, is_mine in _share(batches, world):
            ids_BT, targets_N = batch.ids.to(device), batch.targets.to(device).flatten()
            documents = None if document_separator is None else find_documents(ids_BT, document_separator)
            hidden_NC = model.trunk(ids_BT, documents=documents).flatten(0, 1)
            if not is_mine:
                continue
            parts = (torch.split(each, LOGITS_AT_ONCE) for each in (hidden_NC, targets_N))
            pieces.append(
                [
                    (cross_entropy_nats(model.head(hidden[None]), targets[None]).item(), targets.numel())
                    for hidden, targets in zip(*parts, strict=True)
                ]
            )
            spelled += spelling[:, batch.targets.flatten()].sum(1)
    shares = [json.loads(told) for told in world.all_gather_object(json.dumps([pieces, spelled.tolist()]))]
    # Batches went round: the first of each process, then the second of each.
    rounds = zip_longest(*(share[0] for share in shares), fillvalue=())
    in_order = [piece for turn in rounds for batch in turn for piece in batch]
    text_bytes, characters = (sum(share[1][place] for share in shares) for place in (0, 1))
    if not text_bytes:
        raise ValueError("there is no text to evaluate on: the validation split is empty")
    return TextLoss(
        nats=tuple(nats for nats, _ in in_order),
        tokens=tuple(tokens for _, tokens in in_order),
        units={"byte": text_bytes, "character": characters},
    )


def sum_up(measured: TextLoss) -> Evaluation:
    """Sums, divided once."""
    tokens, text_bytes = int(measured.count("token")), int(measured.count("byte"))
    total = LossSum(torch.tensor(math.fsum(measured.nats), dtype=torch.float64), tokens)
    return Evaluation(
        total.per_token(), total.perplexity(), total.bits_per_byte(text_bytes), tokens, text_bytes
    )


def _share(batches: Iterable[Batch], world: World) -> Iterator[tuple[Batch, bool]]:
    """Every `world.size`-th batch, and True; where the last ones are too few, another's batch, and False.

    So all processes do as many forward passes, and none waits for weights that nobody gathers.
    """
    waiting: list[Batch] = []
    for batch in batches:
        waiting.append(batch)
        if len(waiting) == world.size:
            yield waiting[world.rank], True
            waiting = []
    if waiting:
        is_mine = world.rank < len(waiting)
        yield waiting[world.rank if is_mine else 0], is_mine


def pool_evaluations(parts: Sequence[Evaluation]) -> Evaluation:
    """Of all their texts together: sums and counts, divided once."""
    tokens = sum(part.evaluated_tokens for part in parts)
    text_bytes = sum(part.evaluated_bytes for part in parts)
    nats = sum(part.loss * part.evaluated_tokens for part in parts)
    total = LossSum(torch.tensor(nats, dtype=torch.float64), tokens)
    return Evaluation(
        total.per_token(), total.perplexity(), total.bits_per_byte(text_bytes), tokens, text_bytes
    )


def evaluation_rows(model: GPT) -> int:
    """Rows of the whole context to judge at once: about 8,192 tokens, whatever the context."""
    return max(1, 8192 // model.config.context_length)


# ---------------------------------------------------------------- what a model needs for a text


Unit = Literal["token", "word", "byte", "character"]


@dataclass(frozen=True, kw_only=True)
class TextLoss:
    """One model on one text."""

    nats: tuple[float, ...]
    """Of each example: a window, a passage."""
    tokens: tuple[int, ...]
    """Judged in each."""
    units: Mapping[Unit, float]
    """How many words, bytes, characters they all spell together, as far as known."""

    def count(self, unit: Unit) -> float:
        """How many tokens, words, bytes or characters."""
        return sum(self.tokens) if unit == "token" else self.units[unit]

    def per(self, unit: Unit) -> float:
        """Nats for each of them."""
        return math.fsum(self.nats) / self.count(unit)


def count_characters(token_bytes: Sequence[bytes]) -> list[int]:
    """Of each id how many characters begin in it: bytes that do not go on with a character of UTF-8."""
    return [sum(byte & 0xC0 != 0x80 for byte in spelling) for spelling in token_bytes]
