"""The known mistakes, each by what gives it away. The first that fits is the likeliest.

First come those that are seen directly (a learning rate, a weight, a gradient), then those that are told from
how losses lie to one another. Five are from the diary of a reproduction of GPT-2 (repgpt): the schedule, the
initialisation, dropout, exploding gradients, the scale of the loss.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from overnight.baselines.band import BandPoint

SPIKE = 10.0
"""A gradient norm so many times above the highest of the reference is an explosion."""
LARGE = 1.5
"""A gradient norm off by less is no matter of scale."""
FAR_BELOW = 0.93
"""Losses under this share of the reference's are no luck. Chosen, not measured."""


class Deviation(NamedTuple):
    """A run's value beside the reference at one place."""

    tokens: int
    value: float
    reference: BandPoint

    @property
    def excess(self) -> float:
        """How far from the middle: -1 and 1 at the band's edges."""
        return self.reference.excess(self.value)

    @property
    def ratio(self) -> float:
        """The value by the reference's middle."""
        return self.value / self.reference.middle


@dataclass(frozen=True, kw_only=True)
class RunStats:
    """What is known of a run, for the mistakes to look at."""

    curves: Mapping[str, Sequence[Deviation]]
    """By the curve's name, in order; curves that the reference lacks are left out."""
    applied_rates: Sequence[float]
    """The optimizer's learning rate by the logged one, at each evaluation."""
    is_same_schedule: bool
    """Whether the recipe asks for the reference's learning rates."""
    micro_batches: int | None
    """Of each step, if the recipe tells."""
    unigram_nats: float | None

    def last(self, name: str) -> Deviation | None:
        """A curve's latest place."""
        return self.curves[name][-1] if self.curves.get(name) else None

    def first(self, name: str) -> Deviation | None:
        """A curve's earliest place."""
        return self.curves[name][0] if self.curves.get(name) else None


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """A known mistake."""

    name: str
    look_at: str
    """Where it is usually made."""
    evidence: Callable[[RunStats], str | None]
    """What points to it, with the reference's number beside its own; None if nothing does."""


def learning_rate_factor(seen: RunStats) -> str | None:
    """The rate is the reference's times a constant, or the optimizer's is the logged one's."""
    applied = _constant(seen.applied_rates)
    if applied is not None and _is_off(applied):
        return f"the optimizer uses {applied:.3g} times the learning rate that is logged"
    rates = [each for each in seen.curves.get("learning_rate", ()) if each.reference.middle > 0]
    factor = _constant([each.ratio for each in rates])
    if not seen.is_same_schedule or factor is None or not _is_off(factor):
        return None
    last = rates[-1]
    return (
        f"the learning rate is {factor:.3g} times the reference's from the start "
        f"({last.value:.3g}, reference {last.reference.middle:.3g})"
    )


def learning_rate_course(seen: RunStats) -> str | None:
    """The rate leaves the reference's course."""
    if len(seen.applied_rates) > 1 and _constant(seen.applied_rates) is None:
        return (
            f"the optimizer's learning rate is {min(seen.applied_rates):.3g} to "
            f"{max(seen.applied_rates):.3g} times the one that is logged"
        )
    rates = seen.curves.get("learning_rate", ())
    outside = [each for each in rates if abs(each.excess) > 1]
    if not seen.is_same_schedule or not outside:
        return None
    since, last = outside[0], outside[-1]
    return (
        f"from {since.tokens:,} tokens on the learning rate is not the reference's "
        f"(now {last.value:.3g}, reference {last.reference.middle:.3g})"
    )


def residual_scale(seen: RunStats) -> str | None:
    """At the start, what writes into the residual stream is as large as everything else."""
    first = seen.first("residual_ratio")
    if first is None or first.tokens or first.excess <= 1:
        return None
    return (
        f"before the first step the weights that write into the residual stream spread "
        f"{first.value:.3g} times as wide as c_fc's, the reference's {first.reference.middle:.3g} times"
    )


