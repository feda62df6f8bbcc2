"""The learning rate as a pure function of the run's progress. Needs no torch.

Progress is counted in full steps, so that the rate follows the tokens: a smaller step of a batch ramp counts
for its share of a full step's tokens. Without a ramp, full steps are the steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from overnight.training.batch import BatchPlan


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How long the run is, and how the learning rate changes during it."""

    total_steps: int | None = None
    """Length of the run in optimizer steps; give this or total_tokens."""
    total_tokens: int | None = None
    """Length of the run in tokens, rounded up to whole steps; give this or total_steps."""
    warmup_steps: int = 0
    """Full steps over which the learning rate rises to its peak; a ramp's smaller steps count in part."""
    learning_rate_decay: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Shape of the decay after warm-up; wsd (warm-up, stable, decay) keeps the peak, then falls linearly."""
    decay_steps: int | None = None
    """Full steps of the decay; if left out all after warm-up, with wsd the last fifth of the run."""
    final_learning_rate_fraction: float = 0.1
    """Final rate as a share of the peak (GPT-3 paper, appendix B: 10%)."""

    def problems(self, full_steps: float | None = None) -> list[str]:
        """Invalid values, one sentence each; [] if there are none.

        `full_steps` is the run's length if it is known, else total_steps takes its place.
        """
        found = []
        if (self.total_steps is None) == (self.total_tokens is None):
            both = self.total_steps is not None
            found.append(f"give {'only one' if both else 'one'} of total_steps and total_tokens")
        for name in ("total_steps", "total_tokens", "decay_steps"):
            if (length := getattr(self, name)) is not None and length < 1:
                found.append(f"{name}={length} must be at least 1")
        if self.warmup_steps < 0:
            found.append(f"warmup_steps={self.warmup_steps} must be at least 0")
        if not 0.0 <= self.final_learning_rate_fraction <= 1.0:
            found.append(
                f"final_learning_rate_fraction={self.final_learning_rate_fraction} must lie between 0 and 1"
            )
        return found or self._contradictions(self.total_steps if full_steps is None else full_steps)

    def _contradictions(self, full_steps: float | None) -> list[str]:
        """Contradictions between values that are valid by themselves."""
        decay_steps = self.decay_steps
        if decay_steps is not None and self.learning_rate_decay == "constant":
            return [
                f"decay_steps={decay_steps} has no effect with learning_rate_decay=constant: leave it out"
            ]
        if full_steps is None:
            return []
        total = f"total_steps={self.total_steps}"
        if full_steps != self.total_steps:
            total += f" ({full_steps:.1f} full steps)"
        if self.warmup_steps > full_steps:
            return [f"warmup_steps={self.warmup_steps} is longer than {total}"]
        left = math.floor(full_steps - self.warmup_steps)
        if decay_steps is not None and decay_steps > left:
            return [
                f"decay_steps={decay_steps} is longer than the part of {total} after "
                f"warmup_steps={self.warmup_steps}: {f'give at most {left}' if left else 'leave it out'}"
            ]
        return []


@dataclass(frozen=True)
class Schedule:
    """The learning rate of every step of one run."""

    config: ScheduleConfig
    peak_learning_rate: float
    plan: BatchPlan
    total_steps: int

    def learning_rate(self, step: int) -> float:
        """The rate of `step`, counted from 0."""
        position = self.plan.full_steps_before(step + 1) - 1
        length = self.plan.full_steps_before(self.total_steps)
        return self.peak_learning_rate * learning_rate_multiplier(position, length, self.config)


def learning_rate_multiplier(position: float, length: float, config: ScheduleConfig) -> float:
    """The factor of the peak learning rate: linear warm-up, then the decay.

    `position` and `length` are in full steps: without a ramp the step, counted from 0, and total_steps. The
    length matters where decay_steps is left out, and with wsd: a run that is resumed with another length
    follows the new schedule from there, and its rate may jump.
    """
    if position < config.warmup_steps:
        return min((position + 1) / config.warmup_steps, 1.0)  # fractions of full steps may overshoot
    if config.learning_rate_decay == "constant":
        return 1.0
    begin, full_steps = _decay(length, config)
    done = min(max(position - begin, 0) / max(1, full_steps), 1.0)
    left = 0.5 * (1.0 + math.cos(math.pi * done)) if config.learning_rate_decay == "cosine" else 1.0 - done
    floor = config.final_learning_rate_fraction
    return floor + (1.0 - floor) * left


def _decay(length: float, config: ScheduleConfig) -> tuple[float, float]:
    """(where the decay begins, how long it is), in full steps."""
    after_warmup = length - config.warmup_steps
    if config.learning_rate_decay == "wsd":
        # A decay over 10 to 20% does as well as a cosine over all (Hägele et al. 2024, arXiv 2405.18392).
        full_steps = config.decay_steps or min(after_warmup, math.ceil(length / 5))
        return length - full_steps, full_steps
    return config.warmup_steps, config.decay_steps or after_warmup
