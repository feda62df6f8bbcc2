"""How far a result may be off: 95% intervals of shares and means; tests of two models on the same text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
Z = 1.959963984540054  # of the normal distribution, 97.5% lie below
SEED = 0
DRAWN_AT_ONCE = 1 << 22  # numbers, in 32 MB


@dataclass(frozen=True)
class Interval:
    """Where the value lies with 95% confidence, if the examples were drawn at random from many more."""

    low: float
    high: float
    method: Literal["Wilson", "bootstrap"]


def wilson(right: int, count: int) -> Interval:
    """Of a share, `right` of `count`: holds near 0 and 1 as well (Wilson 1927)."""
    share = right / count
    middle = (share + Z * Z / (2 * count)) / (1 + Z * Z / count)
    spread = Z / (1 + Z * Z / count) * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count))
    low = middle - spread if right else 0.0  # to the digit, where rounding would leave a little
    high = middle + spread if right < count else 1.0
    return Interval(max(0.0, low), min(1.0, high), "Wilson")


def bootstrap(sums: Sequence[float], counts: Sequence[float]) -> Interval:
    """Of sum(sums) / sum(counts), where each example has one of either: nats and tokens of a document, say.

    Examples are drawn again with replacement (Efron 1979); the noise is always the same.
    """
    low, high = np.quantile(_resampled(np.asarray(sums), np.asarray(counts)), [0.025, 0.975])
    return Interval(float(low), float(high), "bootstrap")


def bootstrap_difference(
    first: Sequence[float], second: Sequence[float], counts: Sequence[float]
) -> Interval:
    """Of sum(first) / sum(counts) less sum(second) / sum(counts): two models judged on the same examples."""
    return bootstrap(np.subtract(first, second).tolist(), counts)


def mcnemar(only_first: int, only_second: int) -> float:
    """The probability that two models that are as good differ at least so much on the same questions.

    Only questions count that one of them answers rightly and the other does not; exact (McNemar 1947).
    """
    count, fewer = only_first + only_second, min(only_first, only_second)
    logs = [_log_choose(count, number) - count * math.log(2) for number in range(fewer + 1)]
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))


def _log_choose(count: int, number: int) -> float:
    return math.lgamma(count + 1) - math.lgamma(number + 1) - math.lgamma(count - number + 1)


def _resampled(sums: NDArray[np.float64], counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """The ratio of each of RESAMPLES samples."""
    random = np.random.default_rng(SEED)
    at_once = max(1, DRAWN_AT_ONCE // len(sums))
    found = []
    for first in range(0, RESAMPLES, at_once):
        drawn = random.integers(0, len(sums), (min(at_once, RESAMPLES - first), len(sums)))
        found.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    return np.concatenate(found)
