"""Compares a run with a reference band: position, since when, and the diagnoses that fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from overnight.baselines.band import BandCurve, Columns, ReferenceBand, RunCurves, run_curves
from overnight.baselines.diagnoses import DIAGNOSES, Deviation, RunStats, count_micro_batches

Position = Literal["below", "within", "above"]
COMPARED = {"validation_loss": "validation loss", "loss": "training loss"}
"""The curves that decide a run's position, the more important first, and their names in sentences."""
VALIDATION_CURVES = frozenset({"validation_loss", "gap"})
SCHEDULE_SETTINGS = frozenset(
    {"peak_learning_rate", "warmup_steps", "learning_rate_decay", "decay_steps"}
    | {"final_learning_rate_fraction"}
)


class LikelyCause(NamedTuple):
    """A diagnosis that fits."""

    name: str
    evidence: str
    look_at: str


@dataclass(frozen=True, kw_only=True)
class BandComparison:
    """How a run compares with its reference."""

    band: ReferenceBand
    position: Position
    """Of the latest validation loss; if that is within, of the latest training loss."""
    curve: str
    """The curve that decided: "validation loss" or "training loss"."""
    latest: Deviation
    since_tokens: int | None
    """Where that curve left the band for good; None if it is within."""
    causes: tuple[LikelyCause, ...]
    """The diagnoses that fit, likeliest first."""
    differences: tuple[str, ...]
    """Settings that are not the reference's."""

    @property
    def is_on_track(self) -> bool:
        """True if the losses are within the band, and no diagnosis fits."""
        return self.position == "within" and not self.causes

    @property
    def word(self) -> str:
        """within, below, above; or "suspect": within, but a diagnosis fits."""
        return "suspect" if self.position == "within" and self.causes else self.position

    def brief(self) -> dict[str, str | None]:
        """The fields that are added to an evaluation's line: the word and the likeliest mistake."""
        return {"on_track": self.word, "likely_mistake": self.causes[0].name if self.causes else None}

    def line(self) -> str:
        """One line for the log: the position, the settings that differ, the likeliest mistake."""
        return "; ".join(self.sentences()[: 2 + bool(self.differences)])

    def sentences(self) -> list[str]:
        """The position; if the run is off, also the settings that differ and the diagnoses that fit."""
        reference, source = self.latest.reference, f"{self.band.recipe}, {self.band.source}"
        found = [
            f"{self.position} its reference ({source}): {self.curve} {self.latest.value:.4g} at "
            f"{self.latest.tokens:,} tokens, reference {reference.low:.4g} to {reference.high:.4g}"
        ]
        if self.is_on_track:
            return found
        if self.since_tokens is not None and self.since_tokens < self.latest.tokens:
            found[0] += f"; since {self.since_tokens:,} tokens"
        if self.differences:
            found.append(f"settings that differ: {'; '.join(self.differences)}")
        for number, cause in enumerate(self.causes):
            rank = "likeliest" if number == 0 else "also possible"
            found.append(f"{rank}: {cause.name}, since {cause.evidence}; look at {cause.look_at}")
        if not self.causes and not self.differences:
            found.append("no known mistake fits, and no setting differs")
        return found


def compare_with_band(
    band: ReferenceBand,
    columns: Columns,
    evaluations: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
) -> BandComparison | None:
    """Compare a run's metrics and evaluations with `band`; None while there is nothing to compare.

    `settings` are the recipe's, by their flat names.
    """
    ends = band.curves["loss"].tokens if "loss" in band.curves else ()
    measured = run_curves(columns, evaluations, ends)
    differences = band.differences(settings)
    curves = band_deviations(measured, band.curves)
    if "evaluation_tokens" in differences:  # another validation text: its losses do not compare
        curves = {name: points for name, points in curves.items() if name not in VALIDATION_CURVES}
    compared = [(name, curves[name]) for name in COMPARED if curves.get(name)]
    if not compared:
        return None
    outside = [(name, points) for name, points in compared if position_of(points[-1]) != "within"]
    name, points = (outside or compared)[0]
    position = position_of(points[-1])
    stats = RunStats(
        curves=curves,
        applied_rates=[point.value for point in measured.get("applied_rate", ())],
        is_same_schedule=not differences.keys() & SCHEDULE_SETTINGS,
        micro_batches=count_micro_batches(settings),
        unigram_nats=band.unigram_nats,
    )
    return BandComparison(
        band=band,
        position=position,
        curve=COMPARED[name],
        latest=points[-1],
        since_tokens=None if position == "within" else _outside_since(points, position),
        causes=likely_causes(stats),
        differences=tuple(differences.values()),
    )


def band_deviations(measured: RunCurves, curves: Mapping[str, BandCurve]) -> dict[str, list[Deviation]]:
    """By curve, the deviation of every point for which the band is known; empty ones are left out."""
    found: dict[str, list[Deviation]] = {}
    for name, curve in curves.items():
        references = ((point, curve.at(point.tokens)) for point in measured.get(name, ()))
        points = [Deviation(point.tokens, point.value, at) for point, at in references if at]
        if points:
            found[name] = points
    return found


def likely_causes(stats: RunStats) -> tuple[LikelyCause, ...]:
    """The diagnoses that fit, likeliest first."""
    found = ((diagnosis, diagnosis.evidence(stats)) for diagnosis in DIAGNOSES)
    return tuple(LikelyCause(each.name, evidence, each.look_at) for each, evidence in found if evidence)


def position_of(deviation: Deviation) -> Position:
    """Below, within or above the band; a value that is not finite is above."""
    if abs(deviation.z) <= 1:
        return "within"
    return "above" if deviation.z > 0 else "below"


def _outside_since(points: Sequence[Deviation], position: Position) -> int:
    since = points[-1].tokens
    for deviation in reversed(points):
        if position_of(deviation) != position:
            break
        since = deviation.tokens
    return since
