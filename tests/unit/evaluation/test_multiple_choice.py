"""Endings judged together are endings judged one by one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from overnight.distributed.world import World
from overnight.evaluation import multiple_choice
from overnight.evaluation.multiple_choice import Choice, evaluate_choices, pack_question
from overnight.model.gpt import GPT, initialize
from overnight.model.model_config import ModelConfig

CONTEXT = 48
IDS = st.integers(0, 96)


@pytest.fixture(scope="module")
def model() -> GPT:
    """Small, with weights large enough for endings to differ."""
    found = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=32, context_length=CONTEXT, vocab_size=97))
    initialize(found, seed=0)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.mul_(4)
    return found


def one_by_one(model: GPT, choice: Choice) -> list[float]:
    """As a script would have it: each ending after its context in a row of its own, every logit computed."""
    room = CONTEXT + 1 - max(len(choice.branch(number)) for number in range(len(choice.endings)))
    found = []
    for ending, lead in zip(choice.endings, choice.leads or [()] * len(choice.endings), strict=True):
        context = [*choice.context[-room:], *lead]
        row = torch.tensor([[*context, *ending]])
        logits = model.eval()(row[:, :-1])[0, len(context) - 1 :]
        found.append(F.cross_entropy(logits, row[0, len(context) :], reduction="sum").item())
    return found


sequences = st.lists(IDS, min_size=1, max_size=20).map(tuple)
questions = st.builds(
    lambda context, endings, answer, leads: Choice(
        tuple(context),
        tuple(endings),
        tuple(3 * len(each) for each in endings),
        answer % len(endings),
        tuple(map(tuple, leads[: len(endings)])),
    ),
    st.lists(IDS, min_size=1, max_size=60),
    st.lists(sequences, min_size=2, max_size=5),
    st.integers(0, 4),
    st.just([]) | st.lists(st.lists(IDS, max_size=4), min_size=5, max_size=5),
)


@settings(deadline=None, max_examples=40)
@given(
    asked=st.lists(questions, min_size=1, max_size=12),
    at_once=st.sampled_from([1, 200, 4096]),
    ids=st.sampled_from([10, 97, 2048]),
)
@torch.no_grad()
def test_together_is_one_by_one(model: GPT, asked: list[Choice], at_once: int, ids: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multiple_choice, "TOKENS_AT_ONCE", at_once)
        patch.setattr(multiple_choice, "IDS_AT_ONCE", ids)
        judged = dict(evaluate_choices(model, asked))
    assert sorted(judged) == list(range(len(asked)))
    for place, choice in enumerate(asked):
        assert judged[place].choice is choice
        assert judged[place].nats == pytest.approx(one_by_one(model, choice), rel=1e-5, abs=1e-5)


def test_the_three_accuracies_differ_as_they_should() -> None:
    choice = Choice((1,), ((2,), (3, 4), (5, 6, 7)), (10, 9, 30), answer=2)
    judged = multiple_choice.ChoiceResult((1.0, 2.2, 2.7), choice)
    assert judged.likeliest([1, 1, 1]) == 0
    assert judged.likeliest([1, 2, 3]) == 2
    assert (judged.by_sum, judged.by_token, judged.by_character) == (False, True, True)


def test_processes_divide_the_questions(model: GPT) -> None:
    asked = [Choice((1,) * length, ((2, 3), (4,)), (1, 1), 0) for length in range(1, 40)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multiple_choice, "TOKENS_AT_ONCE", 100)
        whole = dict(evaluate_choices(model, asked))
        shares = [dict(evaluate_choices(model, asked, world=World(rank, 3, "cpu"))) for rank in range(3)]
    assert all(shares)
    assert shares[0] | shares[1] | shares[2] == whole
    assert sum(map(len, shares)) == len(whole)


def test_what_does_not_fit_is_refused(model: GPT) -> None:
    with pytest.raises(ValueError, match="does not fit the model's context of 48"):
        list(evaluate_choices(model, [Choice((1,), ((2,) * 49, (3,)), (1, 1), 0)]))
    fitting = Choice((1,) * 60, ((2,) * 48, (3,)), (1, 1), 0)
    ((_, judged),) = evaluate_choices(model, [fitting])
    assert judged.nats == pytest.approx(one_by_one(model, fitting), rel=1e-5)


@torch.no_grad()
def test_a_gpu_s_portions_come_to_the_same(model: GPT) -> None:
    asked = [Choice((1,) * length, ((2, 3, 96), (4,)), (1, 1), 0) for length in range(1, 30)]
    trees = [tree for place, choice in enumerate(asked) for tree in pack_question(place, choice, CONTEXT)]
    cut = multiple_choice._judge(trees, model, multiple_choice.BatchLimits(100, 10, 1))
    whole = multiple_choice._judge(trees, model, multiple_choice.BatchLimits(8192, 97, 8))
    assert cut.keys() == whole.keys()
    assert [cut[key] for key in whole] == pytest.approx(list(whole.values()), rel=1e-5)


@torch.no_grad()
def test_blocks_of_the_vocabulary_are_the_whole_of_it(model: GPT) -> None:
    hidden = torch.linspace(-2, 2, 64).view(2, 32)
    asked = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 9, 10, 96])
    expected = -model.head(hidden).log_softmax(-1)[asked]
    for at_once in (1, 10, 97, 1000):
        assert multiple_choice._nats(hidden, model, asked, at_once).tolist() == pytest.approx(
            expected.tolist()
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            model, "vocab_size", 90
        )  # the control: ids that are left out take their probability along
        assert multiple_choice._nats(hidden, model, asked, 10)[0] < expected[0] - 1e-3
