"""An interrupted evaluation continues; other weights, examples or precision start a new one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from overnight.distributed.world import World
from overnight.evaluation import tasks
from overnight.evaluation.multiple_choice import Choice
from overnight.evaluation.passages import Passage
from overnight.evaluation.scores import Numbers
from overnight.evaluation.tasks import cache_key, evaluate_cached
from overnight.model.gpt import GPT, initialize
from overnight.model.model_config import ModelConfig
from overnight.run_directory import cache_folder
from overnight.tokenizer.bpe import BytePair

EXAMPLES = [Passage([number, 1], 1) for number in range(6)]
TOKENIZER = BytePair([])
RESULTS = {index: (float(index), 0.0) for index in range(6)}


def build(seed: int) -> GPT:
    model = GPT(ModelConfig(n_layer=1, n_head=1, n_embd=8, context_length=8, vocab_size=11))
    initialize(model, seed)
    return model


def test_other_number_of_processes_continues(monkeypatch: pytest.MonkeyPatch) -> None:
    """An example's result is its first id here."""
    count = 0

    def evaluate_task(_model: Any, examples: Sequence[Any], *_: Any) -> Iterator[tuple[int, Numbers]]:
        nonlocal count
        for index in reversed(range(len(examples))):
            count += 1
            yield index, (float(examples[index].ids[0]), 0.0)

    monkeypatch.setattr(tasks, "evaluate_task", evaluate_task)
    monkeypatch.setattr(tasks, "gather_results", lambda own, _: dict(own))
    monkeypatch.setattr(World, "barrier", lambda _: None)
    model, task = build(0), SimpleNamespace(name="task", encode=lambda *_: EXAMPLES)
    folder = cache_folder() / "judged" / cache_key(model, EXAMPLES, "fp32")
    folder.mkdir(parents=True)
    (folder / "0.jsonl").write_text("[0, [0.0, 0.0]]\n[3, [3.0, 0.0]]\n")
    (folder / "1.jsonl").write_text("[5, [5.0, 0.0]]\n[1, [1.0")  # interrupted
    found = [
        evaluate_cached(task, model, TOKENIZER, "fp32", World(rank, 2, "cpu")).numbers  # type: ignore[arg-type]
        for rank in (1, 0)
    ]
    assert found == [{4: RESULTS[4], 2: RESULTS[2], 1: RESULTS[1]}, RESULTS], (
        "the first one adds what is cached"
    )
    assert count == 3
    assert not folder.exists()


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
