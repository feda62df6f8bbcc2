"""What a task's examples add up to: a value, its interval, what others reached, another model beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from overnight.evaluation.multiple_choice import ChoiceResult
from overnight.evaluation.passages import SpanResult
from overnight.evaluation.perplexity import TextLoss, Unit
from overnight.evaluation.references import REFERENCES, PublishedResult

ACCURACIES = {
    "accuracy_per_token": "by_token",
    "accuracy_per_character": "by_character",
    "accuracy_by_sum": "by_sum",
}
"""Per token is build-nanogpt's, per character lm-eval's acc_norm, by sum both's plain accuracy."""

TO_BITS = 1 / math.log(2)


@dataclass(frozen=True, kw_only=True)
class Score:
    """One metric of one task."""

    task: str
    metric: str
    value: float
    examples: int
    kind: str
    """What the examples are: questions, passages, windows."""
    interval: Interval
    chance: float | None = None
    """What guessing reaches."""
    references: tuple[PublishedResult, ...] = ()
    against: AccuracyComparison | LossComparison | None = None


@dataclass(frozen=True)
class AccuracyComparison:
    """Another model on the same questions."""

    value: float
    only_here: int
    """Questions that it does not answer rightly, and this one does."""
    only_there: int
    probability: float
    """That two models that are as good differ at least so much (McNemar)."""


@dataclass(frozen=True)
class LossComparison:
    """Another model on the same text."""

    value: float
    difference: Interval | None
    """Of this one's nats per token less the other's (paired bootstrap); None where the two do not read the
    same windows."""


def score_choices(
    task: str,
    judged: Sequence[ChoiceResult],
    chance: float,
    against: Sequence[ChoiceResult] | None = None,
    metrics: Sequence[str] = tuple(ACCURACIES),
) -> list[Score]:
    """A task's accuracies from its questions; `against` are the same ones, judged by another model."""
    found = []
    for metric in metrics:
        here, there = (
            None if side is None else [bool(getattr(each, ACCURACIES[metric])) for each in side]
            for side in (judged, against)
        )
        assert here is not None
        found.append(_accuracy(task, metric, here, there, kind="questions", chance=chance))
    return found


def score_passages(
    task: str,
    scored: Sequence[SpanResult],
    measured: TextLoss,
    against: tuple[Sequence[SpanResult], TextLoss] | None,
) -> list[Score]:
    """The accuracy of greedy decoding on passages' last words, and their perplexity."""
    here = [each.is_greedy for each in scored]
    there = None if against is None else [each.is_greedy for each in against[0]]
    accuracy = _accuracy(task, "accuracy", here, there, kind="passages", chance=None)
    other = None if against is None else against[1]
    return [accuracy, *score_text(task, ("perplexity_per_word",), measured, other, kind="passages")]


def _exp(nats: float) -> float:
    """Infinite beyond 709 nats, where a float ends."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


LOSS_METRICS: dict[str, tuple[Unit, Callable[[float], float]]] = {
    "nats_per_token": ("token", float),
    "perplexity_per_token": ("token", _exp),
    "perplexity_per_word": ("word", _exp),
    "bits_per_byte": ("byte", lambda nats: nats * TO_BITS),
    "bits_per_character": ("character", lambda nats: nats * TO_BITS),
}
"""What the nats are divided by, and what is made of that."""


def score_text(
    task: str,
    metrics: Sequence[str],
    measured: TextLoss,
    against: TextLoss | None = None,
    kind: str = "windows",
) -> list[Score]:
    """A text's losses. The interval is that of the nats per token, over the examples, in other units."""
    interval = bootstrap(measured.nats, measured.tokens)
    difference = None
    if against is not None and against.tokens == measured.tokens:
        difference = bootstrap_difference(measured.nats, against.nats, measured.tokens)
    found = []
    for metric in metrics:
        unit, convert = LOSS_METRICS[metric]
        tokens_per_unit = measured.count("token") / measured.count(unit)
        low, high = (convert(end * tokens_per_unit) for end in (interval.low, interval.high))
        other = None if against is None else LossComparison(convert(against.per(unit)), difference)
        found.append(
            Score(
                task=task,
                metric=metric,
                value=convert(measured.per(unit)),
                examples=len(measured.nats),
                kind=kind,
                interval=Interval(low, high, interval.method),
                references=REFERENCES.get((task, metric), ()),
                against=other,
            )
        )
    return found


def compare_scores(here: Sequence[bool], there: Sequence[bool]) -> AccuracyComparison:
    """Two models on the same questions, in the same order."""
    only_here = sum(one and not other for one, other in zip(here, there, strict=True))
    only_there = sum(other and not one for one, other in zip(here, there, strict=True))
    share = sum(there) / len(there)
    return AccuracyComparison(share, only_here, only_there, mcnemar(only_here, only_there))


def _accuracy(
    task: str, metric: str, here: Sequence[bool], there: Sequence[bool] | None, **told: Any
) -> Score:
    right = sum(here)
    return Score(
        task=task,
        metric=metric,
        value=right / len(here),
        examples=len(here),
        interval=wilson(right, len(here)),
        references=REFERENCES.get((task, metric), ()),
        against=None if there is None else compare_scores(here, there),
        **told,
    )


# ---------------------------------------------------------------- how far a result may be off


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
