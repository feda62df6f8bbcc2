"""Learning rates, against PyTorch's own schedulers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch.optim import lr_scheduler

from overnight.training.schedule import ScheduleConfig, learning_rate_multiplier

KINDS = ("cosine", "linear", "wsd", "constant")
LINEAR, WSD, CONSTANT = ({"learning_rate_decay": kind} for kind in KINDS[1:])
Part = tuple[Callable[..., lr_scheduler.LRScheduler], dict[str, float], int]


def torch_rates(steps: int, parts: list[Part]) -> list[float]:
    """The rates of PyTorch's schedulers with a peak of 1, each for its number of steps, in sequence."""
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
    total_steps = config.total_steps or 0
    return [learning_rate_multiplier(step, total_steps, config) for step in range(total_steps)]


def warmup(steps: int) -> Part:
    return lr_scheduler.LinearLR, {"start_factor": 1 / steps, "total_iters": steps - 1}, steps


def constant(factor: float, steps: int) -> Part:
    return lr_scheduler.ConstantLR, {"factor": factor, "total_iters": 10**9}, steps


def line(floor: float, steps: int) -> Part:
    return lr_scheduler.LinearLR, {"start_factor": 1.0, "end_factor": floor, "total_iters": steps}, steps


def cosine(floor: float, steps: int) -> Part:
    return lr_scheduler.CosineAnnealingLR, {"T_max": steps, "eta_min": floor}, steps


@pytest.mark.parametrize(
    "settings, parts",
    [
        ({}, [warmup(20), cosine(0.1, 180)]),
        ({"decay_steps": 150}, [warmup(20), cosine(0.1, 150), constant(0.1, 30)]),
        ({"final_learning_rate_fraction": 0.0}, [warmup(20), cosine(0.0, 180)]),
        (LINEAR, [warmup(20), line(0.1, 180)]),
        ({**LINEAR, "decay_steps": 50}, [warmup(20), line(0.1, 50), constant(0.1, 130)]),
        ({**LINEAR, "final_learning_rate_fraction": 0.0}, [warmup(20), line(0.0, 180)]),
        (WSD, [warmup(20), constant(1.0, 140), line(0.1, 40)]),
        ({**WSD, "decay_steps": 7}, [warmup(20), constant(1.0, 173), line(0.1, 7)]),
        ({**WSD, "decay_steps": 180}, [warmup(20), line(0.1, 180)]),
        (CONSTANT, [warmup(20), constant(1.0, 180)]),
    ],
)
def test_every_schedule_equals_pytorch_schedulers(settings, parts):
    config = ScheduleConfig(total_steps=200, warmup_steps=20, **settings)
    assert config.problems() == []
    assert multipliers(config) == pytest.approx(torch_rates(200, parts), abs=1e-12)


def test_comparison_detects_another_decay():
    """The negative control of the test above."""
    config = ScheduleConfig(total_steps=200, warmup_steps=20, decay_steps=150)
    assert multipliers(config) != pytest.approx(torch_rates(200, [warmup(20), cosine(0.1, 180)]), abs=1e-3)


@pytest.mark.parametrize("decay", KINDS)
@pytest.mark.parametrize(
    "total_steps, warmup_steps, expected", [(4, 4, [0.25, 0.5, 0.75, 1.0]), (1, 0, [1.0])]
)
def test_run_may_be_all_warmup_or_have_none(decay, total_steps, warmup_steps, expected):
    config = ScheduleConfig(total_steps=total_steps, warmup_steps=warmup_steps, learning_rate_decay=decay)
    assert config.problems() == []
    assert multipliers(config) == expected


@pytest.mark.parametrize("warmup_steps, begin", [(0, 9), (11, 11)])
def test_wsd_decays_over_a_fifth_rounded_up_or_all_after_warmup(warmup_steps, begin):
    config = ScheduleConfig(total_steps=12, warmup_steps=warmup_steps, learning_rate_decay="wsd")
    rates = [learning_rate_multiplier(step, 12, config) for step in range(warmup_steps, 13)]
    falling = [1.0 - 0.9 * step / (12 - begin) for step in range(13 - begin)]
    assert rates == pytest.approx([1.0] * (begin - warmup_steps) + falling)


@pytest.mark.parametrize("decay", KINDS[:3])
def test_final_rate_is_reached_at_the_end_and_kept(decay):
    config = ScheduleConfig(total_steps=50, warmup_steps=5, learning_rate_decay=decay)
    assert learning_rate_multiplier(49, 50, config) > 0.1
    after = [learning_rate_multiplier(step, 50, config) for step in (50, 51, 75, 5000)]
    assert after == pytest.approx([0.1] * 4)


@pytest.mark.parametrize("decay", KINDS)
@pytest.mark.parametrize("parts", [2, 5, 16])
def test_partial_steps_have_the_rates_between(decay, parts):
    """Positions and lengths need not be whole: the curve is the same, with more points."""
    config = ScheduleConfig(total_steps=1, warmup_steps=4, learning_rate_decay=decay)
    positions = [(part + 1) / parts - 1 for part in range(20 * parts)]
    rates = [learning_rate_multiplier(position, 20.0, config) for position in positions]
    assert rates[parts - 1 :: parts] == [learning_rate_multiplier(step, 20, config) for step in range(20)]
    assert rates[0] == pytest.approx(0.25 / parts)
    assert all(low < high for low, high in pairwise(rates[: 4 * parts]))
    assert set(rates[4 * parts - 1 : 5 * parts]) == {1.0}
    assert all(high >= low for high, low in pairwise(rates[4 * parts :]))
    most = max(abs(one - other) for one, other in pairwise(rates))
    assert most <= 0.25 / parts + 1e-9  # no jump where one part of the schedule meets the next


def test_schedule_must_fit_into_the_full_steps():
    config = ScheduleConfig(total_steps=20, warmup_steps=3, decay_steps=3)
    assert config.problems() == config.problems(20.0) == config.problems(6.0) == []
    (too_long_decay,), (too_long_warmup,) = config.problems(5.5), config.problems(2.5)
    assert too_long_decay.startswith("decay_steps=3 ")
    assert "at most 2" in too_long_decay
    assert too_long_warmup.startswith("warmup_steps=3 ")


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"total_steps": None}, "total_steps and total_tokens"),
        ({"total_tokens": 5}, "total_steps and total_tokens"),
        ({"total_steps": 0}, "total_steps=0"),
        ({"warmup_steps": 10}, "warmup_steps=10 .*total_steps=9"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"final_learning_rate_fraction": 2.0}, "final_learning_rate_fraction=2.0"),
        ({"final_learning_rate_fraction": math.nan}, "final_learning_rate_fraction=nan"),
        ({"decay_steps": 0}, "decay_steps=0"),
        ({"warmup_steps": 2, "decay_steps": 8}, "decay_steps=8 .*total_steps=9.* at most 7"),
        ({"warmup_steps": 9, "decay_steps": 1}, "decay_steps=1 .*total_steps=9.* leave it out"),
        ({**CONSTANT, "decay_steps": 1}, "decay_steps=1 .*learning_rate_decay=constant"),
    ],
)
def test_invalid_setting_is_named(settings, named):
    (problem,) = ScheduleConfig(**{"total_steps": 9, **settings}).problems()
    assert re.search(named, problem)
