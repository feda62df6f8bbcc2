"""Multiple choice: the nats of each ending after its context, the context read once for all of its endings.

Shapes: Q questions, E endings of each, P positions of a context, R of an ending, B = Q x E rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from overnight.model.gpt import GPT, evaluating
from overnight.parallel import autocast
from overnight.world import ALONE, World

TOKENS_AT_ONCE = 4096  # of contexts and of endings, padding included
LOGITS_AT_ONCE = 1024  # positions: all logits of a batch would take a gigabyte
SHAPE = 8  # lengths are padded to multiples of this, so that shapes come again


@dataclass(frozen=True)
class Choice:
    """One question as ids: which of the endings follows the context."""

    context: tuple[int, ...]
    endings: tuple[tuple[int, ...], ...]
    characters: tuple[int, ...]
    """Of each ending's text, the blank before it not counted."""
    answer: int
    """The number of the right ending."""


@dataclass(frozen=True)
class Judged:
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


class ContextMemory:
    """Keys and values of the contexts, lent to their endings: the model's cache protocol in two calls."""

    def __init__(self, contexts_Q: Tensor, endings: int, context_length: int) -> None:
        self._contexts_Q, self._endings, self._last = contexts_Q, endings, context_length - 1
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._mask: Tensor | None = None
        self._is_read = False

    def begin_endings(self) -> None:
        """From now on, rows are endings."""
        self._is_read = True

    def positions(self, length: int) -> Tensor:
        """Positions (T,) of contexts, (B, T) of endings, which go on where their contexts end."""
        places_T = torch.arange(length, device=self._contexts_Q.device)
        if not self._is_read:
            return places_T
        contexts_B = self._contexts_Q.repeat_interleave(self._endings)
        return (contexts_B[:, None] + places_T).clamp(max=self._last)  # beyond it there is only padding

    def append(self, layer: int, k_BHTD: Tensor, v_BHTD: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keep a context's; put them before an ending's."""
        if not self._is_read:
            self._kept[layer] = k_BHTD, v_BHTD
            return k_BHTD, v_BHTD, None
        before = (kept.repeat_interleave(self._endings, 0) for kept in self._kept[layer])
        k, v = (torch.cat([old, new], 2) for old, new in zip(before, (k_BHTD, v_BHTD), strict=True))
        if self._mask is None:
            self._mask = self._visible(k.shape[2] - k_BHTD.shape[2], k_BHTD.shape[2])
        return k, v, self._mask

    def _visible(self, context: int, ending: int) -> Tensor:
        """Who may look at whom, bool (B, 1, R, P + R): at all of the context, and back in the ending."""
        device = self._contexts_Q.device
        contexts_B = self._contexts_Q.repeat_interleave(self._endings)
        of_context = torch.arange(context, device=device) < contexts_B[:, None, None]
        of_ending = torch.ones(ending, ending, dtype=torch.bool, device=device).tril()
        rows = len(contexts_B)
        parts = (of_context.expand(rows, ending, context), of_ending.expand(rows, ending, ending))
        return torch.cat(parts, 2)[:, None]


@torch.no_grad()
def judge_choices(
    model: GPT, choices: Sequence[Choice], precision: str = "fp32", world: World = ALONE
) -> Iterator[Judged]:
    """Every question judged, in batches of questions that are about as long, not in their order.

    The first tokens of a context that is too long for the model are left out. Questions are divided among
    the processes of `world`, each of which yields its own. Raises ValueError for an ending that leaves no
    room for a token before it.
    """
    cut = [_fit(choice, model.config.context_length) for choice in choices]
    order = sorted(range(len(cut)), key=lambda place: (_shape(cut[place]), place))
    with evaluating(model), autocast(model.wte.weight.device.type, precision):
        for batch in list(_batches(cut, order))[world.rank :: world.size]:
            nats = _judge([cut[place] for place in batch], model)
            yield from (Judged(each, choices[place]) for each, place in zip(nats, batch, strict=True))


def _fit(choice: Choice, context_length: int) -> Choice:
    """The question with as much of its context as the model can read beside the longest ending."""
    room = context_length - max(map(len, choice.endings)) + 1  # the last token of an ending is only a target
    if room < 1 or not choice.context or not all(choice.endings):
        raise ValueError(
            f"a question with {len(choice.context)} tokens before endings of "
            f"{', '.join(str(len(ending)) for ending in choice.endings)} does not fit the model's context of "
            f"{context_length}"
        )
    return Choice(choice.context[-room:], choice.endings, choice.characters, choice.answer)


def _shape(choice: Choice) -> tuple[int, int, int]:
    """(endings, positions of the context, of the longest ending), lengths padded."""
    longest = max(map(len, choice.endings))
    return len(choice.endings), _padded(len(choice.context)), _padded(longest)


def _padded(length: int) -> int:
    return -(-length // SHAPE) * SHAPE


def _batches(choices: Sequence[Choice], order: Sequence[int]) -> Iterator[list[int]]:
    """Neighbours in `order` with as many endings, so many that neither pass has too many tokens."""
    batch: list[int] = []
    for place in order:
        endings, context, ending = _shape(choices[place])
        alike = not batch or len(choices[batch[0]].endings) == endings
        longest = max([ending, *(_shape(choices[each])[2] for each in batch)])
        if batch and (not alike or (len(batch) + 1) * max(context, endings * longest) > TOKENS_AT_ONCE):
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def _judge(choices: Sequence[Choice], model: GPT) -> list[tuple[float, ...]]:
    device = model.wte.weight.device
    E = len(choices[0].endings)
    contexts_QP = _rows([choice.context for choice in choices], device)
    endings_BR = _rows([ending for choice in choices for ending in choice.endings], device)
    contexts_Q = torch.tensor([len(choice.context) for choice in choices], device=device)
    endings_B = torch.tensor([len(each) for choice in choices for each in choice.endings], device=device)
    memory = ContextMemory(contexts_Q, E, model.config.context_length)
    hidden_QPC = model.trunk(contexts_QP, memory)
    last_QC = hidden_QPC[torch.arange(len(choices), device=device), contexts_Q - 1]
    hidden_BRC = last_QC.repeat_interleave(E, 0)[:, None]
    if endings_BR.shape[1] > 1:
        memory.begin_endings()
        hidden_BRC = torch.cat([hidden_BRC, model.trunk(endings_BR[:, :-1], memory)], 1)
    counted_BR = torch.arange(endings_BR.shape[1], device=device) < endings_B[:, None]
    hidden_NC, targets_N = hidden_BRC[counted_BR], endings_BR[counted_BR]  # nowhere but where a token counts
    pieces = zip(*(torch.split(each, LOGITS_AT_ONCE) for each in (hidden_NC, targets_N)), strict=True)
    nats = [F.cross_entropy(model.head(each).float(), ids, reduction="none") for each, ids in pieces]
    nats_BR = torch.zeros(counted_BR.shape, device=device)
    nats_BR[counted_BR] = torch.cat(nats)
    return [tuple(row) for row in nats_BR.cpu().double().sum(1).view(-1, E).tolist()]


def _rows(sequences: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """One below the other, padded on the right with any id: it is seen by nothing that counts."""
    longest = _padded(max(map(len, sequences)))
    return torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in sequences], device=device)