def other_beginning(seen: RunStats) -> str | None:
    """The loss before the first update is not the reference's."""
    first = seen.first("loss")
    if first is None or abs(first.excess) <= 1:
        return None
    return f"the first step's loss is {first.value:.4g}, {_beside(first.reference)}"


def summed_gradients(seen: RunStats) -> str | None:
    """From the first step the gradient is a number of micro-batches times too large."""
    factor = _gradient_factor(seen)
    if factor is None or seen.micro_batches is None:
        return None
    nearest = round(factor)
    if nearest < 2 or seen.micro_batches % nearest or not _is_near(factor, nearest):
        return None
    return _gradient_words(seen, factor) + f"; a step has {seen.micro_batches:,} micro-batches"


def scaled_gradients(seen: RunStats) -> str | None:
    """From the first step the gradient is a constant factor too large or too small, the loss is not."""
    factor = _gradient_factor(seen)
    return None if factor is None else _gradient_words(seen, factor)


def explosion(seen: RunStats) -> str | None:
    """Single steps' gradients tower above all of the reference's, or the loss is not finite any more."""
    broken = [each for each in seen.curves.get("loss", ()) if not math.isfinite(each.value)]
    if broken:
        return f"the training loss is not finite after {broken[0].tokens:,} tokens"
    spikes = [
        each for each in seen.curves.get("grad_norm_peak", ()) if each.value > SPIKE * each.reference.high
    ]
    if not spikes or _gradient_factor(seen) is not None:
        return None
    worst = max(spikes, key=lambda each: each.ratio)
    return (
        f"the gradient norm has reached {worst.value:.3g} before {worst.tokens:,} tokens, where the "
        f"reference's highest is {worst.reference.middle:.3g}"
    )


def decayed_norms(seen: RunStats) -> str | None:
    """The gains of the layer norms are smaller than the reference's."""
    last = seen.last("norm_gain")
    if last is None or last.excess >= -1:
        return None
    return f"the layer norms' mean gain is {last.value:.4g}, {_beside(last.reference)}"


def seen_future(seen: RunStats) -> str | None:
    """Training and validation loss are far below what the text allows such a model."""
    training, validation = seen.last("loss"), seen.last("validation_loss")
    if training is None or validation is None:
        return None
    if min(training.excess, validation.excess) >= -1 or max(training.ratio, validation.ratio) > FAR_BELOW:
        return None
    return (
        f"training and validation loss are {training.value:.4g} and {validation.value:.4g}, far below the "
        f"reference's {training.reference.middle:.4g} and {validation.reference.middle:.4g}"
    )


def repeated_data(seen: RunStats) -> str | None:
    """The validation loss lies further above the training loss than the reference's."""
    gap, training = seen.last("gap"), seen.last("loss")
    if gap is None or training is None or gap.excess <= 1 or training.excess > 0:
        return None
    return _gap_words(gap)


def dropout(seen: RunStats) -> str | None:
    """The training loss is too high for the validation loss, which is judged without dropout."""
    gap, training = seen.last("gap"), seen.last("loss")
    if gap is None or training is None or gap.excess >= -1 or training.excess < 0:
        return None
    return _gap_words(gap)


def shuffled_tokens(seen: RunStats) -> str | None:
    """The training loss stays where knowing only how frequent each token is would leave it."""
    last, unigram = seen.last("loss"), seen.unigram_nats
    if last is None or unigram is None or last.reference.high > 0.9 * unigram:
        return None
    learnt = (unigram - last.value) / (unigram - last.reference.middle)
    if not -0.5 < learnt < 0.3:
        return None
    return (
        f"the training loss stays at {last.value:.4g}, near the {unigram:.4g} of knowing only how frequent "
        f"each token is; the reference is at {last.reference.middle:.4g}"
    )


