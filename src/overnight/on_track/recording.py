"""Several healthy runs that differ in their seed -> the band in which another one is expected to lie."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from overnight.on_track.band import IDENTITY, SETTINGS, Curve
from overnight.on_track.course import Course

DEVIATIONS = 4.0
"""Half of a band's width in standard deviations: a run is compared at a hundred places, and a handful of
seeds gives their spread only roughly."""
NEIGHBOURS = 2
"""Points on each side whose spread is pooled with a point's own."""
LEAST = {
    "loss": 0.01,
    "validation_loss": 0.01,
    "gap": 0.02,
    "grad_norm": 0.1,
    "grad_norm_peak": 0.25,
    "learning_rate": 0.01,
    "norm_gain": 0.005,
    "residual_ratio": 0.1,
}
"""The least half width of each curve: as a share of the middle, the gap in nats. Chosen, not measured: what
another version of a library, another number of threads or another precision may move a healthy run by."""
MULTIPLY = frozenset({"grad_norm", "grad_norm_peak"})
"""Quantities that spread by factors."""


def record_curves(courses: Sequence[Course]) -> dict[str, Curve]:
    """The bands of all curves, at the tokens that all runs have a point at.

    Raises ValueError for fewer than two runs, and where one's values are not finite.
    """
    if len(courses) < 2:
        raise ValueError("a band needs two runs or more: give more seeds")
    return {name: _band(name, courses) for name in LEAST if all(name in course for course in courses)}


def describe_settings(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """`IDENTITY` and `SETTINGS` among a recipe's flat settings."""
    return {name: settings.get(name) for name in IDENTITY}, {name: settings.get(name) for name in SETTINGS}


def _band(name: str, courses: Sequence[Course]) -> Curve:
    runs = [dict(course[name]) for course in courses]
    tokens = sorted(set.intersection(*map(set, runs)))
    to, back = (math.log, math.exp) if name in MULTIPLY else (_as_it_is, _as_it_is)
    rows = [[to(run[at]) for run in runs] for at in tokens]
    if not all(math.isfinite(value) for row in rows for value in row):
        raise ValueError(f"a run whose {name} is not finite is no reference: leave it out")
    middles = [statistics.fmean(row) for row in rows]
    variances = [statistics.variance(row) for row in rows]
    start = int(tokens[0] == 0)  # before the first step nothing has spread yet
    spreads = [
        *(math.sqrt(each * (1 + 1 / len(runs))) for each in variances[:start]),
        *_pooled(variances[start:], len(runs)),
    ]
    halves = [
        max(_least(name, middle), DEVIATIONS * spread)
        for middle, spread in zip(middles, spreads, strict=True)
    ]
    sides = list(zip(middles, halves, strict=True))
    return Curve(
        tokens=tuple(tokens),
        low=tuple(_rounded(back(middle - half)) for middle, half in sides),
        middle=tuple(_rounded(back(middle)) for middle in middles),
        high=tuple(_rounded(back(middle + half)) for middle, half in sides),
    )


def _pooled(variances: Sequence[float], runs: int) -> list[float]:
    """The standard deviation of a new run about the mean of so many, at each point.

    It is the larger of the point's own and that of its neighbourhood, whose variances are pooled
    as their logarithms, since they fall by factors in the course of a run. Of few runs these are too small on
    average, by ln x - digamma(x) with x = (runs - 1) / 2, which is about 1 / 2x + 1 / 12x^2.
    """
    degrees = runs - 1
    correction = math.exp(1 / degrees + 1 / (3 * degrees**2))
    found = []
    for at, own in enumerate(variances):
        around = [each for each in variances[max(0, at - NEIGHBOURS) : at + NEIGHBOURS + 1] if each > 0]
        pooled = correction * statistics.geometric_mean(around) if around else 0.0
        found.append(math.sqrt(max(own, pooled) * (1 + 1 / runs)))
    return found


def _least(name: str, middle: float) -> float:
    if name in MULTIPLY:
        return math.log1p(LEAST[name])
    return LEAST[name] if name == "gap" else LEAST[name] * abs(middle)


def _as_it_is(value: float) -> float:
    return value


def _rounded(value: float) -> float:
    """Six digits: no curve is known to more."""
    return float(f"{value:.6g}")
