"""A run's curves, and the recording of a band from several runs."""

import math
import random
import statistics

import pytest

from overnight.baselines.band import (
    HALF_WIDTH,
    MIN_HALF_WIDTH,
    Point,
    RunCurves,
    columns_of,
    describe_settings,
    record_curves,
    run_curves,
    window_ends,
)


def line(step: int, **changes: object) -> dict[str, object]:
    values = {"step": step, "tokens": 64 * step, "loss": 8.0 / step, "grad_norm": 1.0 * step}
    return values | {"learning_rate": 0.5 * step} | changes


def test_windows_double_until_they_are_a_fortieth_of_the_run() -> None:
    assert window_ends(400) == [1, 2, 4, 8, *range(16, 27, 10), *range(36, 400, 10), 400]
    for steps in (1, 2, 3, 39, 41, 997, 19_073):
        ends = window_ends(steps)
        assert (ends[0], ends[-1]) == (1, steps)
        assert ends == sorted({*ends})
        assert len(ends) < 60


def test_training_curves_are_averages_of_each_finished_window() -> None:
    lines = [line(step) for step in range(1, 8)]  # the window up to step 8 is unfinished
    curves = run_curves(columns_of(lines), [], [64 * step for step in (1, 2, 4, 8)])
    for at, (end, steps) in enumerate([(1, [1]), (2, [2]), (4, [3, 4])]):
        assert curves["loss"][at] == Point(64 * end, pytest.approx(statistics.fmean(8.0 / s for s in steps)))
        assert curves["learning_rate"][at].value == statistics.fmean(0.5 * s for s in steps)
        assert curves["grad_norm"][at].value == statistics.median(steps)
        assert curves["grad_norm_peak"][at].value == max(steps)
    assert {len(points) for points in curves.values()} == {3}


def test_loss_that_is_not_finite_breaks_its_window_and_a_norm_is_left_out() -> None:
    lines = [line(1), line(2, loss=None), line(3, grad_norm=None), line(4)]
    curves = run_curves(columns_of(lines), [], [128, 256])
    assert [point.value for point in curves["loss"]] == [math.inf, pytest.approx(8 / 3 / 2 + 1)]
    assert [point.value for point in curves["grad_norm"]] == [1.5, 4.0]


def test_evaluation_is_compared_with_the_training_loss_of_the_last_quarter() -> None:
    lines = [line(step) for step in range(1, 41)]
    evaluations = [
        {"step": 0, "tokens": 0, "loss": 9.0, "norm_gain": 1.0, "applied_learning_rate": 7.0},
        {"step": 40, "tokens": 2560, "loss": 1.0, "norm_gain": 1.1, "applied_learning_rate": 200.0},
        {"step": 41, "tokens": 2624, "loss": 1.0},  # of a step whose line is not written yet
    ]
    curves = run_curves(columns_of(lines), evaluations, [])
    assert curves["validation_loss"] == (Point(0, 9.0), Point(2560, 1.0), Point(2624, 1.0))
    tail = statistics.fmean(8.0 / step for step in range(31, 41))
    assert curves["gap"] == (Point(2560, pytest.approx(1.0 - tail)),)
    assert curves["norm_gain"] == (Point(0, 1.0), Point(2560, 1.1))
    assert curves["applied_rate"] == (Point(2560, 10.0),)
    assert "residual_ratio" not in curves


def curves_of(values: list[float], name: str = "loss") -> RunCurves:
    return {name: tuple(Point(100 * at, value) for at, value in enumerate(values, start=1))}


def test_middle_is_the_mean_and_neighbours_variances_are_pooled() -> None:
    noise = random.Random(0)
    runs = [[4.0 + noise.gauss(0, 0.1) for _ in range(6)] for _ in range(3)]
    curve = record_curves([curves_of(run) for run in runs])["loss"]
    assert curve.tokens == (100, 200, 300, 400, 500, 600)
    columns = list(zip(*runs, strict=True))
    for at in range(6):
        assert curve.middle[at] == pytest.approx(statistics.fmean(columns[at]), rel=1e-5)
        variances = [statistics.variance(each) for each in columns[max(0, at - 2) : at + 3]]
        euler = 0.5772  # ln 1 - digamma(1)
        pooled = statistics.geometric_mean(variances) * math.exp(euler)
        half = HALF_WIDTH * math.sqrt(max(pooled, statistics.variance(columns[at])) * 4 / 3)
        assert curve.high[at] - curve.middle[at] == pytest.approx(half, rel=5e-3)
        assert curve.middle[at] - curve.low[at] == pytest.approx(half, rel=5e-3)


def test_band_has_a_least_width_and_norms_vary_by_factors() -> None:
    curve = record_curves([curves_of([4.0, 2.0])] * 2)["loss"]
    factor = 1 + MIN_HALF_WIDTH["loss"]
    assert curve.high == (pytest.approx(4 * factor), pytest.approx(2 * factor))
    gap = record_curves([curves_of([0.0], "gap")] * 2)["gap"]
    assert (gap.low, gap.high) == ((-MIN_HALF_WIDTH["gap"],), (MIN_HALF_WIDTH["gap"],))
    norm = record_curves([curves_of([1.0], "grad_norm"), curves_of([4.0], "grad_norm")])["grad_norm"]
    assert norm.middle == (2.0,)
    assert norm.high[0] / 2 == pytest.approx(2 / norm.low[0], rel=1e-4)


def test_start_is_not_pooled_with_what_follows() -> None:
    runs = [
        {"loss": (Point(0, 8.0), Point(100, 4.0 + shift), Point(200, 2.0 + shift))} for shift in (-0.5, 0.5)
    ]
    curve = record_curves(runs)["loss"]
    assert curve.high[0] == pytest.approx(8 * (1 + MIN_HALF_WIDTH["loss"]))
    half = HALF_WIDTH * math.exp(4 / 6) * math.sqrt(0.5 * 1.5)
    assert (curve.high[1] - 4.0, curve.high[2] - 2.0) == (pytest.approx(half, rel=1e-4),) * 2


def test_only_what_all_runs_have_is_recorded() -> None:
    curves = record_curves([curves_of([1.0, 2.0]) | curves_of([1.0], "norm_gain"), curves_of([1.0])])
    assert list(curves) == ["loss"]
    assert curves["loss"].tokens == (100,)
    identity, settings = describe_settings({"n_layer": 2, "dropout": 0.1, "run_name": "x"})
    assert (identity["n_layer"], settings["dropout"]) == (2, 0.1)
    assert "run_name" not in identity | settings


def test_one_run_or_a_broken_one_is_refused() -> None:
    with pytest.raises(ValueError, match="two runs"):
        record_curves([curves_of([1.0])])
    with pytest.raises(ValueError, match="loss is not finite"):
        record_curves([curves_of([1.0]), curves_of([math.inf])])
