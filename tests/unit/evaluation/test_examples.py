"""Questions and passages evaluated together against one by one; windows over texts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from overnight.distributed.world import World
from overnight.evaluation import multiple_choice, passages
from overnight.evaluation.multiple_choice import ACCURACIES, Choice, evaluate_choices, pack_question
from overnight.evaluation.passages import Passage, cut_windows, evaluate_passages
from overnight.evaluation.scores import Example
from overnight.evaluation.tasks import evaluate_task
from overnight.model.gpt import GPT, initialize
from overnight.model.model_config import ModelConfig

CONTEXT, VOCABULARY = 48, 97


def build_model() -> GPT:
    """97 ids in an embedding of 128 rows; weights large enough for ids to differ."""
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32}
    found = GPT(ModelConfig(**sizes, context_length=CONTEXT, vocab_size=VOCABULARY))
    initialize(found, seed=0)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.mul_(4)
        found.wte.weight[97:] = found.wte.weight[:31]  # likely ids, if padding were not excluded
    return found.eval()


MODEL = build_model()


@torch.no_grad()
def naive(context: Sequence[int], ending: Sequence[int]) -> tuple[float, bool]:
    """Nats of an ending after its context, and whether it is greedy: one row, every logit computed."""
    row = torch.tensor([[*context, *ending]])
    logits, targets = MODEL(row[:, :-1])[0, -len(ending) :], row[0, -len(ending) :]
    nats = F.cross_entropy(logits, targets, reduction="sum").item()
    return nats, bool((logits.argmax(-1) == targets).all())


def naive_choice(choice: Choice) -> list[float]:
    """Each ending after its context in a row of its own."""
    room = CONTEXT + 1 - max(len(choice.branch(index)) for index in range(len(choice.endings)))
    leads = choice.leads or [()] * len(choice.endings)
    pairs = zip(leads, choice.endings, strict=True)
    return [naive([*choice.context[-room:], *lead], ending)[0] for lead, ending in pairs]


def simple_choice(context: Sequence[int], *endings: tuple[int, ...]) -> Choice:
    return Choice(tuple(context), endings, (1,) * len(endings), answer=0)


IDS = st.integers(0, VOCABULARY - 1)
ENDINGS = st.lists(st.lists(IDS, min_size=1, max_size=20).map(tuple), min_size=2, max_size=5)
QUESTIONS = st.builds(
    lambda context, endings, leads: Choice(
        tuple(context), tuple(endings), (1,) * len(endings), 0, tuple(map(tuple, leads[: len(endings)]))
    ),
    st.lists(IDS, min_size=1, max_size=60),
    ENDINGS,
    st.just([]) | st.lists(st.lists(IDS, max_size=4), min_size=5, max_size=5),
)


@settings(deadline=None, max_examples=40)
@given(
    choices=st.lists(QUESTIONS, min_size=1, max_size=12),
    tokens=st.sampled_from([1, 200, 4096]),
    ids=st.sampled_from([10, VOCABULARY, 2048]),
)
def test_batched_choices_match_naive(choices: list[Choice], tokens: int, ids: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multiple_choice, "TOKENS_AT_ONCE", tokens)
        patch.setattr(multiple_choice, "IDS_AT_ONCE", ids)
        results = dict(evaluate_choices(MODEL, choices))
    assert sorted(results) == list(range(len(choices)))
    for index, choice in enumerate(choices):
        assert results[index] == pytest.approx(naive_choice(choice), rel=1e-5, abs=1e-5)


@torch.no_grad()
def test_gpu_batch_limits_give_same_nats(monkeypatch: pytest.MonkeyPatch) -> None:
    choices = [simple_choice([1] * length, (2, 3, 96), (4,)) for length in range(1, 30)]
    rows = [row for index, choice in enumerate(choices) for row in pack_question(index, choice, CONTEXT)]
    small = multiple_choice._evaluate_rows(rows, MODEL, 10, 1)
    assert small == pytest.approx(multiple_choice._evaluate_rows(rows, MODEL, VOCABULARY, 8), rel=1e-5)
    monkeypatch.setattr(MODEL, "vocab_size", 90)  # the negative control: some ids are left out
    assert multiple_choice._evaluate_rows(rows, MODEL, 10, 1)[1] < small[1] - 1e-3


def test_accuracies_predict_by_length() -> None:
    choice = Choice((1,), ((2,), (3, 4), (5, 6, 7)), (10, 9, 30), answer=2)
    predicted = {metric: choice.predict((1.0, 2.2, 2.7), metric) for metric in ACCURACIES}
    assert predicted == {"accuracy_per_token": 2, "accuracy_per_character": 2, "accuracy_by_sum": 0}


def test_too_long_ending_is_refused() -> None:
    with pytest.raises(ValueError, match="question 1.*48"):
        list(evaluate_choices(MODEL, [simple_choice([1], (2,) * 49, (3,))]))
    fitting = simple_choice([1] * 60, (2,) * 48, (3,))
    ((_, nats),) = evaluate_choices(MODEL, [fitting])
    assert nats == pytest.approx(naive_choice(fitting), rel=1e-5)


ROWS = st.lists(IDS, min_size=2, max_size=CONTEXT + 1)
PASSAGES = ROWS.flatmap(lambda ids: st.builds(Passage, st.just(ids), st.integers(1, len(ids) - 1)))


@settings(deadline=None, max_examples=40)
@given(
    given_passages=st.lists(PASSAGES, min_size=1, max_size=12),
    tokens=st.sampled_from([1, 100, 8192]),
    logits=st.sampled_from([3, 1024]),
)
def test_batched_passages_match_naive(given_passages: list[Passage], tokens: int, logits: int) -> None:
    written = [5, 6, 7]
    for _ in range(3):
        written.append(int(MODEL(torch.tensor([written]))[0, -1].argmax()))
    given_passages += [Passage(written, 3), Passage([*written[:-1], (written[-1] + 1) % VOCABULARY], 3)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passages, "TOKENS_AT_ONCE", tokens)
        patch.setattr(passages, "LOGITS_AT_ONCE", logits)
        found = dict(evaluate_passages(MODEL, given_passages))
    assert sorted(found) == list(range(len(given_passages)))
    for index, passage in enumerate(given_passages):
        nats, is_greedy = naive(passage.ids[: -passage.scored], passage.ids[-passage.scored :])  # type: ignore[arg-type]
        assert found[index] == (pytest.approx(nats, rel=1e-5, abs=1e-5), is_greedy)
    assert [each.is_greedy for _, each in sorted(found.items())][-2:] == [True, False]


@pytest.mark.parametrize(
    "examples",
    [
        [Passage([1] * length, 1) for length in range(2, 30)],
        [simple_choice([1] * length, (2, 3), (4,)) for length in range(1, 40)],
    ],
)
def test_processes_divide_examples(monkeypatch: pytest.MonkeyPatch, examples: list[Example]) -> None:
    monkeypatch.setattr(passages, "TOKENS_AT_ONCE", 64)
    monkeypatch.setattr(multiple_choice, "TOKENS_AT_ONCE", 100)
    whole = dict(evaluate_task(MODEL, examples, "fp32"))
    shares = [dict(evaluate_task(MODEL, examples, "fp32", World(rank, 3, "cpu"))) for rank in range(3)]
    assert all(shares)
    assert shares[0] | shares[1] | shares[2] == whole
    assert sum(map(len, shares)) == len(whole)


@pytest.mark.parametrize("ids, scored", [([1] * 50, 1), ([1, 2], 2), ([1], 1), ([1, 2], 0)])
def test_invalid_passage_is_refused(ids: list[int], scored: int) -> None:
    with pytest.raises(ValueError, match="passage .*48"):
        list(evaluate_passages(MODEL, [Passage([1, 2], 1), Passage(ids, scored)]))


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
