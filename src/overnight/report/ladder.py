"""A speed ladder as it was measured, and what follows from it: gains, totals, whether every rung is right."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

COMPARED_STEPS = 5
"""Losses are compared over so few steps: in later ones the smallest rounding has grown beyond all bounds."""


@dataclass(frozen=True, kw_only=True)
class RungRecord:
    """One rung: what was measured, or why it was skipped."""

    name: str
    about: str
    skipped: str | None = None
    """Why it was; nothing was measured then."""
    settings: Mapping[str, object] = field(default_factory=dict)
    tolerance: float = 0.0
    """By how many nats per token its losses may differ from the first rung's."""
    milliseconds: tuple[float, ...] = ()
    """Of one step, in each round."""
    milliseconds_before: tuple[float, ...] = ()
    """Of one step of the rung before, in the same rounds; none for the first rung."""
    losses: tuple[float, ...] = ()
    """Nats per token of every step from the fresh weights on; the same rows for every rung."""
    peak_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class LadderRecord:
    """All rungs, from the ground up, and what they were measured with. The first one is never skipped."""

    model: str
    device_name: str
    tokens_per_step: int
    about_step: str
    """The step's rows and tokens, in words."""
    flops_per_token: int
    peak_flops: float
    """What MFU is a share of."""
    about_peak: str
    """Where that comes from, in words."""
    rungs: tuple[RungRecord, ...]
    groups: tuple[tuple[str, ...], ...] = ()
    """The names of the rungs that took turns with one another, group after group."""
    environment: Mapping[str, object] = field(default_factory=dict)
    """Versions, date, threads, text."""

    @property
    def climbed(self) -> list[RungRecord]:
        """The rungs that were measured."""
        return [rung for rung in self.rungs if rung.skipped is None]


class Figures(NamedTuple):
    """What a rung comes to."""

    milliseconds: float
    """The median round."""
    tokens_per_second: float
    mfu: float
    """Share of the peak that the model's own arithmetic makes up; recomputation not counted."""
    gain: float | None
    """How many times as fast as the rung before: the median of the rounds' ratios; None for the first."""
    total: float
    """All gains so far multiplied: how many times as fast as the first rung."""
    loss: float
    """Nats per token in the last step that is compared."""
    difference: float
    """The largest difference of a compared step's loss from the first rung's."""
    is_equal: bool
    """True if no difference is beyond the tolerance."""


def ladder_figures(ladder: LadderRecord) -> dict[str, Figures]:
    """The figures of every rung that was climbed, by its name."""
    found = {}
    first, total = ladder.climbed[0], 1.0
    for rung in ladder.climbed:
        milliseconds = statistics.median(rung.milliseconds)
        speed = ladder.tokens_per_step / milliseconds * 1e3
        differences = loss_differences(rung, first)
        gain = None if rung is first else paired_ratio(rung.milliseconds, rung.milliseconds_before)
        total *= gain or 1.0
        found[rung.name] = Figures(
            milliseconds=milliseconds,
            tokens_per_second=speed,
            mfu=speed * ladder.flops_per_token / ladder.peak_flops,
            gain=gain,
            total=total,
            loss=rung.losses[len(differences) - 1],
            difference=max(
                differences, key=lambda size: (math.isnan(size), size)
            ),  # not a number is the worst
            is_equal=all(size <= rung.tolerance for size in differences),
        )
    return found


def paired_ratio(times: Sequence[float], reference: Sequence[float]) -> float:
    """How many times as fast as the reference: the median, over the rounds, of its time by ours.

    Unlike the ratio of two medians, it compares only what was measured side by side.
    """
    return statistics.median(theirs / ours for ours, theirs in zip(times, reference, strict=True))


def loss_differences(rung: RungRecord, reference: RungRecord) -> list[float]:
    """How far apart the two losses of each compared step are, in nats per token."""
    pairs = zip(rung.losses[:COMPARED_STEPS], reference.losses[:COMPARED_STEPS], strict=True)
    return [abs(ours - theirs) for ours, theirs in pairs]


def wrong_rungs(ladder: LadderRecord) -> list[str]:
    """The rungs that do not compute what the first one does, within their tolerances."""
    return [name for name, figures in ladder_figures(ladder).items() if not figures.is_equal]


def as_json(ladder: LadderRecord) -> dict[str, object]:
    """Every single measurement, and under "figures" what was made of them; what is not finite is null."""
    figures = ladder_figures(ladder)
    rungs = [
        {
            **dataclasses.asdict(rung),
            "losses": [_finite(loss) for loss in rung.losses],
            "figures": {name: _finite(value) for name, value in figures[rung.name]._asdict().items()}
            if rung.name in figures
            else None,
        }
        for rung in ladder.rungs
    ]
    return {**dataclasses.asdict(ladder), "rungs": rungs}


def _finite(value: float | None) -> float | None:
    return value if value is None or math.isfinite(value) else None
