"""Results of examples to scores: a value, its confidence interval, published results, a comparison."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from overnight.evaluation.multiple_choice import Choice
from overnight.evaluation.passages import Passage
from overnight.evaluation.perplexity import TextLoss, Unit, perplexity_of

Example = Choice | Passage
Numbers = tuple[float, ...]
"""Result of an example: nats of each ending; or nats of a passage, and whether it is greedy."""

LOSS_METRICS: dict[str, tuple[Unit, Literal["nats", "bits", "perplexity"]]] = {
    "nats_per_token": ("token", "nats"),
    "perplexity_per_token": ("token", "perplexity"),
    "perplexity_per_word": ("word", "perplexity"),
    "bits_per_byte": ("byte", "bits"),
    "bits_per_character": ("character", "bits"),
}
"""Metric -> the unit of text that the loss is divided by, and how the quotient is expressed."""

RESAMPLES = 2000
Z = 1.959963984540054  # 97.5% quantile of the normal distribution
SEED = 0
BATCH_DRAWS = 1 << 22  # 32 MB


LEAST_EXAMPLES = 20
"""A bootstrap of fewer examples gives intervals that are too narrow: none is stated."""


@dataclass(frozen=True)
class Interval:
    """95% confidence interval, if the examples are a random sample."""

    low: float
    high: float
    method: Literal["Wilson", "bootstrap"]


@dataclass(frozen=True)
class PublishedResult:
    """A published result. `whose` is the model."""

    whose: str
    value: float
    source: str


@dataclass(frozen=True)
class AccuracyComparison:
    """Another model on the same questions."""

    value: float
    only_here: int
    """Questions that only this model answers correctly."""
    only_there: int
    """Questions that only the other model answers correctly."""
    probability: float
    """p-value: the probability that two equally good models differ at least this much (McNemar)."""


@dataclass(frozen=True)
class LossComparison:
    """Another model on the same text."""

    value: float
    difference: Interval | None
    """Interval of this model's nats per token minus the other's (paired bootstrap); None if unpaired, or
    with fewer than LEAST_EXAMPLES examples."""
    is_paired: bool = True
    """False if the other model reads the text in different windows."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """One metric of one task."""

    task: str
    metric: str
    value: float
    examples: int
    kind: str
    """Kind of the examples: questions, passages, windows."""
    interval: Interval | None
    """None with fewer than LEAST_EXAMPLES examples, except for an accuracy."""
    chance: float | None = None
    """The accuracy of guessing."""
    references: tuple[PublishedResult, ...] = ()
    against: AccuracyComparison | LossComparison | None = None
    """The baseline, if there is one."""


@dataclass(frozen=True)
class TaskResult:
    """One model's results on all examples of a task, in their order."""

    examples: Sequence[Example]
    numbers: Sequence[Numbers]

    def correct(self, metric: str) -> list[bool]:
        """Which questions are answered correctly by one of ACCURACIES, or which passages are greedy."""
        return [
            example.predict(numbers, metric) == example.answer
            if isinstance(example, Choice)
            else bool(numbers[1])
            for example, numbers in zip(self.examples, self.numbers, strict=True)
        ]

    def text_loss(self, units: Mapping[Unit, float] | None) -> TextLoss:
        """The loss on a text of these units; without them each passage counts as one token and one word."""
        nats = tuple(numbers[0] for numbers in self.numbers)
        if units is None:
            return TextLoss(nats=nats, tokens=(1,) * len(nats), units={"word": len(nats)})
        scored = tuple(example.scored for example in self.examples if isinstance(example, Passage))
        return TextLoss(nats=nats, tokens=scored, units=units)


def score_accuracy(
    task: str, metric: str, kind: str, results: Sequence[TaskResult], chance: float | None = None
) -> Score:
    """The share of correct answers. `results` are the model's, and the baseline's if there is one."""
    correct, *others = [result.correct(metric) for result in results]
    return Score(
        task=task,
        metric=metric,
        value=sum(correct) / len(correct),
        examples=len(correct),
        kind=kind,
        interval=wilson(sum(correct), len(correct)),
        chance=chance,
        references=REFERENCES.get((task, metric), ()),
        against=compare_accuracies(correct, others[0]) if others else None,
    )


