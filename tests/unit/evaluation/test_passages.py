"""Passages evaluated together against passages evaluated one by one; windows over texts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from overnight.distributed.world import World
from overnight.evaluation import multiple_choice
from overnight.evaluation import passages as passages_module
from overnight.evaluation.multiple_choice import Choice
from overnight.evaluation.passages import Passage, cut_windows, evaluate_passages
from overnight.evaluation.scores import Example
from overnight.evaluation.tasks import evaluate_task
from overnight.model.gpt import GPT

CONTEXT = 48


def naive(model: GPT, passage: Passage) -> tuple[float, bool]:
    """One row, every logit computed."""
    row = torch.tensor([list(passage.ids)])
    logits = model.eval()(row[:, :-1])[0, -passage.scored :]
    targets = row[0, -passage.scored :]
    nats = F.cross_entropy(logits, targets, reduction="sum").item()
    return nats, bool((logits.argmax(-1) == targets).all())


@torch.no_grad()
def greedy(model: GPT, ids: list[int]) -> list[int]:
    """The ids, and the three that greedy decoding writes after them."""
    for _ in range(3):
        ids = [*ids, int(model.eval()(torch.tensor([ids]))[0, -1].argmax())]
    return ids


rows = st.lists(st.integers(0, 96), min_size=2, max_size=CONTEXT + 1)
passages = rows.flatmap(lambda ids: st.builds(Passage, st.just(ids), st.integers(1, len(ids) - 1)))


@settings(deadline=None, max_examples=40)
@given(
    given_passages=st.lists(passages, min_size=1, max_size=12),
    tokens=st.sampled_from([1, 100, 8192]),
    logits=st.sampled_from([3, 1024]),
)
@torch.no_grad()
def test_batched_passages_match_naive(
    model: GPT, given_passages: list[Passage], tokens: int, logits: int
) -> None:
    written = greedy(model, [5, 6, 7])
    given_passages += [Passage(written, 3), Passage([*written[:-1], (written[-1] + 1) % 97], 3)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passages_module, "TOKENS_AT_ONCE", tokens)
        patch.setattr(passages_module, "LOGITS_AT_ONCE", logits)
        found = dict(evaluate_passages(model, given_passages))
    assert sorted(found) == list(range(len(given_passages)))
    for index, passage in enumerate(given_passages):
        nats, is_greedy = naive(model, passage)
        assert found[index].nats == pytest.approx(nats, rel=1e-5, abs=1e-5)
        assert found[index].is_greedy == is_greedy
    assert [each.is_greedy for _, each in sorted(found.items())][-2:] == [True, False]


PASSAGES = [Passage([1] * length, 1) for length in range(2, 30)]
CHOICES = [Choice((1,) * length, ((2, 3), (4,)), (1, 1), 0) for length in range(1, 40)]


@pytest.mark.parametrize("examples", [PASSAGES, CHOICES])
def test_processes_divide_examples(
    model: GPT, monkeypatch: pytest.MonkeyPatch, examples: list[Example]
) -> None:
    monkeypatch.setattr(passages_module, "TOKENS_AT_ONCE", 64)
    monkeypatch.setattr(multiple_choice, "TOKENS_AT_ONCE", 100)
    whole = dict(evaluate_task(model, examples, "fp32"))
    shares = [dict(evaluate_task(model, examples, "fp32", World(rank, 3, "cpu"))) for rank in range(3)]
    assert all(shares)
    assert shares[0] | shares[1] | shares[2] == whole
    assert sum(map(len, shares)) == len(whole)


@pytest.mark.parametrize("ids, scored", [([1] * 50, 1), ([1, 2], 2), ([1], 1), ([1, 2], 0)])
def test_invalid_passage_is_refused(model: GPT, ids: list[int], scored: int) -> None:
    with pytest.raises(ValueError, match="passage .*48"):
        list(evaluate_passages(model, [Passage([1, 2], 1), Passage(ids, scored)]))


@given(count=st.integers(1, 200), context=st.integers(1, 40), stride=st.none() | st.integers(1, 40))
def test_windows_target_every_id_once(count: int, context: int, stride: int | None) -> None:
    if stride is not None and stride > context:
        with pytest.raises(ValueError, match="stride"):
            list(cut_windows(np.arange(count), context, stride))
        return
    windows = list(cut_windows(np.arange(count), context, stride))
    targets = [int(each) for window in windows for each in window.ids[-window.scored :]]
    assert targets == list(range(1, count))
    for window in windows[1:]:
        assert len(window.ids) == min(count, context + 1)
        assert window.scored <= (stride or context)
        assert len(window.ids) - window.scored >= min(count, context + 1) - (stride or context)
