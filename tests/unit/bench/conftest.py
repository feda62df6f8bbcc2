"""A model that a test has time for, and a task for it."""

from __future__ import annotations

import dataclasses

import pytest

from overnight.bench.variants import baseline_compute
from overnight.bench.worker import StepTask
from overnight.model import model_config
from overnight.model.model_config import ModelConfig

TINY = ModelConfig(n_layer=2, n_head=2, n_embd=32, context_length=16, vocab_size=300)


@pytest.fixture(autouse=True)
def _tiny_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(model_config.PRESETS, "tiny", TINY)


def task_of(model: ModelConfig = TINY, device: str = "cpu", **changes: object) -> StepTask:
    """A step of two rows in two micro-batches."""
    task = StepTask(
        model=model,
        compute=baseline_compute(device),
        ids="",
        rows_per_step=2,
        micro_batches=2,
        vocabulary_multiple=1,
        fused_optimizer=False,
        large_pages=False,
    )
    return dataclasses.replace(task, **changes)  # type: ignore[arg-type]
