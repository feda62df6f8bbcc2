"""Student's interval against scipy and tables; how often a comparison of equals is called a difference."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from overnight.ablation.paired import compare_pairs, seeds_to_tell, student_quantile

CAMPAIGNS, STATES, SEEDS = 100, 100, 5


@pytest.mark.parametrize(
    ("degrees", "printed"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (30, 2.042)]
)
def test_quantile_is_that_of_printed_tables(degrees: int, printed: float) -> None:
    assert student_quantile(degrees) == pytest.approx(printed, abs=5e-4)


def test_quantile_and_interval_are_those_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    for degrees in (*range(1, 30), 100, 999):
        assert student_quantile(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=1e-12)
    values = [0.013, -0.004, 0.021, 0.008, 0.0]
    found, expected = compare_pairs(values), stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-12)


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ((-0.10, -0.11, -0.09), "better"),
        ((0.10, 0.11, 0.09), "worse"),
        ((0.10, -0.11, 0.09), "not told apart"),
        ((0.0, 0.0), "not told apart"),
        ((-0.1, -0.1), "better"),
        ((-0.1,), None),
    ],
)
def test_verdict(values: Sequence[float], verdict: str | None) -> None:
    found = compare_pairs(values)
    assert found.verdict == verdict
    assert (found.low is None) == (len(values) == 1)


def test_seeds_to_tell() -> None:
    assert seeds_to_tell(0.01, 0.01) == 8  # 2.8^2 = 7.84
    assert seeds_to_tell(0.01, -0.002) == 196
    assert seeds_to_tell(0.001, 1.0) == 2
    assert seeds_to_tell(0.0, 0.0) is None
    found = compare_pairs([0.01, 0.03])
    assert found.seeds_to_tell == math.ceil((2.8 * statistics.stdev([0.01, 0.03]) / 0.02) ** 2)


def test_seeds_to_tell_give_a_power_of_80_percent() -> None:
    draw = np.random.default_rng(7)
    seeds = seeds_to_tell(1.0, 0.5) or 0
    told = sum(compare_pairs(draw.normal(0.5, 1.0, seeds).tolist()).verdict == "worse" for _ in range(2000))
    assert 0.76 < told / 2000 < 0.84


def simulate(state: int) -> NDArray[np.float64]:
    """Differences (campaign, seed) of two equal arms.

    The final losses of a seed share its weights and batches: their deviation of 0.02 nats is common to both
    arms, and each has a part of its own, of 0.005.
    """
    draw = np.random.default_rng(state)
    shared = 3.3 + draw.normal(0, 0.02, (CAMPAIGNS, SEEDS, 1))
    one, other = np.moveaxis(shared + draw.normal(0, 0.005, (CAMPAIGNS, SEEDS, 2)), -1, 0)
    return np.asarray(one - other)


def is_called(differences: Sequence[float]) -> bool:
    return compare_pairs(differences).verdict != "not told apart"


def within(reach: float) -> Callable[[Sequence[float]], bool]:
    """The rule of an interval of `reach` standard errors instead of Student's."""
    return lambda values: (
        abs(statistics.fmean(values)) > reach * statistics.stdev(values) / len(values) ** 0.5
    )


def mean_false_calls(rule: Callable[[Sequence[float]], bool]) -> float:
    """Calls of 100 campaigns, the mean over all generator states."""
    calls = [sum(map(rule, simulate(state).tolist())) for state in range(STATES)]
    return statistics.fmean(calls)


def test_campaigns_of_equals_have_at_most_five_false_calls_in_a_hundred() -> None:
    """Of 10,000 campaigns 5% within three deviations of the binomial; negative controls without Student."""
    tolerance = 3 * 100 * math.sqrt(0.05 * 0.95 / (STATES * CAMPAIGNS))
    assert 5 - tolerance < mean_false_calls(is_called) < 5 + tolerance
    assert mean_false_calls(within(1.0)) > 5 + 10 * tolerance
    assert mean_false_calls(within(1.96)) > 5 + 5 * tolerance, "the normal distribution's quantile"