def score_text(
    task: str, metrics: Sequence[str], losses: Sequence[TextLoss], kind: str = "windows"
) -> list[Score]:
    """A text's loss in several units. `losses` are the model's, and the baseline's if there is one.

    The interval is that of the nats per token, over the examples.
    """
    loss, *others = losses
    interval, difference = bootstrap(loss.nats, loss.tokens), None
    is_paired = bool(others) and others[0].tokens == loss.tokens
    if is_paired:
        difference = bootstrap(np.subtract(loss.nats, others[0].nats).tolist(), loss.tokens)
    found = []
    for metric in metrics:
        unit, _ = LOSS_METRICS[metric]
        tokens_per_unit = loss.count("token") / loss.count(unit)
        expressed = None
        if interval:
            low, high = (_express(metric, end * tokens_per_unit) for end in (interval.low, interval.high))
            expressed = Interval(low, high, interval.method)
        values = [_express(metric, other.per(unit)) for other in others]
        against = [LossComparison(value, difference, is_paired) for value in values]
        found.append(
            Score(
                task=task,
                metric=metric,
                value=_express(metric, loss.per(unit)),
                examples=len(loss.nats),
                kind=kind,
                interval=expressed,
                references=REFERENCES.get((task, metric), ()),
                against=against[0] if against else None,
            )
        )
    return found


def _express(metric: str, nats: float) -> float:
    expressed_as = LOSS_METRICS[metric][1]
    if expressed_as == "bits":
        return nats * (1 / math.log(2))
    if expressed_as == "nats":
        return nats
    return perplexity_of(nats)


def compare_accuracies(here: Sequence[bool], there: Sequence[bool]) -> AccuracyComparison:
    """Two models' correct answers to the same questions, in the same order."""
    only_here = sum(one and not other for one, other in zip(here, there, strict=True))
    only_there = sum(other and not one for one, other in zip(here, there, strict=True))
    return AccuracyComparison(sum(there) / len(there), only_here, only_there, mcnemar(only_here, only_there))


def wilson(correct: int, count: int) -> Interval:
    """Wilson's interval of the proportion `correct / count`; valid near 0 and 1 as well (Wilson 1927)."""
    share = correct / count
    middle = (share + Z * Z / (2 * count)) / (1 + Z * Z / count)
    spread = Z / (1 + Z * Z / count) * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count))
    low = middle - spread if correct else 0.0  # exact, where rounding would leave a remainder
    high = middle + spread if correct < count else 1.0
    return Interval(max(0.0, low), min(1.0, high), "Wilson")


def bootstrap(sums: Sequence[float], counts: Sequence[float]) -> Interval | None:
    """Interval of sum(sums) / sum(counts); each example has one of both, such as a window's nats and tokens.

    With differences of two models' nats this is the paired bootstrap. Examples are
    resampled with replacement (Efron 1979), always with the same seed. None with fewer than LEAST_EXAMPLES.
    """
    if len(sums) < LEAST_EXAMPLES:
        return None
    nats, weights = np.asarray(sums), np.asarray(counts)
    random = np.random.default_rng(SEED)
    batch = max(1, BATCH_DRAWS // len(nats))
    ratios = []
    for first in range(0, RESAMPLES, batch):
        drawn = random.integers(0, len(nats), (min(batch, RESAMPLES - first), len(nats)))
        ratios.append(nats[drawn].sum(1) / weights[drawn].sum(1))
    low, high = np.quantile(np.concatenate(ratios), [0.025, 0.975])
    return Interval(float(low), float(high), "bootstrap")


def mcnemar(only_first: int, only_second: int) -> float:
    """The probability that two equally good models differ at least this much on the same questions.

    Only the questions that exactly one of them answers correctly matter; exact test (McNemar 1947).
    """
    count, fewer = only_first + only_second, min(only_first, only_second)
    log_all = math.lgamma(count + 1) - count * math.log(2)
    logs = [log_all - math.lgamma(each + 1) - math.lgamma(count - each + 1) for each in range(fewer + 1)]
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))


