"""Passages: the nats of the last ids of each row, given all before them, and whether they are the likeliest.

Long texts become passages, too: windows over them, each id judged once.

Shapes: B rows, T positions of a row, C channels, N ids that are judged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from overnight.distributed.world import SINGLE_PROCESS, World
from overnight.model.gpt import GPT, eval_mode
from overnight.training.compute import autocast

TOKENS_AT_ONCE = 8192  # padding included
LOGITS_AT_ONCE = 1024  # positions: all logits of a batch would take gigabytes
SHAPE = 8  # rows are padded to multiples of so many tokens, so that shapes come again


@dataclass(frozen=True)
class Passage:
    """A row of ids, of which the last `scored` are foretold by what stands before them."""

    ids: Sequence[int] | NDArray[np.integer]
    scored: int


class SpanResult(NamedTuple):
    """What a model makes of a passage."""

    nats: float
    """Of all its judged ids together."""
    is_greedy: bool
    """True if each of them is the likeliest: greedy decoding would write them."""


@torch.no_grad()
def evaluate_passages(
    model: GPT, passages: Sequence[Passage], precision: str = "fp32", world: World = SINGLE_PROCESS
) -> Iterator[tuple[int, SpanResult]]:
    """Every passage's place and what comes of it, in batches of passages that are about as long.

    Passages are divided among the processes of `world`, each of which yields its own. Raises ValueError for
    one that the model can't read at once, and one with nothing before what is judged.
    """
    for passage in passages:
        _check(passage, model.config.context_length)
    order = sorted(range(len(passages)), key=lambda place: (len(passages[place].ids), place))
    with eval_mode(model), autocast(model.wte.weight.device.type, precision):
        for places in list(_batches(passages, order))[world.rank :: world.size]:
            yield from zip(places, _judge([passages[place] for place in places], model), strict=True)


def cut_windows(
    ids: Sequence[int] | NDArray[np.integer], context_length: int, stride: int | None = None
) -> Iterator[Passage]:
    """A text as windows; every id but the first is judged exactly once.

    Each window goes on where the one before ended, without knowing it; with `stride`, each judges only so
    many new ids, so that context_length - stride ids at least stand before each of them. The last one begins
    early enough to be as long as the others. Raises ValueError for a stride that is no part of the context.
    """
    step = context_length if stride is None else stride
    if not 1 <= step <= context_length:
        raise ValueError(f"a stride of {stride} must be at least 1 and at most the context, {context_length}")
    judged = 1
    while judged < len(ids):
        end = min(len(ids), judged + (context_length if judged == 1 else step))
        yield Passage(ids[max(0, end - context_length - 1) : end], end - judged)
        judged = end


def _check(passage: Passage, context_length: int) -> None:
    if not 1 <= passage.scored < len(passage.ids) <= context_length + 1:
        raise ValueError(
            f"a passage of {len(passage.ids)} tokens, of which {passage.scored} are judged, does not fit the "
            f"model's context of {context_length}"
        )


def _batches(passages: Sequence[Passage], order: Sequence[int]) -> Iterator[list[int]]:
    """Neighbours' places, as many as have TOKENS_AT_ONCE together at most, padding included."""
    batch: list[int] = []
    for place in order:
        if batch and (len(batch) + 1) * _padded(len(passages[place].ids) - 1) > TOKENS_AT_ONCE:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def _padded(length: int) -> int:
    return -(-length // SHAPE) * SHAPE


def _judge(passages: Sequence[Passage], model: GPT) -> Iterator[SpanResult]:
    device = model.wte.weight.device
    longest = max(len(passage.ids) for passage in passages) - 1
    T = min(_padded(longest), model.config.context_length)
    ids_BT = np.zeros((len(passages), T), dtype=np.int64)  # what pads a row comes after all that counts
    counted: list[int] = []
    targets: list[NDArray[np.int64]] = []
    for row, passage in enumerate(passages):
        ids = np.asarray(passage.ids, dtype=np.int64)
        ids_BT[row, : len(ids) - 1] = ids[:-1]
        counted += range(row * T + len(ids) - 1 - passage.scored, row * T + len(ids) - 1)
        targets.append(ids[-passage.scored :])
    hidden_BTC = model.trunk(torch.from_numpy(ids_BT).to(device))
    hidden_NC = hidden_BTC.flatten(0, 1)[torch.tensor(counted, device=device)]
    targets_N = torch.from_numpy(np.concatenate(targets)).to(device)
    nats, greedy = [], []
    pieces = zip(*(torch.split(each, LOGITS_AT_ONCE) for each in (hidden_NC, targets_N)), strict=True)
    for hidden, wanted in pieces:
        logits = model.head(hidden).float()
        nats.append(F.cross_entropy(logits, wanted, reduction="none"))
        greedy.append(logits.argmax(-1) == wanted)
    nats_N, greedy_N = torch.cat(nats).cpu().double(), torch.cat(greedy).cpu()
    ends = np.cumsum([0, *(passage.scored for passage in passages)])
    for start, end in pairwise(ends.tolist()):
        yield SpanResult(nats_N[start:end].sum().item(), bool(greedy_N[start:end].all()))