MISTAKES: tuple[Diagnosis, ...] = (
    Diagnosis(
        name="the learning rate is off by a factor",
        look_at="peak_learning_rate, and what sets the optimizer's groups each step",
        evidence=learning_rate_factor,
    ),
    Diagnosis(
        name="the learning-rate schedule is off",
        look_at="warm-up, decay and length of the schedule, and the step that it is given",
        evidence=learning_rate_course,
    ),
    Diagnosis(
        name="the initialisation lacks the residual scale",
        look_at="c_proj of attention and feed-forward: N(0, 0.02 / sqrt(2 n_layer))",
        evidence=residual_scale,
    ),
    Diagnosis(
        name="the weights begin otherwise",
        look_at="the initialisation, what the run starts from, and the vocabulary",
        evidence=other_beginning,
    ),
    Diagnosis(
        name="gradients are summed over micro-batches, not averaged",
        look_at="what a micro-batch's loss is divided by before its backward pass",
        evidence=summed_gradients,
    ),
    Diagnosis(
        name="gradients are scaled and not scaled back",
        look_at="the loss scaling, and where it is undone before clipping",
        evidence=scaled_gradients,
    ),
    Diagnosis(
        name="gradients explode",
        look_at="clipping, the learning rate, and the batches of those steps",
        evidence=explosion,
    ),
    Diagnosis(
        name="layer norms are decayed",
        look_at="the optimizer's groups: only matrices and embeddings decay",
        evidence=decayed_norms,
    ),
    Diagnosis(
        name="the model sees what it is to predict",
        look_at="the causal mask, and that targets are the ids one place later",
        evidence=seen_future,
    ),
    Diagnosis(
        name="the training data repeats",
        look_at="the order of the rows: how many different ones an epoch has",
        evidence=repeated_data,
    ),
    Diagnosis(
        name="dropout is on",
        look_at="every dropout in the model, also attention's, while training",
        evidence=dropout,
    ),
    Diagnosis(
        name="tokens are shuffled within rows",
        look_at="how rows are cut from the shards, and that targets follow their ids",
        evidence=shuffled_tokens,
    ),
)
"""Likeliest first."""


def count_micro_batches(settings: Mapping[str, Any]) -> int | None:
    """Of a full step, from a run's flat settings; None if they do not tell."""
    names = ("tokens_per_step", "micro_batch_size", "context_length")
    step, rows, length = (settings.get(name) for name in names)
    return step // (rows * length) if step and rows and length else None


def _constant(ratios: Sequence[float]) -> float | None:
    """What all of them are to 3%; None if they differ, or there are none."""
    if not ratios:
        return None
    middle = statistics.median(ratios)
    return middle if all(_is_near(ratio, middle) for ratio in ratios) else None


def _is_off(factor: float) -> bool:
    return not _is_near(factor, 1.0)


def _is_near(value: float, other: float) -> bool:
    return math.isclose(value, other, rel_tol=0.03)


def _gradient_factor(seen: RunStats) -> float | None:
    """What the first step's gradient norm is multiplied by; None if that is no constant factor.

    The first step's loss is the reference's, and the later norms are off the same way.
    """
    norms, first_loss = seen.curves.get("grad_norm", ()), seen.first("loss")
    if not norms or first_loss is None or abs(first_loss.excess) > 1 or abs(norms[0].excess) <= 1:
        return None
    factor = norms[0].ratio
    typical = statistics.median(each.ratio for each in norms)
    is_large = max(factor, 1 / factor) > LARGE and max(typical, 1 / typical) > LARGE
    return factor if is_large and (factor > 1) == (typical > 1) else None


def _gradient_words(seen: RunStats, factor: float) -> str:
    first = seen.curves["grad_norm"][0]
    return (
        f"the first step's gradient norm is {first.value:.3g}, {factor:.3g} times the reference's "
        f"{first.reference.middle:.3g}, with the reference's loss"
    )


def _gap_words(gap: Deviation) -> str:
    return (
        f"the validation loss is {_signed(gap.value)} nats from the training loss, in the reference "
        f"{_signed(gap.reference.low)} to {_signed(gap.reference.high)}"
    )


def _signed(value: float) -> str:
    return f"{value:+.3f}"


def _beside(reference: BandPoint) -> str:
    return f"the reference's {reference.low:.4g} to {reference.high:.4g}"
