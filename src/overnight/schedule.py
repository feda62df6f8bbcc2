"""The learning rate as a pure function of the step. Needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How long the run is, and how the learning rate moves while it lasts."""

    total_steps: int | None = None
    """Length of the run in optimizer steps; give this or total_tokens."""
    total_tokens: int | None = None
    """Length of the run in tokens, rounded up to whole steps; give this or total_steps."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from near 0 to its peak."""
    final_learning_rate_fraction: float = 0.1
    """Where the cosine ends, as a share of the peak (GPT-3 paper, appendix B: 10%); 1 keeps it constant."""

    def problems(self) -> list[str]:
        """What is wrong with these values, one plain sentence each; [] if nothing."""
        found = []
        if (self.total_steps is None) == (self.total_tokens is None):
            both = self.total_steps is not None
            found.append(f"give {'only one' if both else 'one'} of total_steps and total_tokens")
        for name in ("total_steps", "total_tokens"):
            if (length := getattr(self, name)) is not None and length < 1:
                found.append(f"{name}={length} must be at least 1")
        if self.warmup_steps < 0:
            found.append(f"warmup_steps={self.warmup_steps} must be at least 0")
        if self.total_steps is not None and 1 <= self.total_steps < self.warmup_steps:
            found.append(f"warmup_steps={self.warmup_steps} is longer than total_steps={self.total_steps}")
        if not 0.0 <= self.final_learning_rate_fraction <= 1.0:
            found.append(
                f"final_learning_rate_fraction={self.final_learning_rate_fraction} must lie between 0 and 1"
            )
        return found


def learning_rate_multiplier(step: int, config: ScheduleConfig) -> float:
    """What the peak learning rate is multiplied by at `step`, counted from 0: linear warm-up, then cosine."""
    assert config.total_steps is not None, "the run's length is resolved before it starts"
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.total_steps - config.warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
    floor = config.final_learning_rate_fraction
    return floor + (1.0 - floor) * cosine
