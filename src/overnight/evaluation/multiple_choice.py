"""Multiple choice: the nats of each ending after its context, the context read once for all of its endings.

A row is a tree: the context, then the endings one after the other, each of which looks at the context and at
itself, and counts its positions from the context's end. Rows of about the same length go together.

Shapes: B rows, T positions of a row, C channels, N tokens that count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from overnight.distributed.world import SINGLE_PROCESS, World
from overnight.model.gpt import GPT, eval_mode
from overnight.training.compute import autocast

# On a CPU as much as its caches hold, which also pads little.
TOKENS_AT_ONCE = 512  # padding included
IDS_AT_ONCE = 2048  # of the vocabulary: a quarter less time than with all logits of a position at once
GPU_TOKENS_AT_ONCE = 8192
GPU_SHAPE = 8  # a GPU's rows are padded to a multiple of so many tokens, for even tiles


@dataclass(frozen=True)
class BatchLimits:
    """How much is computed at once."""

    tokens: int
    """Of a batch, padding included."""
    ids: int
    """Of the vocabulary."""
    multiple: int
    """Rows are padded to a multiple of so many tokens."""


@dataclass(frozen=True)
class Choice:
    """One question as ids: which of the endings follows the context."""

    context: tuple[int, ...]
    endings: tuple[tuple[int, ...], ...]
    characters: tuple[int, ...]
    """Of each ending's text, the blank before it not counted."""
    answer: int
    """The number of the right ending."""
    leads: tuple[tuple[int, ...], ...] = ()
    """Of each ending what is read between the context and it, and is not judged; () where nothing is."""

    def branch(self, number: int) -> tuple[int, ...]:
        """What follows the context: a lead, if there is one, and the ending."""
        return (self.leads[number] if self.leads else ()) + self.endings[number]


@dataclass(frozen=True)
class ChoiceResult:
    """What a model makes of one question."""

    nats: tuple[float, ...]
    """Of each ending, all its tokens together: what is smallest is likeliest."""
    choice: Choice

    def likeliest(self, lengths: Sequence[float]) -> int:
        """The ending with the fewest nats for its length; the first of several."""
        means = [nats / length for nats, length in zip(self.nats, lengths, strict=True)]
        return means.index(min(means))

    @property
    def by_sum(self) -> bool:
        """True if the right ending is the likeliest as a whole."""
        return self.likeliest([1.0] * len(self.nats)) == self.choice.answer

    @property
    def by_token(self) -> bool:
        """True if it is the likeliest per token: build-nanogpt's accuracy."""
        return self.likeliest([len(ending) for ending in self.choice.endings]) == self.choice.answer

    @property
    def by_character(self) -> bool:
        """True if it is the likeliest per character: lm-eval's acc_norm."""
        return self.likeliest(self.choice.characters) == self.choice.answer


@dataclass(frozen=True)
class PackedQuestion:
    """A row: a context and some of its endings."""

    place: int
    """Of the question."""
    context: tuple[int, ...]
    endings: tuple[int, ...]
    """Their numbers."""
    choice: Choice

    @property
    def parts(self) -> list[tuple[int, ...]]:
        """What is read after the context: the branches without their last tokens, which are only targets."""
        return [self.choice.branch(number)[:-1] for number in self.endings]

    def __len__(self) -> int:
        return len(self.context) + sum(map(len, self.parts))


