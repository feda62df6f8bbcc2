"""Long series made fit for a picture: columns of a metrics file, smoothed and thinned. Numbers only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Series = NDArray[np.float64]

WINDOWS_PER_RUN = 100
"""A smoothed curve averages over one part in so many; below twice that, there is nothing to average."""


def column(lines: Sequence[Mapping[str, Any]], key: str) -> Series:
    """`key` of every line as float64; NaN where a line has no such number."""
    values = (line.get(key) for line in lines)
    return np.array([value if isinstance(value, int | float) else np.nan for value in values], np.float64)


def median(series: Series) -> float | None:
    """The median of the finite values; None if there is none."""
    finite = series[np.isfinite(series)]
    return float(np.median(finite)) if finite.size else None


def smoothed(series: Series, weights: Series | None = None, window: int | None = None) -> Series:
    """The weighted mean over `window` neighbours of each value; values that are not finite count for nothing.

    Centred, so that nothing is delayed. Near the start the window narrows on both sides, since a
    falling loss would be flattened there; near the end it is cut off on the right only, since a single
    last value would be noise. `window` defaults to a hundredth of the series. With tokens as weights,
    the mean of losses is the loss of those tokens.
    """
    count = len(series)
    reach = (max(1, count // WINDOWS_PER_RUN) if window is None else window) // 2
    is_finite = np.isfinite(series)
    weights = np.where(is_finite, 1.0 if weights is None else weights, 0.0)
    sums = np.concatenate([[0.0], np.cumsum(np.where(is_finite, series, 0.0) * weights)])
    totals = np.concatenate([[0.0], np.cumsum(weights)])
    at = np.arange(count)
    left = at - np.minimum(reach, at)
    right = np.minimum(at + np.minimum(reach, at) + 1, count)
    total = totals[right] - totals[left]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(total > 0, (sums[right] - sums[left]) / total, np.nan)


def thinned(series: Series, points: int) -> NDArray[np.int64]:
    """Indices of at most `points` values that look like the whole series: each stretch's lowest and highest.

    A spike of a single step stays visible. The first and the last value are always kept.
    """
    count = len(series)
    if count <= points:
        return np.arange(count)
    edges = np.linspace(0, count, max(1, (points - 2) // 2) + 1).astype(int)
    kept = {0, count - 1}
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        stretch = series[start:stop]
        if np.isfinite(stretch).any():
            kept |= {start + int(np.nanargmin(stretch)), start + int(np.nanargmax(stretch))}
    return np.array(sorted(kept), np.int64)


def tokens_of_each_step(tokens: Series) -> Series:
    """How many tokens each line's step saw, from the cumulative counts; the first line counts from zero."""
    return np.diff(tokens, prepend=0.0)


def spread(positions: Sequence[float], gap: float) -> list[float]:
    """Positions at least `gap` apart, in the same order and as near to the wanted ones as that allows."""
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    groups: list[tuple[float, list[int]]] = []
    for index in order:
        groups.append((positions[index], [index]))
        while len(groups) > 1 and _overlap(groups[-2], groups[-1], gap):
            (low, before), (high, after) = groups[-2:]
            middle = (low * len(before) + high * len(after)) / (len(before) + len(after))
            groups[-2:] = [(middle, before + after)]
    placed = [0.0] * len(positions)
    for middle, members in groups:
        for rank, index in enumerate(members):
            placed[index] = middle + (rank - (len(members) - 1) / 2) * gap
    return placed


def _overlap(low: tuple[float, list[int]], high: tuple[float, list[int]], gap: float) -> bool:
    return high[0] - low[0] < gap * (len(low[1]) + len(high[1])) / 2
