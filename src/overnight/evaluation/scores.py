"""Results of examples to scores: a value, its confidence interval, published results, a comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from overnight.evaluation.choice_tasks import ChoiceTask
from overnight.evaluation.multiple_choice import Choice
from overnight.evaluation.perplexity import TextLoss, Unit
from overnight.evaluation.references import REFERENCES, PublishedResult

LOSS_METRICS: dict[str, tuple[Unit, Literal["nats", "bits", "perplexity"]]] = {
    "nats_per_token": ("token", "nats"),
    "perplexity_per_token": ("token", "perplexity"),
    "perplexity_per_word": ("word", "perplexity"),
    "bits_per_byte": ("byte", "bits"),
    "bits_per_character": ("character", "bits"),
}
"""The unit of text that the loss is divided by, and how the quotient is expressed."""

RESAMPLES = 2000
Z = 1.959963984540054  # 97.5% quantile of the normal distribution
SEED = 0
BATCH_DRAWS = 1 << 22  # 32 MB


@dataclass(frozen=True)
class Interval:
    """95% confidence interval, if the examples are a random sample."""

    low: float
    high: float
    method: Literal["Wilson", "bootstrap"]


@dataclass(frozen=True)
class AccuracyComparison:
    """Another model on the same questions."""

    value: float
    only_here: int
    """Questions that only this model answers correctly."""
    only_there: int
    """Questions that only the other model answers correctly."""
    probability: float
    """Of two equally good models differing at least this much (McNemar)."""


@dataclass(frozen=True)
class LossComparison:
    """Another model on the same text."""

    value: float
    difference: Interval | None
    """Of this model's nats per token minus the other's (paired bootstrap); None if their windows differ."""


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
    """The accuracy of guessing."""
    references: tuple[PublishedResult, ...] = ()
    against: AccuracyComparison | LossComparison | None = None
    """The baseline, if there is one."""


def score_choices(
    task: ChoiceTask,
    choices: Sequence[Choice],
    results: Sequence[Sequence[float]],
    baseline: Sequence[Sequence[float]] | None = None,
) -> list[Score]:
    """A task's accuracies, from the nats of each question's endings; `baseline` is another model's."""
    found = []
    for metric in task.metrics:
        correct = _correct(choices, results, metric)
        others = None if baseline is None else _correct(choices, baseline, metric)
        found.append(_accuracy(task.name, metric, "questions", correct, others, task.chance))
    return found


def _correct(choices: Sequence[Choice], results: Sequence[Sequence[float]], metric: str) -> list[bool]:
    """Which questions are answered correctly."""
    pairs = zip(choices, results, strict=True)
    return [choice.predict(nats, metric) == choice.answer for choice, nats in pairs]


def score_passages(
    task: str, results: Sequence[Sequence[float]], baseline: Sequence[Sequence[float]] | None = None
) -> list[Score]:
    """Accuracy of greedy decoding and perplexity, from (nats, is greedy) of each passage's last word."""
    correct = [bool(is_greedy) for _, is_greedy in results]
    others = None if baseline is None else [bool(is_greedy) for _, is_greedy in baseline]
    accuracy = _accuracy(task, "accuracy", "passages", correct, others, None)
    loss, other = _word_loss(results), None if baseline is None else _word_loss(baseline)
    return [accuracy, *score_text(task, ("perplexity_per_word",), loss, other, kind="passages")]


def _word_loss(results: Sequence[Sequence[float]]) -> TextLoss:
    """Each passage's last word counts as one token, however many ids it has."""
    nats = tuple(each[0] for each in results)
    return TextLoss(nats=nats, tokens=(1,) * len(nats), units={"word": len(nats)})


