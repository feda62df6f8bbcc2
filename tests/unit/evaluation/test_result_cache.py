"""An interrupted evaluation continues; other weights, examples or precision start a new one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from overnight.distributed.world import World
from overnight.evaluation import result_cache
from overnight.evaluation.multiple_choice import Choice
from overnight.evaluation.passages import Passage
from overnight.evaluation.result_cache import cache_key, clear_results, evaluate_missing
from overnight.evaluation.tasks import Example, Numbers
from overnight.model.gpt import GPT, initialize
from overnight.model.model_config import ModelConfig

EXAMPLES = [Passage([number, 1], 1) for number in range(6)]
RESULTS = {index: (float(index), 0.0) for index in range(6)}


class PowerCutError(Exception):
    """Ends an evaluation."""


class Evaluator:
    """In place of `evaluate_task`: a passage's result is its first id; raises after `last` examples."""

    def __init__(self, last: int | None = None) -> None:
        self.last, self.count = last, 0

    def __call__(self, _model: Any, examples: Sequence[Example], *_: Any) -> Iterator[tuple[int, Numbers]]:
        for index in reversed(range(len(examples))):
            if self.count == self.last:
                raise PowerCutError
            self.count += 1
            example = examples[index]
            assert isinstance(example, Passage)
            yield index, (float(example.ids[0]), 0.0)


def build(seed: int) -> GPT:
    model = GPT(ModelConfig(n_layer=1, n_head=1, n_embd=8, context_length=8, vocab_size=11))
    initialize(model, seed)
    return model


MODEL = build(0)


def evaluate(folder: Path, evaluator: Evaluator, world: World | None = None) -> dict[int, Numbers]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(result_cache, "evaluate_task", evaluator)
        more = () if world is None else (world,)
        return dict(evaluate_missing(folder, MODEL, EXAMPLES, "fp32", *more))


def test_interrupted_evaluation_continues(tmp_path: Path) -> None:
    folder = tmp_path / "judged"
    with pytest.raises(PowerCutError):
        evaluate(folder, Evaluator(last=4))
    with (folder / "0.jsonl").open("a") as file:
        file.write("[1, [0.5")  # an interrupted line
    second, third = Evaluator(), Evaluator()
    assert evaluate(folder, second) == evaluate(folder, third) == RESULTS
    assert (second.count, third.count) == (2, 0)
    clear_results(folder)
    clear_results(folder)
    evaluate(folder, third)
    assert third.count == 6


def test_one_process_continues_from_two(tmp_path: Path) -> None:
    (tmp_path / "0.jsonl").write_text("[0, [0.0, 0.0]]\n[3, [3.0, 0.0]]\n")
    (tmp_path / "1.jsonl").write_text("[5, [5.0, 0.0]]\n[1, [1.0")
    evaluator = Evaluator()
    assert evaluate(tmp_path, evaluator) == RESULTS
    assert evaluator.count == 3


def test_first_process_yields_cached_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(World, "barrier", lambda _: None)
    (tmp_path / "7.jsonl").write_text("".join(f"[{index}, [1.0, 0.0]]\n" for index in range(6)))
    found = [evaluate(tmp_path, Evaluator(), World(rank, 2, "cpu")) for rank in range(2)]
    assert [len(each) for each in found] == [6, 0]


def test_cache_key_covers_everything_that_decides_results() -> None:
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
