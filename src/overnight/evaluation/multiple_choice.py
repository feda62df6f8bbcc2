"""Multiple choice: the nats of each ending after its context, the context read once for all endings.

A row is a tree: the context, then the endings one after the other. Each ending attends to the context and to
itself, and its positions continue the context's. Rows of similar length form a batch.

Shapes: B rows, T positions of a row, C channels, N positions that predict a target, M targets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor

from overnight.distributed.world import SINGLE_PROCESS, World
from overnight.evaluation.passages import Passage, batches_by_length, padded
from overnight.model.fused import soft_cap
from overnight.model.gpt import GPT, eval_mode
from overnight.training.compute import autocast

# As many tokens as a CPU's caches hold; small batches also need little padding.
TOKENS_AT_ONCE = 512  # padding included
IDS_AT_ONCE = 2048  # of the vocabulary: a quarter less time than with all logits of a position at once
GPU_TOKENS_AT_ONCE = 8192
GPU_LENGTH_MULTIPLE = 8

ACCURACIES = ("accuracy_per_token", "accuracy_per_character", "accuracy_by_sum")
"""Per token: build-nanogpt's accuracy; per character: lm-eval's acc_norm; by sum: plain accuracy."""


@dataclass(frozen=True)
class Choice:
    """One question as ids: a context and the endings to choose from."""

    context: tuple[int, ...]
    endings: tuple[tuple[int, ...], ...]
    characters: tuple[int, ...]
    """Number of characters of each ending, without the space before it."""
    answer: int
    """Index of the correct ending."""
    leads: tuple[tuple[int, ...], ...] = ()
    """Ids between the context and each ending, which are read but not scored; () if there are none."""

    def branch(self, index: int) -> tuple[int, ...]:
        """The ids after the context: the lead, if there is one, and the ending."""
        return (self.leads[index] if self.leads else ()) + self.endings[index]

    def predict(self, nats: Sequence[float], metric: str) -> int:
        """Index of the most likely ending by one of ACCURACIES; the first of equals."""
        lengths: Sequence[int] = [1] * len(nats)
        if metric == "accuracy_per_token":
            lengths = [len(ending) for ending in self.endings]
        elif metric == "accuracy_per_character":
            lengths = self.characters
        means = [each / length for each, length in zip(nats, lengths, strict=True)]
        return means.index(min(means))


@dataclass(frozen=True)
class PackedQuestion:
    """A row: a context and some of its branches."""

    context: tuple[int, ...]
    branches: tuple[Passage, ...]
    """Leads and endings, of which the endings are scored."""

    @property
    def parts(self) -> list[tuple[int, ...]]:
        """The ids after the context: the branches without their last ids, which are only targets."""
        return [tuple(branch.ids[:-1]) for branch in self.branches]

    def __len__(self) -> int:
        return len(self.context) + sum(map(len, self.parts))


class TreeMask:
    """Positions and attention mask of packed rows, as the model's cache protocol."""

    def __init__(self, rows: Sequence[PackedQuestion], length: int, device: torch.device) -> None:
        positions = torch.zeros(len(rows), length, dtype=torch.long)
        branches = torch.full((len(rows), length), -1)  # padding attends only to padding
        for number, row in enumerate(rows):
            end = len(row.context)
            positions[number, :end] = torch.arange(end)
            branches[number, :end] = 0
            for branch, part in enumerate(row.parts, start=1):
                start, end = end, end + len(part)
                positions[number, start:end] = len(row.context) + torch.arange(len(part))
                branches[number, start:end] = branch
        self._positions_BT, branches_BT = positions.to(device), branches.to(device)
        same = branches_BT[:, :, None] == branches_BT[:, None, :]
        of_context = (branches_BT == 0)[:, None, :] & (branches_BT > 0)[:, :, None]
        causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        self._mask = ((same | of_context) & causal)[:, None]

    def positions(self, length: int) -> Tensor:
        """(B, T): an ending's positions continue its context's."""
        return self._positions_BT[:, :length]

    def append(self, _layer: int, k_BHTD: Tensor, v_BHTD: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Stores nothing; the mask is bool (B, 1, T, T)."""
        return k_BHTD, v_BHTD, self._mask


@torch.no_grad()
def evaluate_choices(
    model: GPT, choices: Sequence[Choice], precision: str = "fp32", world: World = SINGLE_PROCESS
) -> Iterator[tuple[int, tuple[float, ...]]]:
    """Yield (index, nats of each ending) of every question, in batches of similar length.

    The first ids of a context that is too long for the model are dropped. Questions are divided among the
    processes of `world`, each of which yields its own. Raises ValueError for an ending that leaves no room
    for an id before it.
    """
    packed = [
        pack_question(index, choice, model.config.context_length) for index, choice in enumerate(choices)
    ]
    device = model.wte.weight.device.type
    tokens, ids_at_once, multiple = TOKENS_AT_ONCE, IDS_AT_ONCE, 1
    if device != "cpu":
        tokens, ids_at_once, multiple = GPU_TOKENS_AT_ONCE, model.vocab_size, GPU_LENGTH_MULTIPLE
    sizes = [(len(rows), max(map(len, rows))) for rows in packed]
    batches = list(batches_by_length(sizes, tokens, multiple))
    with eval_mode(model), autocast(device, precision):
        for batch in batches[world.rank :: world.size]:
            rows = [row for index in batch for row in packed[index]]
            nats = iter(_evaluate_rows(rows, model, ids_at_once, multiple))
            for index in batch:
                yield index, tuple(islice(nats, len(choices[index].endings)))


def pack_question(index: int, choice: Choice, context_length: int) -> list[PackedQuestion]:
    """The rows of a question: one, or several with some of its endings each if one would be too long.

    The context is cut on the left so that it fits with the longest ending.
    """
    branches = [Passage(choice.branch(number), len(each)) for number, each in enumerate(choice.endings)]
    longest = max(len(branch.ids) for branch in branches) - 1
    if longest >= context_length or not choice.context or not all(choice.endings):
        raise ValueError(
            f"question {index + 1}, with {len(choice.context)} tokens before endings of "
            f"{', '.join(str(len(ending)) for ending in choice.endings)}, does not fit the model's context "
            f"of {context_length}"
        )
    context = choice.context[-(context_length - longest) :]
    rows = [PackedQuestion(context, (branches[0],))]
    for branch in branches[1:]:
        extended = PackedQuestion(context, (*rows[-1].branches, branch))
        if len(extended) <= context_length:
            rows[-1] = extended
        else:
            rows.append(PackedQuestion(context, (branch,)))
    return rows


def _evaluate_rows(
    rows: Sequence[PackedQuestion], model: GPT, ids_at_once: int, multiple: int
) -> list[float]:
    """The nats of each ending, in the order of the rows and their branches."""
    device = model.wte.weight.device
    T = min(padded(max(map(len, rows)), multiple), model.config.context_length)
    ids_BT = torch.zeros(len(rows), T, dtype=torch.long)
    numbers: dict[int, int] = {}  # flat position -> number, of the N positions that predict a target
    predicting: list[int] = []  # that number for each of the M targets; a context's end predicts several
    targets: list[int] = []
    lengths: list[int] = []  # of the endings
    for number, row in enumerate(rows):
        ids = [*row.context, *(token for part in row.parts for token in part)]
        ids_BT[number, : len(row)] = torch.tensor(ids)
        start = number * T + len(row.context)
        for branch, part in zip(row.branches, row.parts, strict=True):
            # The first id of a branch is predicted by the last id of the context.
            positions = [number * T + len(row.context) - 1, *range(start, start + len(part))]
            predicting += [numbers.setdefault(each, len(numbers)) for each in positions[-branch.scored :]]
            targets += branch.ids[-branch.scored :]
            lengths.append(branch.scored)
            start += len(part)
    hidden_BTC = model.trunk(ids_BT.to(device), TreeMask(rows, T, device))
    hidden_NC = hidden_BTC.flatten(0, 1)[torch.tensor(list(numbers), device=device)]
    predicting_M, targets_M = torch.tensor(predicting, device=device), torch.tensor(targets, device=device)
    nats_M = _target_nats(hidden_NC, predicting_M, targets_M, model, ids_at_once).cpu().double()
    return [part.sum().item() for part in torch.split(nats_M, lengths)]


def _target_nats(
    hidden_NC: Tensor, predicting_M: Tensor, targets_M: Tensor, model: GPT, ids_at_once: int
) -> Tensor:
    """Nats of each target, float32 (M,), over `ids_at_once` ids of the vocabulary at a time."""
    logsums = []
    logits_M = hidden_NC.new_zeros(len(targets_M), dtype=torch.float32)
    for first in range(0, model.vocab_size, ids_at_once):
        weight = model.lm_head.weight[first : min(first + ids_at_once, model.vocab_size)]
        logits_NV = soft_cap(F.linear(hidden_NC, weight).float(), model.config.logit_softcap)
        logsums.append(logits_NV.logsumexp(-1))
        ids_M = targets_M - first
        found_M = logits_NV[predicting_M, ids_M.clamp(0, len(weight) - 1)]
        logits_M = torch.where((ids_M >= 0) & (ids_M < len(weight)), found_M, logits_M)
    return torch.stack(logsums).logsumexp(0)[predicting_M] - logits_M
