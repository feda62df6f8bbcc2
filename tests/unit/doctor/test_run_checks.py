from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from overnight.doctor import run_checks
from overnight.doctor.run_checks import DRAWN_COLUMNS, check_peak, check_schedule, check_time, draw
from overnight.recipe import load_recipe, recipe_names
from overnight.training import OptimizerConfig
from overnight.training.batch import constant_plan
from overnight.training.schedule import Schedule, ScheduleConfig

PEAK = 6e-4


def check(config, *, is_pretraining=True, rate=None):
    """The result for the rates that a run computes, or for those of `rate`."""
    steps = config.total_steps
    schedule = Schedule(config, PEAK, constant_plan(32, 1), steps)
    if rate is not None:
        schedule = SimpleNamespace(learning_rate=rate, total_steps=steps, config=config)
    return check_schedule(SimpleNamespace(schedule=schedule, is_pretraining=is_pretraining))


@pytest.mark.parametrize("decay", ["cosine", "linear", "wsd", "constant"])
@pytest.mark.parametrize("steps", [12, 1000, 500_000])
def test_every_kind_of_schedule_passes(decay, steps):
    warmup = max(2, steps // 50)
    assert check(ScheduleConfig(total_steps=steps, warmup_steps=warmup, learning_rate_decay=decay)).passed


@pytest.mark.parametrize(
    "share, words",
    [
        (lambda step: 1.0, "warm-up"),
        (lambda step: min(1, (step + 1) / 50), "ends at 100%"),
        (lambda step: min(1, (step + 1) / 50) * (1 - step / 1000), "ends at 0%"),
        (
            lambda step: min(1, (step + 1) / 50) * (0.55 + 0.45 * math.cos(3 * math.pi * step / 999)),
            "up and down",
        ),
    ],
)
def test_wrong_learning_rate_fails(share, words):
    found = check(ScheduleConfig(total_steps=1000, warmup_steps=50), rate=lambda step: PEAK * share(step))
    assert found.passed is False
    assert words in found.cause


def test_fine_tuning_needs_no_warm_up():
    config = ScheduleConfig(total_steps=20, learning_rate_decay="constant")
    assert [check(config, is_pretraining=each).passed for each in (True, False)] == [False, True]


def test_drawing_is_as_high_as_the_rate():
    lines = draw(lambda step: 1.0 - step / 59, 60)
    bars = [line.split("│")[1].ljust(DRAWN_COLUMNS) for line in lines[:-1]]
    heights = [sum(run_checks.BLOCKS.index(row[column]) for row in bars) for column in range(DRAWN_COLUMNS)]
    assert heights == [round(40 * (1.0 - column / 59)) for column in range(DRAWN_COLUMNS)]


def peak_passes(rate, channels, *, is_pretraining=True):
    recipe = SimpleNamespace(optimizer=OptimizerConfig(peak_learning_rate=rate))
    sizes = SimpleNamespace(n_embd=channels)
    return check_peak(SimpleNamespace(recipe=recipe, sizes=sizes, is_pretraining=is_pretraining)).passed


@pytest.mark.parametrize("name", recipe_names())
def test_peak_of_every_shipped_recipe_passes(name):
    recipe = load_recipe(name)
    rate, width, anew = recipe.optimizer.peak_learning_rate, recipe.model.n_embd, recipe.init_from is None
    assert peak_passes(rate, width, is_pretraining=anew)
    assert not peak_passes(100 * rate, width, is_pretraining=anew)
    assert not (anew and peak_passes(rate / 100, width))


def test_published_peaks_pass():
    """GPT-3's table 2.1, build-nanogpt's three times as much, repgpt's 1e-2."""
    table = {768: 6e-4, 1024: 3e-4, 1536: 2.5e-4, 2048: 2e-4, 2560: 1.6e-4, 4096: 1.2e-4, 12288: 6e-5}
    for width, rate in (*table.items(), (768, 1.8e-3), (768, 1e-2)):
        assert peak_passes(rate, width), width


@pytest.mark.parametrize("seconds, passed", [(3.0, True), (math.inf, False), (0.0, False)])
def test_duration_must_be_finite(seconds, passed, monkeypatch):
    monkeypatch.setattr(run_checks, "quick_forecast", lambda _: (seconds, "made up"))
    monkeypatch.setattr(run_checks, "duration", str)
    calm, busy = (check_time(SimpleNamespace(plan=SimpleNamespace(load_average=load))) for load in (0.0, 1e6))
    assert calm.passed is passed
    assert ("busy" in calm.bound, "busy" in busy.bound) == (False, True)
