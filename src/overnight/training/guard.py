"""Bad steps: their update is skipped, or their rows are. Needs no torch.

A step is bad if its loss or its gradients are not finite, or if the loss has exploded; with `spike_sigma`
also if loss or gradient norm are outliers among those of the sound steps before it. An update that is not
finite is never applied. The decisions follow from losses and norms alone, which are saved with the weights: a
resumed run decides like the uninterrupted one.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

HISTORY = 128  # sound steps that a step is compared with, as in llm.c's llmc/outlier_detector.h
AT_LEAST = 32  # sound steps before a step can be an outlier
TO_DEVIATION = 1.4826  # standard deviation over median absolute deviation, of a normal distribution
LEAST_SPREAD = 0.01  # of the median: if losses hardly vary, a tiny difference is not an outlier
EXPLODED_NATS, EXPLODED_DEVIATIONS = 1.0, 12.0  # both above the median


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What happens after bad steps. An update that is not finite is always skipped."""

    spike_sigma: float | None = None
    """Skip the update of a step whose loss or gradient norm is this many standard deviations (a robust
    estimate) above those of the last 128 sound steps; off if left out."""
    rollback_after_steps: int | None = 5
    """After this many bad steps in a row, return to the last good checkpoint and skip their rows; never if
    left out."""
    max_rollbacks: int = 3
    """The run stops at the next rollback after this many: a few rows are not the cause."""

    def problems(self) -> list[str]:
        """Invalid values, one sentence each; [] if there are none."""
        found = []
        if self.spike_sigma is not None and not 1 <= self.spike_sigma < math.inf:
            found.append(f"spike_sigma={self.spike_sigma} must be at least 1, or left out")
        if self.rollback_after_steps is not None and self.rollback_after_steps < 1:
            found.append(f"rollback_after_steps={self.rollback_after_steps} must be at least 1, or left out")
        if self.max_rollbacks < 0:
            found.append(f"max_rollbacks={self.max_rollbacks} must be at least 0")
        return found


class SkippedRows(NamedTuple):
    """Skipped rows: from `step` on, every row number is `rows` higher."""

    step: int
    rows: int


class Limits(NamedTuple):
    """The largest loss and gradient norm of an applied step."""

    loss: float = math.inf
    """Nats per token."""
    grad_norm: float = math.inf


@dataclass(frozen=True)
class Guard:
    """The history of a run's steps: immutable, replaced after each step."""

    losses: tuple[float, ...] = ()
    """Losses of the last sound steps, nats per token."""
    norms: tuple[float, ...] = ()
    """Norms of their gradients."""
    bad_steps: int = 0
    """Number of bad steps since the last sound one."""
    skipped: tuple[SkippedRows, ...] = ()

    def limits(self, deviations: float | None) -> Limits:
        """The limits of the next step."""
        if deviations is None or len(self.losses) < AT_LEAST:
            return Limits()
        return Limits(find_limit(self.losses, deviations), find_limit(self.norms, deviations))

    def after(self, loss: float, grad_norm: float, *, is_applied: bool, is_scaled: bool = False) -> Guard:
        """The guard after another step. With `is_scaled`, overflows of float16 gradients are expected."""
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
        """Number of rows by which `step`, counted from 0, reads later than planned."""
        return sum(rows for since, rows in self.skipped if since <= step)

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Guard:
        """The guard whose fields, as a dictionary, have been through JSON."""
        return cls(
            losses=tuple(values["losses"]),
            norms=tuple(values["norms"]),
            bad_steps=values["bad_steps"],
            # Checkpoints of version 0.1 call them detours.
            skipped=tuple(SkippedRows(*each) for each in values.get("skipped", values.get("detours", ()))),
        )

    def _has_exploded(self, loss: float) -> bool:
        if len(self.losses) < AT_LEAST:
            return False
        far = statistics.median(self.losses) + EXPLODED_NATS
        return loss > max(far, find_limit(self.losses, EXPLODED_DEVIATIONS))


def find_limit(values: Sequence[float], deviations: float) -> float:
    """The median plus `deviations` standard deviations, by the median absolute deviation (Hampel 1974)."""
    median = statistics.median(values)
    spread = TO_DEVIATION * statistics.median(abs(value - median) for value in values)
    return median + deviations * max(spread, LEAST_SPREAD * abs(median))
