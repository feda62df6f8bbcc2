"""Endings evaluated together against endings evaluated one by one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from overnight.evaluation import multiple_choice
from overnight.evaluation.multiple_choice import ACCURACIES, Choice, evaluate_choices, pack_question
from overnight.model.gpt import GPT

CONTEXT = 48
IDS = st.integers(0, 96)


@torch.no_grad()
def naive(model: GPT, choice: Choice) -> list[float]:
    """Each ending after its context in a row of its own, every logit computed."""
    room = CONTEXT + 1 - max(len(choice.branch(index)) for index in range(len(choice.endings)))
    found = []
    for ending, lead in zip(choice.endings, choice.leads or [()] * len(choice.endings), strict=True):
        context = [*choice.context[-room:], *lead]
        row = torch.tensor([[*context, *ending]])
        logits = model.eval()(row[:, :-1])[0, len(context) - 1 :]
        found.append(F.cross_entropy(logits, row[0, len(context) :], reduction="sum").item())
    return found


sequences = st.lists(IDS, min_size=1, max_size=20).map(tuple)
questions = st.builds(
    lambda context, endings, leads: Choice(
        tuple(context), tuple(endings), (1,) * len(endings), 0, tuple(map(tuple, leads[: len(endings)]))
    ),
    st.lists(IDS, min_size=1, max_size=60),
    st.lists(sequences, min_size=2, max_size=5),
    st.just([]) | st.lists(st.lists(IDS, max_size=4), min_size=5, max_size=5),
)


@settings(deadline=None, max_examples=40)
@given(
    choices=st.lists(questions, min_size=1, max_size=12),
    tokens=st.sampled_from([1, 200, 4096]),
    ids=st.sampled_from([10, 97, 2048]),
)
def test_batched_choices_match_naive(model: GPT, choices: list[Choice], tokens: int, ids: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multiple_choice, "TOKENS_AT_ONCE", tokens)
        patch.setattr(multiple_choice, "IDS_AT_ONCE", ids)
        results = dict(evaluate_choices(model, choices))
    assert sorted(results) == list(range(len(choices)))
    for index, choice in enumerate(choices):
        assert results[index] == pytest.approx(naive(model, choice), rel=1e-5, abs=1e-5)


def test_accuracies_predict_by_length() -> None:
    choice = Choice((1,), ((2,), (3, 4), (5, 6, 7)), (10, 9, 30), answer=2)
    predicted = {metric: choice.predict((1.0, 2.2, 2.7), metric) for metric in ACCURACIES}
    assert predicted == {"accuracy_per_token": 2, "accuracy_per_character": 2, "accuracy_by_sum": 0}


def test_too_long_ending_is_refused(model: GPT) -> None:
    with pytest.raises(ValueError, match="question 1.*48"):
        list(evaluate_choices(model, [Choice((1,), ((2,) * 49, (3,)), (1, 1), 0)]))
    fitting = Choice((1,) * 60, ((2,) * 48, (3,)), (1, 1), 0)
    ((_, nats),) = evaluate_choices(model, [fitting])
    assert nats == pytest.approx(naive(model, fitting), rel=1e-5)


@torch.no_grad()
def test_gpu_batch_limits_give_same_nats(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    choices = [Choice((1,) * length, ((2, 3, 96), (4,)), (1, 1), 0) for length in range(1, 30)]
    rows = [row for index, choice in enumerate(choices) for row in pack_question(index, choice, CONTEXT)]
    small = multiple_choice._evaluate_rows(rows, model, 10, 1)
    assert small == pytest.approx(multiple_choice._evaluate_rows(rows, model, 97, 8), rel=1e-5)
    monkeypatch.setattr(model, "vocab_size", 90)  # the negative control: some ids are left out
    assert multiple_choice._evaluate_rows(rows, model, 10, 1)[0, 1] < small[0, 1] - 1e-3