# ---------------------------------------------------------------- published results

OPENAI = ("OpenAI 124M", "OpenAI 355M", "OpenAI 774M", "OpenAI 1558M")
PAPER = "GPT-2 paper, table 3"
GPT3 = "GPT-3 paper, table H.1"
SCRIPT = "build-nanogpt, hellaswag.py"
HARNESS = "lm-eval, as reported in hellaswag.py"


def _paper(*values: float, source: str = PAPER) -> tuple[PublishedResult, ...]:
    """A column of the GPT-2 paper's table 3, by its four sizes."""
    return tuple(PublishedResult(whose, value, source) for whose, value in zip(OPENAI, values, strict=True))


def _gpt3(value: float, note: str = "") -> tuple[PublishedResult, ...]:
    return (PublishedResult("GPT-3 125M", value, f"{GPT3}{note}"),)


REFERENCES: Mapping[tuple[str, str], tuple[PublishedResult, ...]] = {
    ("hellaswag", "accuracy_per_token"): (
        PublishedResult("OpenAI 124M", 0.2955, SCRIPT),
        *_gpt3(0.337),
        PublishedResult("people", 0.956, "Zellers et al. 2019, table 1"),
    ),
    ("hellaswag", "accuracy_by_sum"): (PublishedResult("OpenAI 124M", 0.2859, SCRIPT),),
    ("hellaswag-lm-eval", "accuracy_per_character"): (PublishedResult("OpenAI 124M", 0.3114, HARNESS),),
    ("hellaswag-lm-eval", "accuracy_by_sum"): (PublishedResult("OpenAI 124M", 0.2892, HARNESS),),
    ("arc-easy", "accuracy_per_character"): _gpt3(0.436, ", by its own norm"),
    ("arc-challenge", "accuracy_per_character"): _gpt3(0.266, ", by its own norm"),
    ("openbookqa", "accuracy_per_character"): _gpt3(0.356, ", by its own norm"),
    ("piqa", "accuracy_per_token"): _gpt3(0.646),
    ("winogrande", "accuracy_by_sum"): _gpt3(0.520),
    ("boolq", "accuracy_by_sum"): _gpt3(0.497),
    ("copa", "accuracy_by_sum"): _gpt3(0.660),
    ("cbt-common-nouns", "accuracy_by_sum"): _paper(0.8765, 0.9235, 0.9345, 0.9330),
    ("cbt-named-entities", "accuracy_by_sum"): _paper(0.8340, 0.8710, 0.8800, 0.8905),
    ("lambada", "accuracy"): (
        *_paper(0.4599, 0.5548, 0.6012, 0.6324, source="GPT-2 table 3, stop words out"),
        *_gpt3(0.427),
    ),
    ("lambada", "perplexity_per_word"): (*_paper(35.13, 15.60, 10.87, 8.63), *_gpt3(18.6)),
    ("wikitext-2", "perplexity_per_word"): _paper(29.41, 22.76, 19.93, 18.34),
    ("wikitext-103", "perplexity_per_word"): _paper(37.50, 26.37, 22.05, 17.48),
    ("ptb", "perplexity_per_word"): _paper(65.85, 47.33, 40.31, 35.76),
    ("enwik8", "bits_per_byte"): _paper(1.16, 1.01, 0.97, 0.93),
    ("text8", "bits_per_character"): _paper(1.17, 1.06, 1.02, 0.98),
}
"""By task and metric. The paper calls its sizes 117M, 345M, 762M and 1542M; it does not say how much
context each word had when its perplexities were measured."""

VALIDATION_LOSSES = {
    "fineweb-edu": (PublishedResult("OpenAI 124M", 3.2924, "build-nanogpt, play.ipynb"),),
    "openwebtext": (PublishedResult("OpenAI 124M", 3.12, "nanoGPT, README"),),
}
"""By source, in nats per token of GPT-2's BPE, not comparable across texts. The validation documents of the
others are other samples of the same source."""
