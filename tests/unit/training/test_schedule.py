from __future__ import annotations

import math
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from overnight.training.schedule import ScheduleConfig, learning_rate_multiplier

KINDS: tuple[Literal["cosine", "linear", "wsd", "constant"], ...] = ("cosine", "linear", "wsd", "constant")
Part = tuple[Callable[..., lr_scheduler.LRScheduler], dict[str, float], int]


def build_nanogpt(step: int, warmup: int, steps: int, peak: float, low: float) -> float:
    """The schedule as build-nanogpt describes it, written independently."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / (steps - warmup)
    return low + 0.5 * (1 + math.cos(math.pi * done)) * (peak - low)


def torch_rates(steps: int, parts: list[Part]) -> list[float]:
    """The rates of PyTorch's own schedulers with a peak of 1, each for so many steps, one after the other."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedulers = [kind(optimizer, **settings) for kind, settings, _ in parts]
    ends = [sum(length for _, _, length in parts[: number + 1]) for number in range(len(parts) - 1)]
    scheduler = lr_scheduler.SequentialLR(optimizer, schedulers, ends)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def multipliers(config: ScheduleConfig) -> list[float]:
    """At every step of a run without a ramp."""
    total_steps = config.total_steps
    assert total_steps is not None
    return [learning_rate_multiplier(step, total_steps, config) for step in range(total_steps)]


def warmup(steps: int) -> Part:
    return lr_scheduler.LinearLR, {"start_factor": 1 / steps, "total_iters": steps - 1}, steps


def constant(factor: float, steps: int) -> Part:
    return lr_scheduler.ConstantLR, {"factor": factor, "total_iters": 10**9}, steps


def line(floor: float, steps: int) -> Part:
    return lr_scheduler.LinearLR, {"start_factor": 1.0, "end_factor": floor, "total_iters": steps}, steps


def cosine(floor: float, steps: int) -> Part:
    return lr_scheduler.CosineAnnealingLR, {"T_max": steps, "eta_min": floor}, steps


def test_it_is_warm_up_then_cosine_to_a_tenth() -> None:
    config = ScheduleConfig(total_steps=200, warmup_steps=20)
    for step in range(200):
        expected = build_nanogpt(step, 20, 200, 1.0, 0.1)
        assert learning_rate_multiplier(step, 200, config) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "settings, parts",
    [
        ({}, [warmup(20), cosine(0.1, 180)]),
        ({"decay_steps": 150}, [warmup(20), cosine(0.1, 150), constant(0.1, 30)]),
        ({"learning_rate_decay": "linear"}, [warmup(20), line(0.1, 180)]),
        (
            {"learning_rate_decay": "linear", "decay_steps": 50},
            [warmup(20), line(0.1, 50), constant(0.1, 130)],
        ),
        ({"learning_rate_decay": "wsd"}, [warmup(20), constant(1.0, 140), line(0.1, 40)]),
        ({"learning_rate_decay": "wsd", "decay_steps": 7}, [warmup(20), constant(1.0, 173), line(0.1, 7)]),
        ({"learning_rate_decay": "wsd", "decay_steps": 180}, [warmup(20), line(0.1, 180)]),
        ({"learning_rate_decay": "constant"}, [warmup(20), constant(1.0, 180)]),
        ({"final_learning_rate_fraction": 0.0}, [warmup(20), cosine(0.0, 180)]),
        (
            {"learning_rate_decay": "linear", "final_learning_rate_fraction": 0.0},
            [warmup(20), line(0.0, 180)],
        ),
    ],
)
def test_every_schedule_is_that_of_pytorch_s_schedulers(
    settings: dict[str, object], parts: list[Part]
) -> None:
    config = ScheduleConfig(total_steps=200, warmup_steps=20, **settings)  # type: ignore[arg-type]
    assert config.problems() == []
    assert multipliers(config) == pytest.approx(torch_rates(200, parts), abs=1e-12)


def test_a_decay_of_another_length_would_be_seen() -> None:
    """The negative control of the test above."""
    config = ScheduleConfig(total_steps=200, warmup_steps=20, decay_steps=150)
    assert multipliers(config) != pytest.approx(torch_rates(200, [warmup(20), cosine(0.1, 180)]), abs=1e-3)


@pytest.mark.parametrize("decay", ["cosine", "linear", "wsd", "constant"])
def test_a_run_may_be_all_warm_up_or_have_none(decay: str) -> None:
    alone = ScheduleConfig(total_steps=4, warmup_steps=4, learning_rate_decay=decay)  # type: ignore[arg-type]
    assert alone.problems() == []
    assert multipliers(alone) == [0.25, 0.5, 0.75, 1.0]
    none = ScheduleConfig(total_steps=1, learning_rate_decay=decay)  # type: ignore[arg-type]
    assert multipliers(none) == [1.0]


@pytest.mark.parametrize("decay", ["cosine", "linear", "wsd"])
def test_the_floor_is_reached_at_the_end_and_not_left_again(decay: str) -> None:
    config = ScheduleConfig(total_steps=50, warmup_steps=5, learning_rate_decay=decay)  # type: ignore[arg-type]
    assert learning_rate_multiplier(49, 50, config) > 0.1
    after = [learning_rate_multiplier(step, 50, config) for step in (50, 51, 75, 5000)]
    assert after == pytest.approx([0.1] * 4)


