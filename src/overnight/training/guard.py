"""What a run does about steps that go wrong: it leaves out their update, or their rows.

A step is bad if its loss or its gradients are not finite, or if the loss has exploded; with
`spike_sigma` also if loss or gradient norm stand out from those of the sound steps before it. What is
not finite is never applied. The decisions follow from the losses and norms alone, and those are saved with
the weights: a run that is resumed decides as it would have. Needs no torch.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

HISTORY = 128  # sound steps that a step is compared with: llm.c's window, llmc/outlier_detector.h
AT_LEAST = 32  # of them, before anything can stand out
TO_DEVIATION = 1.4826  # a normal distribution's standard deviation by its median absolute deviation
LEAST_SPREAD = 0.01  # of the median: losses that hardly vary must not make an outlier of a hair
EXPLODED_NATS, EXPLODED_DEVIATIONS = 1.0, 12.0  # above the median, both


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What is done about steps that go wrong. An update that is not finite is left out in any case."""

    spike_sigma: float | None = None
    """Leave out the update of a step whose loss or gradient norm lies so many standard deviations (of a
    robust kind) above the last 128 sound steps'; off if left out."""
    rollback_after_steps: int | None = 5
    """After so many bad steps in a row go back to the last good checkpoint, and go on without their rows;
    never if left out."""
    max_rollbacks: int = 3
    """After so many the run stops: its trouble is not in a few rows."""

    def problems(self) -> list[str]:
        """What is wrong with these values, one plain sentence each; [] if nothing."""
        found = []
        if self.spike_sigma is not None and not 1 <= self.spike_sigma < math.inf:
            found.append(f"spike_sigma={self.spike_sigma} must be at least 1, or left out")
        if self.rollback_after_steps is not None and self.rollback_after_steps < 1:
            found.append(f"rollback_after_steps={self.rollback_after_steps} must be at least 1, or left out")
        if self.max_rollbacks < 0:
            found.append(f"max_rollbacks={self.max_rollbacks} must be at least 0")
        return found


class SkippedRows(NamedTuple):
    """Rows that are left out: from a step on, everything is read so many rows later."""

    step: int
    rows: int


class Limits(NamedTuple):
    """What the next step may reach."""

    loss: float = math.inf
    """Nats per token."""
    grad_norm: float = math.inf


@dataclass(frozen=True)
class Guard:
    """What is known of the steps so far: a value, a new one after each step."""

    losses: tuple[float, ...] = ()
    """Of the last sound steps, nats per token."""
    norms: tuple[float, ...] = ()
    """Of their gradients."""
    bad_steps: int = 0
    """How many the last ones in a row are."""
    skipped: tuple[SkippedRows, ...] = ()

    def limits(self, deviations: float | None) -> Limits:
        """Beyond which a step's update is left out."""
        if deviations is None or len(self.losses) < AT_LEAST:
            return Limits()
        return Limits(find_limit(self.losses, deviations), find_limit(self.norms, deviations))

    def after(self, loss: float, grad_norm: float, *, is_applied: bool, is_scaled: bool = False) -> Guard:
        """Another step done, or its update left out. With `is_scaled`, float16's overflows are no trouble."""
        is_overflow = is_scaled and not math.isfinite(grad_norm) and math.isfinite(loss)
        if is_overflow:
            return self
        if not is_applied or not math.isfinite(loss) or self._has_exploded(loss):
            return dataclasses.replace(self, bad_steps=self.bad_steps + 1)
        return dataclasses.replace(
            self,
            losses=(*self.losses, loss)[-HISTORY:],
            norms=(*self.norms, grad_norm)[-HISTORY:],
            bad_steps=0,
        )

    def skipped_rows(self, step: int) -> int:
        """How many rows later than planned the step, counted from 0, reads."""
        return sum(detour.rows for detour in self.skipped if detour.step <= step)

    def to_values(self) -> dict[str, Any]:
        """Plain lists and numbers, from which `from_values` makes the same again."""
        return dataclasses.asdict(self)

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Guard:
        """What `to_values` gave, also by way of JSON."""
        return cls(
            losses=tuple(values["losses"]),
            norms=tuple(values["norms"]),
            bad_steps=values["bad_steps"],
            skipped=tuple(SkippedRows(*detour) for detour in values["skipped"]),
        )

    def _has_exploded(self, loss: float) -> bool:
        if len(self.losses) < AT_LEAST:
            return False
        far = statistics.median(self.losses) + EXPLODED_NATS
        return loss > max(far, find_limit(self.losses, EXPLODED_DEVIATIONS))


def find_limit(values: Sequence[float], deviations: float) -> float:
    """The median and so many standard deviations, by the median absolute deviation (Hampel 1974)."""
    median = statistics.median(values)
    spread = TO_DEVIATION * statistics.median(abs(value - median) for value in values)
    return median + deviations * max(spread, LEAST_SPREAD * abs(median))
