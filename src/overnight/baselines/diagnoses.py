"""The known mistakes, each with the evidence for it. The first that fits is the likeliest.

First come those that show directly (a learning rate, a weight, a gradient), then those that follow from how
losses compare. Five are from the diary of a reproduction of GPT-2 (repgpt): the schedule, the initialisation,
dropout, exploding gradients, the scale of the loss.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from overnight.baselines.band import BandPoint

SPIKE = 10.0
"""A gradient norm this many times the reference's highest is an explosion."""
LARGE = 1.5
"""Least factor by which a gradient norm must be off to be a scaling mistake."""
FAR_BELOW = 0.93
"""Losses below this share of the reference's are far below it. Chosen, not measured."""
NEAR = 0.03
"""Relative tolerance for equal factors."""


class Deviation(NamedTuple):
    """A run's value and the reference at the same number of tokens."""

    tokens: int
    value: float
    reference: BandPoint

    @property
    def z(self) -> float:
        """The distance from the middle: -1 and 1 at the band's edges, infinite if it is not finite."""
        low, middle, high = self.reference
        if not math.isfinite(self.value):
            return math.inf
        room = high - middle if self.value > middle else middle - low
        return (self.value - middle) / room if room else math.copysign(math.inf, self.value - middle)

    @property
    def ratio(self) -> float:
        """The value divided by the reference's middle."""
        return self.value / self.reference.middle

    @property
    def is_far_below(self) -> bool:
        """True below the band and far below its middle."""
        return self.z < -1 and self.ratio <= FAR_BELOW


@dataclass(frozen=True, kw_only=True)
class RunStats:
    """The statistics that the diagnoses use."""

    curves: Mapping[str, Sequence[Deviation]]
    """Curve name -> deviations in order of tokens; curves that can't be compared are left out."""
    micro_batches: int | None
    """Micro-batches of each step; None if the recipe does not set them."""
    unigram_nats: float | None

    def curve(self, name: str) -> Sequence[Deviation]:
        """The deviations of a curve; empty if it is not known."""
        return self.curves.get(name, ())

    def first(self, name: str) -> Deviation | None:
        """The earliest deviation of a curve; None if it is not known."""
        return next(iter(self.curve(name)), None)

    def last(self, name: str) -> Deviation | None:
        """The latest deviation of a curve; None if it is not known."""
        return next(reversed(self.curve(name)), None)

    def gradient_factor(self) -> Deviation | None:
        """The first gradient norm, if it is off by a factor that the later ones share; None otherwise.

        The first step's loss must be the reference's.
        """
        norms, losses = self.curve("grad_norm"), self.curve("loss")
        if not norms or not losses or abs(losses[0].z) > 1 or abs(norms[0].z) <= 1:
            return None
        factor, typical = norms[0].ratio, statistics.median(each.ratio for each in norms)
        is_large = min(max(factor, 1 / factor), max(typical, 1 / typical)) > LARGE
        return norms[0] if is_large and (factor > 1) == (typical > 1) else None


class Diagnosis(NamedTuple):
    """A known mistake."""

    name: str
    look_at: str
    """The code or setting where the mistake is usually made."""
    evidence: Callable[[RunStats], str | None]
    """Returns the evidence, with the run's number and the reference's; None if there is none."""


def learning_rate_factor(stats: RunStats) -> str | None:
    """The learning rate is a constant multiple of the reference's, or of the logged one."""
    for name, template in (
        ("applied_rate", "the optimizer uses {0:.3g} times the learning rate that is logged"),
        (
            "learning_rate",
            "the learning rate is {0:.3g} times the reference's from the start "
            "({1.value:.3g}, reference {1.reference.middle:.3g})",
        ),
    ):
        rates = [each for each in stats.curve(name) if each.reference.middle > 0]
        factor = statistics.median(each.ratio for each in rates) if rates else 1.0
        if _are_near([each.ratio for each in rates], factor) and not _are_near([factor], 1.0):
            return template.format(factor, rates[-1])
    return None


def learning_rate_schedule(stats: RunStats) -> str | None:
    """The learning rate leaves the reference's schedule."""
    applied = [each.value for each in stats.curve("applied_rate")]
    if applied and not _are_near(applied, statistics.median(applied)):
        low, high = min(applied), max(applied)
        return f"the optimizer's learning rate is {low:.3g} to {high:.3g} times the one that is logged"
    outside = [each for each in stats.curve("learning_rate") if abs(each.z) > 1]
    return (
        f"from {outside[0].tokens:,} tokens on the learning rate is not the reference's "
        f"(now {outside[-1].value:.3g}, reference {outside[-1].reference.middle:.3g})"
        if outside
        else None
    )


def residual_scale(stats: RunStats) -> str | None:
    """Before any training the weights that write into the residual stream have too wide a spread."""
    ratio = stats.first("residual_ratio")
    if ratio is None or ratio.tokens or ratio.z <= 1:
        return None
    return (
        f"before the first step the weights that write into the residual stream have {ratio.value:.3g} times "
        f"the spread of c_fc's, the reference's {ratio.reference.middle:.3g} times"
    )


def other_weights(stats: RunStats) -> str | None:
    """The first step's loss is outside of the band."""
    loss = stats.first("loss")
    if loss is None or abs(loss.z) <= 1:
        return None
    return f"the first step's loss is {loss.value:.4g}, the reference's {loss.reference}"


