import math
import random
import statistics

import pytest

from overnight.baselines.band import DEVIATIONS, LEAST, Course, Point, describe_settings, record_curves


def course(values: list[float], name: str = "loss") -> Course:
    return {name: tuple(Point(100 * at, value) for at, value in enumerate(values, start=1))}


def test_the_middle_is_the_mean_and_neighbours_spreads_are_pooled() -> None:
    noise = random.Random(0)
    runs = [[4.0 + noise.gauss(0, 0.1) for _ in range(6)] for _ in range(3)]
    curve = record_curves([course(run) for run in runs])["loss"]
    assert curve.tokens == (100, 200, 300, 400, 500, 600)
    columns = list(zip(*runs, strict=True))
    for at in range(6):
        assert curve.middle[at] == pytest.approx(statistics.fmean(columns[at]), rel=1e-5)
        variances = [statistics.variance(each) for each in columns[max(0, at - 2) : at + 3]]
        pooled = statistics.geometric_mean(variances) * math.exp(
            0.5772
        )  # ln 1 - digamma(1): Euler's constant
        half = DEVIATIONS * math.sqrt(max(pooled, statistics.variance(columns[at])) * 4 / 3)
        assert curve.high[at] - curve.middle[at] == pytest.approx(half, rel=5e-3)
        assert curve.middle[at] - curve.low[at] == pytest.approx(half, rel=5e-3)


def test_a_band_is_never_narrower_than_its_least_width() -> None:
    same = [course([4.0, 2.0]), course([4.0, 2.0])]
    curve = record_curves(same)["loss"]
    assert curve.high == (pytest.approx(4 * (1 + LEAST["loss"])), pytest.approx(2 * (1 + LEAST["loss"])))
    gap = record_curves([course([0.0], "gap")] * 2)["gap"]
    assert (gap.low, gap.high) == ((-LEAST["gap"],), (LEAST["gap"],))


def test_the_start_is_not_pooled_with_what_follows() -> None:
    runs = [
        {"loss": (Point(0, 8.0), Point(100, 4.0 + shift), Point(200, 2.0 + shift))} for shift in (-0.5, 0.5)
    ]
    curve = record_curves(runs)["loss"]
    assert curve.high[0] == pytest.approx(8 * (1 + LEAST["loss"]))
    half = DEVIATIONS * math.exp(4 / 6) * math.sqrt(0.5 * 1.5)
    assert (curve.high[1] - 4.0, curve.high[2] - 2.0) == (pytest.approx(half, rel=1e-4),) * 2


def test_norms_spread_by_factors() -> None:
    curve = record_curves([course([1.0], "grad_norm"), course([4.0], "grad_norm")])["grad_norm"]
    assert curve.middle == (2.0,)
    assert curve.high[0] / 2 == pytest.approx(2 / curve.low[0], rel=1e-4)


def test_only_what_all_runs_have_is_recorded() -> None:
    curves = record_curves([course([1.0, 2.0]) | course([1.0], "norm_gain"), course([1.0])])
    assert list(curves) == ["loss"]
    assert curves["loss"].tokens == (100,)


def test_one_run_or_a_broken_one_is_refused() -> None:
    with pytest.raises(ValueError, match="two runs or more"):
        record_curves([course([1.0])])
    with pytest.raises(ValueError, match="whose loss is not finite is no reference"):
        record_curves([course([1.0]), course([math.inf])])


def test_identity_and_settings_are_those_that_matter() -> None:
    identity, settings = describe_settings({"n_layer": 2, "dropout": 0.1, "run_name": "x"})
    assert identity["n_layer"] == 2
    assert settings["dropout"] == 0.1
    assert "run_name" not in identity | settings
