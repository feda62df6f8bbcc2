"""Passages judged together are passages judged one by one; windows judge each id exactly once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from overnight.distributed.world import World
from overnight.evaluation import passages
from overnight.evaluation.passages import Passage, cut_windows, evaluate_passages
from overnight.model.gpt import GPT, initialize
from overnight.model.model_config import ModelConfig

CONTEXT = 32


@pytest.fixture(scope="module")
def model() -> GPT:
    """Small, with weights large enough for ids to differ; 97 ids in a padded head of 128."""
    found = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=32, context_length=CONTEXT, vocab_size=97))
    initialize(found, seed=0)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.mul_(4)
        found.wte.weight[97:] = found.wte.weight[:31]  # padding that would be likely, were it not masked
    return found


def one_by_one(model: GPT, passage: Passage) -> tuple[float, bool]:
    """As a script would have it: one row, every logit."""
    row = torch.tensor([list(passage.ids)])
    logits = model.eval()(row[:, :-1])[0, -passage.scored :]
    targets = row[0, -passage.scored :]
    nats = F.cross_entropy(logits, targets, reduction="sum").item()
    return nats, bool((logits.argmax(-1) == targets).all())


rows = st.lists(st.integers(0, 96), min_size=2, max_size=CONTEXT + 1)
asked = st.lists(
    rows.flatmap(lambda ids: st.builds(Passage, st.just(ids), st.integers(1, len(ids) - 1))),
    min_size=1,
    max_size=12,
)


@settings(deadline=None, max_examples=40)
@given(asked=asked, at_once=st.sampled_from([1, 100, 8192]), logits=st.sampled_from([3, 1024]))
@torch.no_grad()
def test_together_is_one_by_one(model: GPT, asked: list[Passage], at_once: int, logits: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passages, "TOKENS_AT_ONCE", at_once)
        patch.setattr(passages, "LOGITS_AT_ONCE", logits)
        found = dict(evaluate_passages(model, asked))
    assert sorted(found) == list(range(len(asked)))
    for place, passage in enumerate(asked):
        nats, is_greedy = one_by_one(model, passage)
        assert found[place].nats == pytest.approx(nats, rel=1e-5, abs=1e-5)
        assert found[place].is_greedy == is_greedy


@torch.no_grad()
def test_what_greedy_decoding_writes_is_greedy_and_nothing_else(model: GPT) -> None:
    ids = [5, 6, 7]
    for _ in range(4):
        ids.append(int(model.eval()(torch.tensor([ids]))[0, -1].argmax()))
    other = [*ids[:-1], (ids[-1] + 1) % 97]
    found = dict(evaluate_passages(model, [Passage(ids, 4), Passage(other, 4), Passage(other, 1)]))
    assert [found[place].is_greedy for place in range(3)] == [True, False, False]


def test_processes_divide_the_passages(model: GPT) -> None:
    asked = [Passage([1] * length, 1) for length in range(2, 30)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passages, "TOKENS_AT_ONCE", 64)
        whole = dict(evaluate_passages(model, asked))
        shares = [dict(evaluate_passages(model, asked, world=World(rank, 3, "cpu"))) for rank in range(3)]
    assert all(shares)
    assert shares[0] | shares[1] | shares[2] == whole
    assert sum(map(len, shares)) == len(whole)


@pytest.mark.parametrize("ids, scored", [([1] * 34, 1), ([1, 2], 2), ([1], 1), ([1, 2], 0)])
def test_what_does_not_fit_is_refused(model: GPT, ids: list[int], scored: int) -> None:
    with pytest.raises(ValueError, match="does not fit the model's context of 32"):
        list(evaluate_passages(model, [Passage([1, 2], 1), Passage(ids, scored)]))


@given(count=st.integers(1, 200), context=st.integers(1, 40), stride=st.none() | st.integers(1, 40))
def test_every_id_but_the_first_is_judged_once(count: int, context: int, stride: int | None) -> None:
    ids = np.arange(count)
    if stride is not None and stride > context:
        with pytest.raises(ValueError, match="must be at least 1 and at most the context"):
            list(cut_windows(ids, context, stride))
        return
    windows = list(cut_windows(ids, context, stride))
    judged = [int(each) for window in windows for each in window.ids[-window.scored :]]
    assert judged == list(range(1, count))
    assert all(len(window.ids) == min(count, context + 1) for window in windows[1:])
    if stride is not None:
        assert all(window.scored <= stride for window in windows[1:])


def test_a_stride_lets_more_stand_before_each_id(model: GPT) -> None:
    ids = np.random.default_rng(0).integers(0, 97, 200)
    whole = {stride: list(cut_windows(ids, CONTEXT, stride)) for stride in (None, 8)}
    least = {
        stride: min(len(window.ids) - window.scored for window in windows[1:])
        for stride, windows in whole.items()
    }
    assert least == {None: 1, 8: CONTEXT + 1 - 8}