@given(
    st.sampled_from(["cosine", "linear", "wsd", "constant"]),
    st.integers(0, 40),
    st.integers(1, 40),
    st.one_of(st.none(), st.integers(1, 40)),
    st.floats(0.0, 1.0),
)
def test_it_rises_to_its_peak_and_never_again(
    decay: str, warmup_steps: int, rest: int, decay_steps: int | None, floor: float
) -> None:
    config = ScheduleConfig(
        total_steps=warmup_steps + rest,
        warmup_steps=warmup_steps,
        learning_rate_decay=decay,  # type: ignore[arg-type]
        decay_steps=decay_steps,
        final_learning_rate_fraction=floor,
    )
    if config.problems():
        assert decay == "constant" or (decay_steps or 0) > rest
        return
    rates = multipliers(config)
    assert all(low < high for low, high in pairwise(rates[:warmup_steps]))
    assert all(high >= low for high, low in pairwise(rates[warmup_steps:]))
    assert rates[max(0, warmup_steps - 1)] == max(rates) == 1.0
    assert min(rates[warmup_steps:]) >= floor * (1 - 1e-12)


def test_another_length_moves_only_what_follows_from_the_length() -> None:
    """A run that goes on longer than first asked for: which part of it would have been the same."""
    short, long = (
        {
            decay: ScheduleConfig(total_steps=steps, warmup_steps=5, learning_rate_decay=decay)
            for decay in KINDS
        }
        for steps in (100, 200)
    )
    same = {
        decay: sum(a == b for a, b in zip(multipliers(short[decay]), multipliers(long[decay]), strict=False))
        for decay in KINDS
    }
    assert same == {"cosine": 6, "linear": 6, "wsd": 81, "constant": 100}


@pytest.mark.parametrize("decay", KINDS)
@pytest.mark.parametrize("parts", [2, 5, 16])
def test_steps_that_are_parts_of_full_ones_have_the_rates_between_theirs(decay: str, parts: int) -> None:
    """A position and a length need not be whole: the curve is the same one, with points between."""
    config = ScheduleConfig(total_steps=1, warmup_steps=4, learning_rate_decay=decay)  # type: ignore[arg-type]
    positions = [(part + 1) / parts - 1 for part in range(20 * parts)]
    rates = [learning_rate_multiplier(position, 20.0, config) for position in positions]
    assert rates[parts - 1 :: parts] == [learning_rate_multiplier(step, 20, config) for step in range(20)]
    assert rates[0] == pytest.approx(0.25 / parts)
    assert all(low < high for low, high in pairwise(rates[: 4 * parts]))
    assert set(rates[4 * parts - 1 : 5 * parts]) == {1.0}
    assert all(high >= low for high, low in pairwise(rates[4 * parts :]))
    most = max(abs(one - other) for one, other in pairwise(rates))
    assert most <= 0.25 / parts + 1e-9  # no jump where one part of the schedule meets the next


def test_a_run_shorter_in_full_steps_than_in_steps_must_hold_its_schedule() -> None:
    config = ScheduleConfig(total_steps=20, warmup_steps=3, decay_steps=3)
    assert config.problems() == config.problems(20.0) == config.problems(6.0) == []
    (problem,) = config.problems(5.5)
    assert problem.endswith("warmup_steps=3 leaves of total_steps=20 (5.5 full steps): at most 2")
    assert config.problems(2.5) == ["warmup_steps=3 is longer than total_steps=20 (2.5 full steps)"]


@pytest.mark.parametrize(
    "config, complaint",
    [
        (ScheduleConfig(), "give one of"),
        (ScheduleConfig(total_steps=3, total_tokens=5), "give only one of"),
        (ScheduleConfig(total_steps=0), "total_steps=0"),
        (ScheduleConfig(total_steps=5, warmup_steps=6), "warmup_steps=6 is longer"),
        (ScheduleConfig(total_steps=5, warmup_steps=-1), "warmup_steps=-1"),
        (ScheduleConfig(total_steps=5, final_learning_rate_fraction=2.0), "between 0 and 1"),
        (ScheduleConfig(total_steps=5, final_learning_rate_fraction=math.nan), "between 0 and 1"),
        (ScheduleConfig(total_steps=5, decay_steps=0), "decay_steps=0 must be at least 1"),
        (
            ScheduleConfig(total_steps=9, warmup_steps=2, decay_steps=8),
            "decay_steps=8 is longer .*: at most 7",
        ),
        (
            ScheduleConfig(total_steps=9, warmup_steps=9, decay_steps=1),
            "decay_steps=1 is longer .*: leave it out",
        ),
        (
            ScheduleConfig(total_tokens=9, learning_rate_decay="constant", decay_steps=1),
            "decay_steps=1 has no meaning with learning_rate_decay=constant: leave it out",
        ),
    ],
)
def test_what_makes_no_sense_is_told(config: ScheduleConfig, complaint: str) -> None:
    (problem,) = config.problems()
    assert re.search(complaint, problem)