def scaled_gradients(stats: RunStats) -> str | None:
    """The gradient is off by a constant factor from the first step on, and the loss is not."""
    first = stats.gradient_factor()
    return first and (
        f"the first step's gradient norm is {first.value:.3g}, {first.ratio:.3g} times the reference's "
        f"{first.reference.middle:.3g}, with the reference's loss"
    )


def summed_gradients(stats: RunStats) -> str | None:
    """The gradient's factor divides the number of micro-batches."""
    first = stats.gradient_factor()
    if first is None or stats.micro_batches is None:
        return None
    nearest = round(first.ratio)
    if nearest < 2 or stats.micro_batches % nearest or not _are_near([first.ratio], nearest):
        return None
    return f"{scaled_gradients(stats)}; a step has {stats.micro_batches:,} micro-batches"


def explosion(stats: RunStats) -> str | None:
    """Single steps' gradients are far above all of the reference's, or the loss is not finite."""
    for point in stats.curve("loss"):
        if not math.isfinite(point.value):
            return f"the training loss is not finite after {point.tokens:,} tokens"
    peaks = [each for each in stats.curve("grad_norm_peak") if each.value > SPIKE * each.reference.high]
    if not peaks or stats.gradient_factor() is not None:
        return None
    worst = max(peaks, key=lambda each: each.ratio)
    return (
        f"the gradient norm has reached {worst.value:.3g} before {worst.tokens:,} tokens, where the "
        f"reference's highest is {worst.reference.middle:.3g}"
    )


def decayed_norms(stats: RunStats) -> str | None:
    """The mean gain of the layer norms is below the band."""
    gain = stats.last("norm_gain")
    if gain is None or gain.z >= -1:
        return None
    return f"the layer norms' mean gain is {gain.value:.4g}, the reference's {gain.reference}"


def future_tokens(stats: RunStats) -> str | None:
    """Both losses are far below what is possible."""
    loss, validation = stats.last("loss"), stats.last("validation_loss")
    if loss is None or validation is None or not (loss.is_far_below and validation.is_far_below):
        return None
    return (
        f"training and validation loss are {loss.value:.4g} and {validation.value:.4g}, far below the "
        f"reference's {loss.reference.middle:.4g} and {validation.reference.middle:.4g}"
    )


def wide_gap(stats: RunStats, side: Literal[1, -1]) -> str | None:
    """The gap is off to this side (1: above, -1: below), and the training loss not to the same."""
    gap, loss = stats.last("gap"), stats.last("loss")
    if gap is None or loss is None or side * gap.z <= 1 or side * loss.z > 0:
        return None
    return (
        f"the validation loss is {gap.value:+.3f} nats from the training loss, in the reference "
        f"{gap.reference.low:+.3f} to {gap.reference.high:+.3f}"
    )


def shuffled_tokens(stats: RunStats) -> str | None:
    """The training loss stays at the entropy of single tokens."""
    losses, unigram = stats.curve("loss"), stats.unigram_nats
    if not losses or unigram is None or losses[-1].reference.high > 0.9 * unigram:
        return None
    last = losses[-1]
    learnt = (unigram - last.value) / (unigram - last.reference.middle)
    if not -0.5 < learnt < 0.3:
        return None
    return (
        f"the training loss stays at {last.value:.4g}, near the {unigram:.4g} of predicting each token by "
        f"its frequency alone; the reference is at {last.reference.middle:.4g}"
    )


def _are_near(ratios: Sequence[float], factor: float) -> bool:
    return all(math.isclose(ratio, factor, rel_tol=NEAR) for ratio in ratios)


DIAGNOSES = (
    Diagnosis(
        "the learning rate is off by a factor",
        "peak_learning_rate, and what sets the optimizer's groups each step",
        learning_rate_factor,
    ),
    Diagnosis(
        "the learning-rate schedule is off",
        "warm-up, decay and length of the schedule, and the step that is passed to it",
        learning_rate_schedule,
    ),
    Diagnosis(
        "the initialisation lacks the residual scale",
        "c_proj of attention and feed-forward: N(0, 0.02 / sqrt(2 n_layer))",
        residual_scale,
    ),
    Diagnosis(
        "the initial weights are different",
        "the initialisation, init_from, and the vocabulary",
        other_weights,
    ),
    Diagnosis(
        "gradients are summed over micro-batches, not averaged",
        "what a micro-batch's loss is divided by before its backward pass",
        summed_gradients,
    ),
    Diagnosis(
        "gradients are scaled and not scaled back",
        "the loss scaling, and where it is undone before clipping",
        scaled_gradients,
    ),
    Diagnosis("gradients explode", "clipping, the learning rate, and the batches of those steps", explosion),
    Diagnosis(
        "layer norms are decayed",
        "the optimizer's groups: only matrices and embeddings decay",
        decayed_norms,
    ),
    Diagnosis(
        "the model sees the tokens it predicts",
        "the causal mask, and that targets are the ids shifted by one",
        future_tokens,
    ),
    Diagnosis(
        "the training data repeats",
        "the order of the rows: how many different ones an epoch has",
        functools.partial(wide_gap, side=1),
    ),
    Diagnosis(
        "dropout is on",
        "every dropout in the model, attention's included, during training",
        functools.partial(wide_gap, side=-1),
    ),
    Diagnosis(
        "tokens are shuffled within rows",
        "how rows are cut from the shards, and that targets follow their ids",
        shuffled_tokens,
    ),
)
"""Likeliest first."""
