"""Loss of spans: the nats of the last ids of a row given all ids before them, and whether they are greedy.

A long text becomes spans too: windows that together contain each of its ids as a target once.

Shapes: B rows, T positions of a row, C channels, N target ids.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
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
LENGTH_MULTIPLE = 8  # of padded rows, so that batches repeat their shapes


@dataclass(frozen=True)
class Passage:
    """A row of ids, of which the last `scored` are predicted from those before them."""

    ids: Sequence[int] | NDArray[np.integer]
    scored: int


class SpanResult(NamedTuple):
    """A model's result on a passage."""

    nats: float
    """Sum over all target ids."""
    is_greedy: bool
    """True if greedy decoding would write the target ids: each is the most likely one."""


@torch.no_grad()
def evaluate_passages(
    model: GPT, passages: Sequence[Passage], precision: str = "fp32", world: World = SINGLE_PROCESS
) -> Iterator[tuple[int, SpanResult]]:
    """Yield (index, result) of every passage, in batches of similar length.

    Passages are divided among the processes of `world`, each of which yields its own. Raises ValueError for
    a passage longer than the context, and for one without an id before its targets.
    """
    context_length = model.config.context_length
    for passage in passages:
        if not 1 <= passage.scored < len(passage.ids) <= context_length + 1:
            raise ValueError(
                f"a passage of {len(passage.ids)} tokens, of which {passage.scored} are predicted, does not "
                f"fit the model's context of {context_length}"
            )
    sizes = [(1, len(passage.ids) - 1) for passage in passages]
    batches = list(batches_by_length(sizes, TOKENS_AT_ONCE, LENGTH_MULTIPLE))
    with eval_mode(model), autocast(model.wte.weight.device.type, precision):
        for batch in batches[world.rank :: world.size]:
            results = _evaluate_batch([passages[index] for index in batch], model)
            yield from zip(batch, results, strict=True)


def cut_windows(
    ids: Sequence[int] | NDArray[np.integer], context_length: int, stride: int | None = None
) -> Iterator[Passage]:
    """Cut a text into windows, in which every id but the first is a target once.

    Each window starts where the one before ended. With `stride`, each has that many targets, and at least
    context_length - stride ids before each of them. The last window starts early enough to be full. Raises
    ValueError for a stride that is not between 1 and the context length.
    """
    step = context_length if stride is None else stride
    if not 1 <= step <= context_length:
        raise ValueError(f"a stride of {stride} must be at least 1 and at most the context, {context_length}")
    done = 1
    while done < len(ids):
        end = min(len(ids), done + (context_length if done == 1 else step))
        yield Passage(ids[max(0, end - context_length - 1) : end], end - done)
        done = end


def batches_by_length(sizes: Sequence[tuple[int, int]], tokens: int, multiple: int) -> Iterator[list[int]]:
    """Indices of examples of similar length, in batches of at most `tokens`, padding included.

    `sizes` are (rows, length of the longest row) of each example; lengths are padded to `multiple`.
    """
    batch: list[int] = []
    batch_rows = 0
    for index in sorted(range(len(sizes)), key=lambda index: (sizes[index][1], index)):
        rows, length = sizes[index]
        if batch and (batch_rows + rows) * padded(length, multiple) > tokens:
            yield batch
            batch, batch_rows = [], 0
        batch.append(index)
        batch_rows += rows
    if batch:
        yield batch


def gather_results(own: Iterable[tuple[int, tuple[float, ...]]], world: World) -> list[tuple[float, ...]]:
    """The results of all processes, by index of their examples."""
    shares = world.all_gather_object(json.dumps(list(own)))
    found = {index: tuple(numbers) for share in shares for index, numbers in json.loads(share)}
    return [found[index] for index in range(len(found))]


def check_finite(numbers: Iterable[float], where: str, precision: str) -> None:
    """Raise FloatingPointError unless all results are finite; those of finite weights may overflow."""
    if not all(map(math.isfinite, numbers)):
        remedy = "its weights are too large" if precision == "fp32" else "evaluate it in fp32"
        raise FloatingPointError(f"{where}: the loss is not finite in {precision}; {remedy}")


def padded(length: int, multiple: int) -> int:
    """The next multiple."""
    return -(-length // multiple) * multiple


def _evaluate_batch(passages: Sequence[Passage], model: GPT) -> Iterator[SpanResult]:
    device = model.wte.weight.device
    longest = max(len(passage.ids) for passage in passages) - 1
    T = min(padded(longest, LENGTH_MULTIPLE), model.config.context_length)
    ids_BT = np.zeros((len(passages), T), dtype=np.int64)  # padding follows all targets, so needs no mask
    predicting: list[int] = []  # the flat position before each target
    targets: list[NDArray[np.int64]] = []
    for row, passage in enumerate(passages):
        ids = np.asarray(passage.ids, dtype=np.int64)
        ids_BT[row, : len(ids) - 1] = ids[:-1]
        predicting += range(row * T + len(ids) - 1 - passage.scored, row * T + len(ids) - 1)
        targets.append(ids[-passage.scored :])
    hidden_BTC = model.trunk(torch.from_numpy(ids_BT).to(device))
    hidden_NC = hidden_BTC.flatten(0, 1)[torch.tensor(predicting, device=device)]
    targets_N = torch.from_numpy(np.concatenate(targets)).to(device)
    nats, greedy = [], []
    pieces = zip(*(torch.split(each, LOGITS_AT_ONCE) for each in (hidden_NC, targets_N)), strict=True)
    for hidden, target in pieces:
        logits = model.head(hidden).float()
        nats.append(F.cross_entropy(logits, target, reduction="none"))
        greedy.append(logits.argmax(-1) == target)
    nats_N, greedy_N = torch.cat(nats).cpu().double(), torch.cat(greedy).cpu()
    counts = [passage.scored for passage in passages]
    for own_nats, own_greedy in zip(*(torch.split(each, counts) for each in (nats_N, greedy_N)), strict=True):
        yield SpanResult(own_nats.sum().item(), bool(own_greedy.all()))
