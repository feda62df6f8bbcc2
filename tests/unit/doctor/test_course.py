from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from overnight.doctor.run_checks import COLUMNS, check_peak, check_schedule, draw
from overnight.recipe import load_recipe, recipe_names
from overnight.training.schedule import ScheduleConfig, learning_rate_multiplier

PEAK = 6e-4


def rate_of(schedule: ScheduleConfig) -> Callable[[int], float]:
    """The learning rate by step, as a run has it."""
    assert schedule.total_steps is not None
    length = schedule.total_steps
    return lambda step: PEAK * learning_rate_multiplier(step, length, schedule)


def passes(
    rate: Callable[[int], float], schedule: ScheduleConfig, *, begins_anew: bool = True
) -> bool | None:
    assert schedule.total_steps is not None
    return check_schedule(rate, schedule.total_steps, schedule, begins_anew=begins_anew).passed


@pytest.mark.parametrize("decay", ["cosine", "linear", "wsd", "constant"])
@pytest.mark.parametrize("total_steps", [12, 1000, 500_000])
def test_every_schedule_there_is_passes(decay: str, total_steps: int) -> None:
    schedule = ScheduleConfig(
        total_steps=total_steps,
        warmup_steps=max(2, total_steps // 50),
        learning_rate_decay=decay,  # type: ignore[arg-type]
    )
    assert passes(rate_of(schedule), schedule)


COSINE = ScheduleConfig(total_steps=1000, warmup_steps=50)


@pytest.mark.parametrize(
    "rate, sentence",
    [
        (lambda step: PEAK, "fresh weights need a warm-up"),
        (lambda step: PEAK * min(1, (step + 1) / 50), "it ends at 100% of its peak instead of 10%"),
        (lambda step: PEAK * min(1, (step + 1) / 50) * (1 - step / 1000), "it ends at 0% of its peak"),
        (
            lambda step: PEAK * min(1, (step + 1) / 50) * (0.55 + 0.45 * math.cos(3 * math.pi * step / 999)),
            "it goes up and down more than once",
        ),
    ],
)
def test_what_does_not_follow_the_schedule_is_named(rate: Callable[[int], float], sentence: str) -> None:
    found = check_schedule(rate, 1000, COSINE, begins_anew=True)
    assert found.passed is False
    assert sentence in found.cause


def test_weights_that_were_trained_need_no_warm_up() -> None:
    schedule = ScheduleConfig(total_steps=20, learning_rate_decay="constant")
    assert passes(rate_of(schedule), schedule) is False
    assert passes(rate_of(schedule), schedule, begins_anew=False)


def test_a_drawing_is_as_high_as_the_rate() -> None:
    lines = draw(lambda step: 1.0 - step / 59, 60)
    bars = [line.split("│")[1].ljust(COLUMNS) for line in lines[:-1]]
    levels = " ▁▂▃▄▅▆▇█"
    heights = [sum(levels.index(row[column]) for row in bars) for column in range(COLUMNS)]
    assert heights == [round(40 * (1.0 - column / 59)) for column in range(COLUMNS)]
    assert lines[0].startswith("       1 │█")
    assert lines[-1].endswith("step 60")
    assert all(len(line) <= 75 for line in lines)


@pytest.mark.parametrize("name", recipe_names())
def test_the_peak_of_every_recipe_that_comes_with_the_package_is_sane(name: str) -> None:
    recipe = load_recipe(name)
    rate, width = recipe.optimizer.peak_learning_rate, recipe.model.n_embd
    anew = recipe.init_from is None
    assert check_peak(rate, width, begins_anew=anew).passed
    assert check_peak(100 * rate, width, begins_anew=anew).passed is False
    assert not anew or check_peak(rate / 100, width, begins_anew=anew).passed is False


def test_what_others_trained_with_is_sane() -> None:
    """GPT-3's table 2.1, build-nanogpt's three times as much, repgpt's 1e-2."""
    table = {768: 6e-4, 1024: 3e-4, 1536: 2.5e-4, 2048: 2e-4, 2560: 1.6e-4, 4096: 1.2e-4, 12288: 6e-5}
    for width, rate in (*table.items(), (768, 1.8e-3), (768, 1e-2)):
        assert check_peak(rate, width, begins_anew=True).passed, width
