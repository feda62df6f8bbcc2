"""An evaluation that is interrupted goes on; one of other weights, examples or precision begins anew."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from overnight.distributed.world import World
from overnight.evaluation.multiple_choice import Choice
from overnight.evaluation.passages import Passage
from overnight.evaluation.result_cache import cache_key, clear_results, evaluate_missing
from overnight.evaluation.tasks import Example, Numbers
from overnight.model.gpt import GPT, initialize
from overnight.model.model_config import ModelConfig

EXAMPLES = [Passage([number, 1], 1) for number in range(6)]


class PowerCutError(Exception):
    """What ends an evaluation in these tests."""


class Judge:
    """Makes of each passage its first id, backwards; fails after so many."""

    def __init__(self, last: int | None = None) -> None:
        self.last, self.asked = last, 0

    def __call__(self, examples: Sequence[Example]) -> Iterator[tuple[int, Numbers]]:
        for place in reversed(range(len(examples))):
            if self.asked == self.last:
                raise PowerCutError
            self.asked += 1
            example = examples[place]
            assert isinstance(example, Passage)
            yield place, (float(example.ids[0]), 0.0)


def test_what_was_judged_is_not_judged_again(tmp_path: Path) -> None:
    folder = tmp_path / "judged"
    with pytest.raises(PowerCutError):
        list(evaluate_missing(folder, EXAMPLES, Judge(last=4)))
    with (folder / "0.jsonl").open("a") as file:
        file.write("[1, [0.5")  # torn
    second = Judge()
    found = dict(evaluate_missing(folder, EXAMPLES, second))
    assert second.asked == 2
    assert found == {place: (float(place), 0.0) for place in range(6)}
    third = Judge()
    assert dict(evaluate_missing(folder, EXAMPLES, third)) == found
    assert third.asked == 0
    clear_results(folder)
    clear_results(folder)
    dict(evaluate_missing(folder, EXAMPLES, third))
    assert third.asked == 6


def test_one_process_goes_on_from_what_two_have_judged(tmp_path: Path) -> None:
    (tmp_path / "0.jsonl").write_text("[0, [0.0, 0.0]]\n[3, [3.0, 0.0]]\n")
    (tmp_path / "1.jsonl").write_text("[5, [5.0, 0.0]]\n[1, [1.0")
    alone = Judge()
    found = dict(evaluate_missing(tmp_path, EXAMPLES, alone))
    assert found == {place: (float(place), 0.0) for place in range(6)}
    assert alone.asked == 3


def test_of_several_processes_the_first_tells_what_was_judged_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(World, "wait_for_all", lambda _: None)
    (tmp_path / "7.jsonl").write_text("".join(f"[{place}, [1.0, 0.0]]\n" for place in range(6)))
    told = [list(evaluate_missing(tmp_path, EXAMPLES, Judge(), World(rank, 2, "cpu"))) for rank in range(2)]
    assert [len(each) for each in told] == [6, 0]


def build(seed: int) -> GPT:
    model = GPT(ModelConfig(n_layer=1, n_head=1, n_embd=8, context_length=8, vocab_size=11))
    initialize(model, seed)
    return model


def test_the_key_changes_with_whatever_decides_the_results() -> None:
    model, questions = build(0), [Choice((1,), ((2,), (3, 4)), (1, 2), 0)]
    keys = {
        cache_key(model, EXAMPLES, "fp32"),
        cache_key(model, EXAMPLES, "bf16"),
        cache_key(model, EXAMPLES[:5], "fp32"),
        cache_key(model, [Passage([0, 1, 1], 1), *EXAMPLES[1:]], "fp32"),
        cache_key(model, [Passage([0, 1, 1], 2), *EXAMPLES[1:]], "fp32"),
        cache_key(build(1), EXAMPLES, "fp32"),
        cache_key(model, questions, "fp32"),
        cache_key(model, [Choice((1,), ((2, 3), (4,)), (1, 2), 0)], "fp32"),
        cache_key(model, [Choice((1,), ((3,), (3, 4)), (1, 2), 0, ((2,), ()))], "fp32"),
    }
    assert len(keys) == 9
    assert cache_key(build(0), list(EXAMPLES), "fp32") in keys
    with torch.no_grad():
        model.h[0].ln_1.bias[3] = 1e-30
    assert cache_key(model, EXAMPLES, "fp32") not in keys
