import math
import statistics

import pytest

from overnight.baselines.band import Point, columns_of, run_stats, window_ends


def line(step: int, **changes: object) -> dict[str, object]:
    told = {"step": step, "tokens": 64 * step, "loss": 8.0 / step, "grad_norm": 1.0 * step}
    return told | {"learning_rate": 0.5 * step} | changes


def test_stretches_double_until_they_are_a_fortieth_of_the_run() -> None:
    assert window_ends(400) == [1, 2, 4, 8, *range(16, 27, 10), *range(36, 400, 10), 400]
    assert window_ends(3) == [1, 2, 3]
    for steps in (1, 2, 39, 41, 997, 19_073):
        ends = window_ends(steps)
        assert ends[0] == 1
        assert ends[-1] == steps
        assert ends == sorted({*ends})
        assert len(ends) < 60


def test_a_training_curve_has_the_mean_of_each_finished_stretch() -> None:
    lines = [line(step) for step in range(1, 8)]  # the stretch up to step 8 is under way
    course = run_stats(columns_of(lines), [], [64 * step for step in (1, 2, 4, 8)])
    for end, steps in ((1, [1]), (2, [2]), (4, [3, 4])):
        at = (1, 2, 4).index(end)
        assert course["loss"][at] == Point(64 * end, pytest.approx(statistics.fmean(8.0 / s for s in steps)))
        assert course["learning_rate"][at].value == statistics.fmean(0.5 * s for s in steps)
        assert course["grad_norm"][at].value == statistics.median(steps)
        assert course["grad_norm_peak"][at].value == max(steps)
    assert {len(course[name]) for name in course} == {3}


def test_a_loss_that_is_not_finite_breaks_its_stretch_and_a_norm_is_left_out() -> None:
    lines = [line(1), line(2, loss=None), line(3, grad_norm=None), line(4)]
    course = run_stats(columns_of(lines), [], [128, 256])
    assert [point.value for point in course["loss"]] == [math.inf, pytest.approx(8 / 3 / 2 + 1)]
    assert [point.value for point in course["grad_norm"]] == [1.5, 4.0]


def test_an_evaluation_is_laid_beside_the_training_loss_of_the_last_quarter() -> None:
    lines = [line(step) for step in range(1, 41)]
    evaluations = [
        {"step": 0, "tokens": 0, "loss": 9.0, "norm_gain": 1.0, "applied_learning_rate": 7.0},
        {"step": 40, "tokens": 2560, "loss": 1.0, "norm_gain": 1.1, "applied_learning_rate": 200.0},
        {"step": 41, "tokens": 2624, "loss": 1.0},  # of a step whose line is not written yet
    ]
    course = run_stats(columns_of(lines), evaluations, [])
    assert course["validation_loss"] == (Point(0, 9.0), Point(2560, 1.0), Point(2624, 1.0))
    tail = statistics.fmean(8.0 / step for step in range(31, 41))
    assert course["gap"] == (Point(2560, pytest.approx(1.0 - tail)),)
    assert course["norm_gain"] == (Point(0, 1.0), Point(2560, 1.1))
    assert course["applied_rate"] == (Point(2560, 10.0),)
    assert "residual_ratio" not in course