class TreeMask:
    """What the rows' positions are, and who may look at whom: the model's cache protocol, in one call."""

    def __init__(self, trees: Sequence[PackedQuestion], length: int, device: torch.device) -> None:
        positions = torch.zeros(len(trees), length, dtype=torch.long)
        branches = torch.full((len(trees), length), -1)  # of the padding, which looks at itself alone
        for row, tree in enumerate(trees):
            end = len(tree.context)
            positions[row, :end] = torch.arange(end)
            branches[row, :end] = 0
            for branch, part in enumerate(tree.parts, start=1):
                start, end = end, end + len(part)
                positions[row, start:end] = len(tree.context) + torch.arange(len(part))
                branches[row, start:end] = branch
        self._positions_BT, branches_BT = positions.to(device), branches.to(device)
        same = branches_BT[:, :, None] == branches_BT[:, None, :]
        of_context = (branches_BT == 0)[:, None, :] & (branches_BT > 0)[:, :, None]
        before = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        self._mask = ((same | of_context) & before)[:, None]

    def positions(self, length: int) -> Tensor:
        """(B, T): an ending goes on where its context ends."""
        return self._positions_BT[:, :length]

    def append(self, _layer: int, k_BHTD: Tensor, v_BHTD: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Nothing is remembered; the mask is bool (B, 1, T, T)."""
        return k_BHTD, v_BHTD, self._mask


@torch.no_grad()
def evaluate_choices(
    model: GPT, choices: Sequence[Choice], precision: str = "fp32", world: World = SINGLE_PROCESS
) -> Iterator[tuple[int, ChoiceResult]]:
    """Every question's place and what comes of it, in batches of questions that are about as long.

    The first tokens of a context that is too long for the model are left out. Questions are divided among
    the processes of `world`, each of which yields its own. Raises ValueError for an ending that leaves no
    room for a token before it.
    """
    trees = [
        pack_question(place, choice, model.config.context_length) for place, choice in enumerate(choices)
    ]
    order = sorted(range(len(trees)), key=lambda place: (max(map(len, trees[place])), place))
    device = model.wte.weight.device.type
    portion = BatchLimits(TOKENS_AT_ONCE, IDS_AT_ONCE, 1)
    if device != "cpu":
        portion = BatchLimits(GPU_TOKENS_AT_ONCE, model.vocab_size, GPU_SHAPE)
    with eval_mode(model), autocast(device, precision):
        for batch in list(_batches([trees[place] for place in order], portion))[world.rank :: world.size]:
            nats = _judge([tree for rows in batch for tree in rows], model, portion)
            for rows in batch:
                place = rows[0].place
                count = len(choices[place].endings)
                yield (
                    place,
                    ChoiceResult(tuple(nats[place, number] for number in range(count)), choices[place]),
                )


def pack_question(place: int, choice: Choice, context_length: int) -> list[PackedQuestion]:
    """A question's rows: one, or several that share its endings where the model can't read them at once.

    Of the context as much is kept as can be read beside the longest ending.
    """
    longest = max(len(choice.branch(number)) for number in range(len(choice.endings))) - 1
    if longest >= context_length or not choice.context or not all(choice.endings):
        raise ValueError(
            f"question {place + 1}, with {len(choice.context)} tokens before endings of "
            f"{', '.join(str(len(ending)) for ending in choice.endings)}, does not fit the model's context "
            f"of {context_length}"
        )
    context = choice.context[-(context_length - longest) :]
    trees: list[PackedQuestion] = []
    for number in range(len(choice.endings)):
        grown = PackedQuestion(place, context, (*trees[-1].endings, number) if trees else (number,), choice)
        if trees and len(grown) <= context_length:
            trees[-1] = grown
        else:
            trees.append(PackedQuestion(place, context, (number,), choice))
    return trees


def _batches(
    questions: Sequence[list[PackedQuestion]], portion: BatchLimits
) -> Iterator[list[list[PackedQuestion]]]:
    """Neighbours, as many as have `portion.tokens` together at most, padding included."""
    batch: list[list[PackedQuestion]] = []
    for trees in questions:
        rows = sum(map(len, [*batch, trees]))
        if batch and rows * _padded(max(map(len, trees)), portion) > portion.tokens:
            yield batch
            batch = []
        batch.append(trees)
    if batch:
        yield batch


def _padded(length: int, portion: BatchLimits) -> int:
    return -(-length // portion.multiple) * portion.multiple


def _judge(trees: Sequence[PackedQuestion], model: GPT, portion: BatchLimits) -> dict[tuple[int, int], float]:
    """The nats of each ending, by (place of the question, number of the ending)."""
    device = model.wte.weight.device
    T = min(_padded(max(map(len, trees)), portion), model.config.context_length)
    ids_BT = torch.zeros(len(trees), T, dtype=torch.long)
    counted: dict[int, int] = {}  # places that foretell something, and their numbers: N of them
    predicting: list[int] = []  # the number for each target: M of them, since a context foretells several
    targets: list[int] = []
    ends: list[int] = []
    for row, tree in enumerate(trees):
        ids_BT[row, : len(tree)] = torch.tensor(
            [*tree.context, *(token for part in tree.parts for token in part)]
        )
        start = row * T + len(tree.context)
        for number, part in zip(tree.endings, tree.parts, strict=True):
            # The first token of a branch is foretold by the last of the context.
            places = [row * T + len(tree.context) - 1, *range(start, start + len(part))]
            ending = tree.choice.endings[number]
            predicting += [counted.setdefault(place, len(counted)) for place in places[-len(ending) :]]
            targets += ending
            ends.append(len(targets))
            start += len(part)
    hidden_BTC = model.trunk(ids_BT.to(device), TreeMask(trees, T, device))
    hidden_NC = hidden_BTC.flatten(0, 1)[torch.tensor(list(counted), device=device)]
    asked = torch.tensor(predicting, device=device), torch.tensor(targets, device=device)
    lengths = [end - start for start, end in pairwise([0, *ends])]
    parts = torch.split(_nats(hidden_NC, model, asked, portion.ids).cpu().double(), lengths)
    keys = [(tree.place, number) for tree in trees for number in tree.endings]
    return {key: part.sum().item() for key, part in zip(keys, parts, strict=True)}


def _nats(hidden_NC: Tensor, model: GPT, asked: tuple[Tensor, Tensor], at_once: int) -> Tensor:
    """Of M targets, each foretold by one of the hidden states: float32 (M,).

    Of the vocabulary `at_once` ids at a time.
    """
    foretelling_M, targets_M = asked
    logsums = []
    logits_M = hidden_NC.new_zeros(len(targets_M), dtype=torch.float32)
    for first in range(0, model.vocab_size, at_once):
        weight = model.wte.weight[first : min(first + at_once, model.vocab_size)]
        logits_NV = F.linear(hidden_NC, weight).float()
        logsums.append(logits_NV.logsumexp(-1))
        ids_M = targets_M - first
        here_M = logits_NV[foretelling_M, ids_M.clamp(0, len(weight) - 1)]
        logits_M = torch.where((ids_M >= 0) & (ids_M < len(weight)), here_M, logits_M)
    return torch.stack(logsums).logsumexp(0)[foretelling_M] - logits_M
