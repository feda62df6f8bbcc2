"""Intervals against closed forms, scipy-free references and simulation."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from overnight.evaluation.scores import bootstrap, bootstrap_difference, mcnemar, wilson


def test_wilson_solves_its_own_equation() -> None:
    """Its ends are the shares from which the observed one is just 1.96 standard errors away."""
    for right, count in ((0, 10), (3, 10), (2967, 10_042), (10, 10)):
        found = wilson(right, count)
        for end in (found.low, found.high):
            if 0 < end < 1:
                error = math.sqrt(end * (1 - end) / count)
                assert abs(right / count - end) == pytest.approx(1.959964 * error, rel=1e-6, abs=1e-7)
    assert wilson(0, 10).low == pytest.approx(0, abs=1e-12)
    assert wilson(10, 10).high == pytest.approx(1)


def test_wilson_holds_what_it_promises() -> None:
    random = np.random.default_rng(1)
    drawn = random.binomial(50, 0.1, 4000)
    inside = [wilson(int(right), 50).low <= 0.1 <= wilson(int(right), 50).high for right in drawn]
    assert 0.93 < np.mean(inside) < 0.99


def test_a_bootstrap_of_a_mean_is_its_standard_error() -> None:
    random = np.random.default_rng(2)
    values = random.exponential(2.0, 3000)
    found = bootstrap(values.tolist(), [1.0] * len(values))
    error = values.std() / math.sqrt(len(values))
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert found.low < values.mean() < found.high
    assert bootstrap(values.tolist(), [1.0] * len(values)) == found, "the same each time"


def test_a_ratio_weighs_its_examples_by_their_counts() -> None:
    found = bootstrap([10.0, 0.0] * 500, [1.0, 9.0] * 500)
    assert found.low < 1.0 < found.high


def test_pairs_tell_what_two_intervals_can_not() -> None:
    random = np.random.default_rng(3)
    difficulty = random.normal(3.0, 1.0, 2000)
    first, second = difficulty + 0.02, difficulty + random.normal(0, 0.05, 2000)
    ones = [1.0] * 2000
    alone = bootstrap(first.tolist(), ones), bootstrap(second.tolist(), ones)
    assert alone[0].low < alone[1].high, "the intervals overlap"
    assert bootstrap_difference(first.tolist(), second.tolist(), ones).low > 0


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 0), (5, 5), (3, 9), (40, 60), (500, 700)])
def test_mcnemar_is_the_binomial_tail(first: int, second: int) -> None:
    count = first + second
    tail = sum(Fraction(math.comb(count, k), 2**count) for k in range(min(first, second) + 1))
    assert mcnemar(first, second) == pytest.approx(float(min(Fraction(1), 2 * tail)), rel=1e-9)
