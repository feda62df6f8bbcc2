"""A run's curves, and the recording of a band from several runs by benchmarks/bands.py."""

import math
import random
import statistics

import pytest

from overnight.baselines.band import Point, columns_of, run_curves


@pytest.fixture
def bands(programs):
    return programs["bands"]


def line(step, **changes):
    values = {"step": step, "tokens": 64 * step, "loss": 8.0 / step, "grad_norm": 1.0 * step}
    return values | {"learning_rate": 0.5 * step} | changes


def test_training_curves_are_averages_of_each_finished_window():
    lines = [line(step) for step in range(1, 8)]  # the window up to step 8 is unfinished
    found = run_curves(columns_of(lines), [], [64 * step for step in (1, 2, 4, 8)])
    windows = {64: [1], 128: [2], 256: [3, 4]}

    def expected(summary, factor=lambda step: step):
        return tuple(Point(end, pytest.approx(summary(map(factor, steps)))) for end, steps in windows.items())

    assert found == {
        "loss": expected(statistics.fmean, lambda step: 8.0 / step),
        "learning_rate": expected(statistics.fmean, lambda step: 0.5 * step),
        "grad_norm": expected(statistics.median),
        "grad_norm_peak": expected(max),
    }


def test_loss_that_is_not_finite_breaks_its_window_and_a_norm_is_left_out():
    lines = [line(1), line(2, loss=None), line(3, grad_norm=None), line(4)]
    curves = run_curves(columns_of(lines), [], [128, 256])
    assert [point.value for point in curves["loss"]] == [math.inf, pytest.approx(8 / 3 / 2 + 1)]
    assert [point.value for point in curves["grad_norm"]] == [1.5, 4.0]


def test_evaluation_is_compared_with_the_training_loss_of_the_last_quarter():
    lines = [line(step) for step in range(1, 41)]
    evaluations = [
        {"step": 0, "tokens": 0, "loss": 9.0, "norm_gain": 1.0, "applied_learning_rate": 7.0},
        {"step": 40, "tokens": 2560, "loss": 1.0, "norm_gain": 1.1, "applied_learning_rate": 200.0},
        {"step": 41, "tokens": 2624, "loss": 1.0},  # of a step whose line is not written yet
    ]
    tail = statistics.fmean(8.0 / step for step in range(31, 41))
    assert run_curves(columns_of(lines), evaluations, []) == {
        "validation_loss": (Point(0, 9.0), Point(2560, 1.0), Point(2624, 1.0)),
        "gap": (Point(2560, pytest.approx(1.0 - tail)),),
        "norm_gain": (Point(0, 1.0), Point(2560, 1.1)),
        "applied_rate": (Point(2560, 10.0),),
    }


# Recording


def test_windows_double_until_they_are_a_fortieth_of_the_run(bands):
    assert bands.window_ends(400) == [1, 2, 4, 8, *range(16, 27, 10), *range(36, 400, 10), 400]
    for steps in (1, 2, 3, 39, 41, 997, 19_073):
        ends = bands.window_ends(steps)
        assert (ends[0], ends[-1]) == (1, steps)
        assert ends == sorted({*ends})
        assert len(ends) < 60


def curves_of(values, name="loss"):
    return {name: tuple(Point(100 * at, value) for at, value in enumerate(values, start=1))}


def test_middle_is_the_mean_and_neighbours_variances_are_pooled(bands):
    noise = random.Random(0)
    runs = [[4.0 + noise.gauss(0, 0.1) for _ in range(6)] for _ in range(3)]
    curve = bands.record_curves([curves_of(run) for run in runs])["loss"]
    assert curve.tokens == (100, 200, 300, 400, 500, 600)
    columns = list(zip(*runs, strict=True))
    assert curve.middle == pytest.approx([statistics.fmean(column) for column in columns], rel=1e-5)
    for at, (low, middle, high) in enumerate(zip(curve.low, curve.middle, curve.high, strict=True)):
        variances = [statistics.variance(each) for each in columns[max(0, at - 2) : at + 3]]
        euler = 0.5772  # ln 1 - digamma(1)
        pooled = statistics.geometric_mean(variances) * math.exp(euler)
        half = bands.HALF_WIDTH * math.sqrt(max(pooled, statistics.variance(columns[at])) * 4 / 3)
        assert (high - middle, middle - low) == pytest.approx((half, half), rel=5e-3)


def test_band_has_a_least_width_and_norms_vary_by_factors(bands):
    curve = bands.record_curves([curves_of([4.0, 2.0])] * 2)["loss"]
    factor = 1 + bands.MIN_HALF_WIDTH["loss"]
    assert curve.high == pytest.approx((4 * factor, 2 * factor))
    gap = bands.record_curves([curves_of([0.0], "gap")] * 2)["gap"]
    assert (gap.low, gap.high) == ((-bands.MIN_HALF_WIDTH["gap"],), (bands.MIN_HALF_WIDTH["gap"],))
    norm = bands.record_curves([curves_of([1.0], "grad_norm"), curves_of([4.0], "grad_norm")])["grad_norm"]
    assert norm.middle == (2.0,)
    assert norm.high[0] / 2 == pytest.approx(2 / norm.low[0], rel=1e-4)


def test_start_is_not_pooled_with_what_follows(bands):
    runs = [
        {"loss": (Point(0, 8.0), Point(100, 4.0 + shift), Point(200, 2.0 + shift))} for shift in (-0.5, 0.5)
    ]
    half = bands.HALF_WIDTH * math.exp(4 / 6) * math.sqrt(0.5 * 1.5)
    expected = (8 * (1 + bands.MIN_HALF_WIDTH["loss"]), 4.0 + half, 2.0 + half)
    assert bands.record_curves(runs)["loss"].high == pytest.approx(expected, rel=1e-4)


def test_only_what_all_runs_have_is_recorded(bands):
    curves = bands.record_curves([curves_of([1.0, 2.0]) | curves_of([1.0], "norm_gain"), curves_of([1.0])])
    assert {name: curve.tokens for name, curve in curves.items()} == {"loss": (100,)}


def test_one_run_or_a_broken_one_is_refused(bands):
    with pytest.raises(ValueError, match="two runs"):
        bands.record_curves([curves_of([1.0])])
    with pytest.raises(ValueError, match="loss is not finite"):
        bands.record_curves([curves_of([1.0]), curves_of([math.inf])])
