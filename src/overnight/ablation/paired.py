"""Differences of paired runs: their mean, Student's interval, a verdict. Needs no torch."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

CONFIDENCE = 0.95
# 1.96 + 0.84: quantiles of the normal distribution for two-sided 5% and for a power of 80%.
TOLD_WITH_80_PERCENT = 2.8

Verdict = Literal["better", "worse", "not told apart"]


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """The differences of an arm from the baseline, one for each seed; lower is better."""

    mean: float
    deviation: float | None = None
    """Standard deviation over seeds; None of a single seed, like all that follows."""
    low: float | None = None
    high: float | None = None
    """Ends of Student's 95% interval of the mean."""
    verdict: Verdict | None = None
    """better or worse if the interval does not contain 0."""
    seeds_to_tell: int | None = None
    """Seeds with which a true difference of `mean` is detected in 80% of campaigns: (2.8 deviation / mean)^2,
    at least 2. None also if the mean is 0."""
    values: tuple[float, ...]


def compare_pairs(values: Sequence[float]) -> PairedDifference:
    """The mean of at least one difference, with its interval if there are two or more."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return PairedDifference(mean=mean, values=tuple(values))
    deviation = statistics.stdev(values)
    reach = student_quantile(len(values) - 1) * deviation / math.sqrt(len(values))
    low, high = mean - reach, mean + reach
    return PairedDifference(
        mean=mean,
        deviation=deviation,
        low=low,
        high=high,
        verdict="better" if high < 0 else "worse" if low > 0 else "not told apart",
        seeds_to_tell=seeds_to_tell(deviation, mean),
        values=tuple(values),
    )


def seeds_to_tell(deviation: float, effect: float) -> int | None:
    """Seeds with which this effect is detected in 80% of campaigns, at least 2; None for no effect."""
    if effect == 0:
        return None
    return max(2, math.ceil((TOLD_WITH_80_PERCENT * deviation / effect) ** 2))


@functools.cache
def student_quantile(degrees: int, confidence: float = CONFIDENCE) -> float:
    """The t with P(|T| <= t) = `confidence`, for `degrees` degrees of freedom, by bisection."""
    low, high = 0.0, 1.0
    while student_probability(high, degrees) < confidence:
        high *= 2
    while low < (middle := (low + high) / 2) < high:
        if student_probability(middle, degrees) < confidence:
            low = middle
        else:
            high = middle
    return high


def student_probability(t: float, degrees: int) -> float:
    """P(|T| <= t), by the finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    is_odd = degrees % 2
    term = cosine if is_odd else 1.0
    total = term if degrees > 1 else 0.0
    for power in range(2 + is_odd, degrees - 1, 2):
        term *= cosine * cosine * (power - 1) / power
        total += term
    return 2 / math.pi * (angle + sine * total) if is_odd else sine * total
