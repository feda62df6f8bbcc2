from __future__ import annotations

import math

import pytest

from overnight.schedule import ScheduleConfig, learning_rate_multiplier


def build_nanogpt(step: int, warmup: int, steps: int, peak: float, low: float) -> float:
    """The schedule as build-nanogpt describes it, written independently."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / (steps - warmup)
    return low + 0.5 * (1 + math.cos(math.pi * done)) * (peak - low)


def test_it_is_warm_up_then_cosine_to_a_tenth() -> None:
    config = ScheduleConfig(total_steps=200, warmup_steps=20)
    for step in range(200):
        expected = build_nanogpt(step, 20, 200, 1.0, 0.1)
        assert learning_rate_multiplier(step, config) == pytest.approx(expected, abs=1e-12)


def test_it_can_stay_constant() -> None:
    config = ScheduleConfig(total_steps=10, final_learning_rate_fraction=1.0)
    assert {learning_rate_multiplier(step, config) for step in range(10)} == {1.0}


@pytest.mark.parametrize(
    "config, complaint",
    [
        (ScheduleConfig(), "give one of"),
        (ScheduleConfig(total_steps=3, total_tokens=5), "give only one of"),
        (ScheduleConfig(total_steps=0), "total_steps=0"),
        (ScheduleConfig(total_steps=5, warmup_steps=6), "warmup_steps=6 is longer"),
        (ScheduleConfig(total_steps=5, warmup_steps=-1), "warmup_steps=-1"),
        (ScheduleConfig(total_steps=5, final_learning_rate_fraction=2.0), "between 0 and 1"),
    ],
)
def test_what_makes_no_sense_is_told(config: ScheduleConfig, complaint: str) -> None:
    assert any(complaint in problem for problem in config.problems())