def score_text(
    task: str, metrics: Sequence[str], loss: TextLoss, baseline: TextLoss | None = None, kind: str = "windows"
) -> list[Score]:
    """A text's loss in several units. The interval is that of the nats per token, over the examples."""
    interval = bootstrap(loss.nats, loss.tokens)
    difference = None
    if baseline is not None and baseline.tokens == loss.tokens:
        difference = bootstrap_difference(loss.nats, baseline.nats, loss.tokens)
    found = []
    for metric in metrics:
        unit, _ = LOSS_METRICS[metric]
        tokens_per_unit = loss.count("token") / loss.count(unit)
        low, high = (_express(metric, end * tokens_per_unit) for end in (interval.low, interval.high))
        other = None
        if baseline is not None:
            other = LossComparison(_express(metric, baseline.per(unit)), difference)
        found.append(
            Score(
                task=task,
                metric=metric,
                value=_express(metric, loss.per(unit)),
                examples=len(loss.nats),
                kind=kind,
                interval=Interval(low, high, interval.method),
                references=REFERENCES.get((task, metric), ()),
                against=other,
            )
        )
    return found


def _express(metric: str, nats: float) -> float:
    expressed_as = LOSS_METRICS[metric][1]
    if expressed_as == "bits":
        return nats * (1 / math.log(2))
    if expressed_as == "nats":
        return nats
    try:
        return math.exp(nats)
    except OverflowError:  # beyond 709 nats
        return math.inf


def _accuracy(
    task: str, metric: str, kind: str, correct: list[bool], baseline: list[bool] | None, chance: float | None
) -> Score:
    return Score(
        task=task,
        metric=metric,
        value=sum(correct) / len(correct),
        examples=len(correct),
        kind=kind,
        interval=wilson(sum(correct), len(correct)),
        chance=chance,
        references=REFERENCES.get((task, metric), ()),
        against=None if baseline is None else compare_accuracies(correct, baseline),
    )


def compare_accuracies(here: Sequence[bool], there: Sequence[bool]) -> AccuracyComparison:
    """Two models' correct answers to the same questions, in the same order."""
    only_here = sum(one and not other for one, other in zip(here, there, strict=True))
    only_there = sum(other and not one for one, other in zip(here, there, strict=True))
    return AccuracyComparison(sum(there) / len(there), only_here, only_there, mcnemar(only_here, only_there))


def wilson(correct: int, count: int) -> Interval:
    """Of the proportion `correct / count`; valid near 0 and 1 as well (Wilson 1927)."""
    share = correct / count
    middle = (share + Z * Z / (2 * count)) / (1 + Z * Z / count)
    spread = Z / (1 + Z * Z / count) * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count))
    low = middle - spread if correct else 0.0  # exact, where rounding would leave a remainder
    high = middle + spread if correct < count else 1.0
    return Interval(max(0.0, low), min(1.0, high), "Wilson")


def bootstrap(sums: Sequence[float], counts: Sequence[float]) -> Interval:
    """Of sum(sums) / sum(counts), each example having one of both: nats and tokens of a window, say.

    Examples are resampled with replacement (Efron 1979), always with the same seed.
    """
    low, high = np.quantile(_resampled(np.asarray(sums), np.asarray(counts)), [0.025, 0.975])
    return Interval(float(low), float(high), "bootstrap")


def bootstrap_difference(
    first: Sequence[float], second: Sequence[float], counts: Sequence[float]
) -> Interval:
    """Of (sum(first) - sum(second)) / sum(counts): two models evaluated on the same examples."""
    return bootstrap(np.subtract(first, second).tolist(), counts)


def _resampled(sums: NDArray[np.float64], counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """The ratio of each of RESAMPLES samples."""
    random = np.random.default_rng(SEED)
    batch = max(1, BATCH_DRAWS // len(sums))
    found = []
    for first in range(0, RESAMPLES, batch):
        drawn = random.integers(0, len(sums), (min(batch, RESAMPLES - first), len(sums)))
        found.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    return np.concatenate(found)


def mcnemar(only_first: int, only_second: int) -> float:
    """The probability that two equally good models differ at least this much on the same questions.

    Only the questions that exactly one of them answers correctly matter; exact test (McNemar 1947).
    """
    count, fewer = only_first + only_second, min(only_first, only_second)
    logs = [_log_choose(count, number) - count * math.log(2) for number in range(fewer + 1)]
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))


def _log_choose(count: int, number: int) -> float:
    return math.lgamma(count + 1) - math.lgamma(number + 1) - math.lgamma(count - number + 1)
