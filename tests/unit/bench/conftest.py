"""A model that a test has time for, and a task for it."""

from __future__ import annotations

import dataclasses

import pytest

from overnight.bench.variants import baseline_task
from overnight.bench.worker import StepTask
from overnight.model.model_config import ModelConfig
from overnight.model.presets import PRESETS

TINY = ModelConfig(n_layer=2, n_head=2, n_embd=32, context_length=16, vocab_size=300)


@pytest.fixture(autouse=True)
def _tiny_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "tiny", TINY)


def task_of(model: ModelConfig = TINY, **changes: object) -> StepTask:
    """A step of two rows in two micro-batches."""
    return dataclasses.replace(baseline_task(model, "cpu", 2, 2), **changes)  # type: ignore[arg-type]
