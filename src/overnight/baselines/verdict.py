"""Compares a run with a reference band: position, since when, and the diagnoses that fit."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from overnight.baselines.band import BandCurve, BandPoint, Columns, ReferenceBand, RunCurves, run_curves
from overnight.baselines.diagnoses import DIAGNOSES, NEAR, Deviation, RunStats

Position = Literal["below", "within", "above"]
COMPARED = {"validation_loss": "validation loss", "loss": "training loss"}
"""The curves that decide a run's position, the more important first, and their names in sentences."""
VALIDATION_CURVES = frozenset({"validation_loss", "gap"})
BATCH_SETTINGS = ("tokens_per_step", "micro_batch_size", "context_length")
SCHEDULE_SETTINGS = frozenset(
    {"peak_learning_rate", "warmup_steps", "learning_rate_decay", "decay_steps"}
    | {"final_learning_rate_fraction"}
)


@dataclass(frozen=True, kw_only=True)
class BandComparison:
    """How a run compares with its reference."""

    band: ReferenceBand
    position: Position
    """Position of the latest validation loss; if it is within, of the latest training loss."""
    curve: str
    """The curve that decided: "validation loss" or "training loss"."""
    latest: Deviation
    since_tokens: int | None
    """Tokens from which on that curve is outside of the band; None if it is within."""
    causes: dict[str, str]
    """The names of the diagnoses that fit, likeliest first -> the evidence, and where to look."""
    differences: tuple[str, ...]
    """Settings that differ from the reference's."""

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
        return {"on_track": self.word, "likely_mistake": next(iter(self.causes), None)}

    def line(self) -> str:
        """One line for the log: the position, the settings that differ, the likeliest mistake."""
        return "; ".join(self.sentences()[: 2 + bool(self.differences)])

    def sentences(self) -> list[str]:
        """Sentences on the position; if the run is off, on the differing settings and likely diagnoses."""
        found = [
            f"{self.position} its reference ({self.band.recipe}, {self.band.source}): {self.curve} "
            f"{self.latest.value:.4g} at {self.latest.tokens:,} tokens, reference {self.latest.reference}"
        ]
        if self.is_on_track:
            return found
        if self.since_tokens is not None and self.since_tokens < self.latest.tokens:
            found[0] += f"; since {self.since_tokens:,} tokens"
        if self.differences:
            found.append(f"settings that differ: {'; '.join(self.differences)}")
        for number, (name, why) in enumerate(self.causes.items()):
            found.append(f"{'also possible' if number else 'likeliest'}: {name}, since {why}")
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
    if "evaluation_tokens" in differences:  # another validation text: its losses can't be compared
        curves = {name: points for name, points in curves.items() if name not in VALIDATION_CURVES}
    if differences.keys() & SCHEDULE_SETTINGS:  # the recipe asks for another learning rate
        curves.pop("learning_rate", None)
    compared = [(name, curves[name]) for name in COMPARED if name in curves]
    if not compared:
        return None
    outside = [(name, points) for name, points in compared if abs(points[-1].z) > 1]
    name, points = (outside or compared)[0]
    position = _position(points[-1])
    same = BandPoint(1 - NEAR, 1.0, 1 + NEAR)
    applied = [Deviation(point.tokens, point.value, same) for point in measured.get("applied_rate", ())]
    step, rows, length = (settings.get(name) for name in BATCH_SETTINGS)
    stats = RunStats(
        curves=curves | {"applied_rate": applied},
        micro_batches=step // (rows * length) if step and rows and length else None,
        unigram_nats=band.unigram_nats,
    )
    found = ((diagnosis, diagnosis.evidence(stats)) for diagnosis in DIAGNOSES)
    along = itertools.takewhile(lambda point: _position(point) == position, reversed(points))
    return BandComparison(
        band=band,
        position=position,
        curve=COMPARED[name],
        latest=points[-1],
        since_tokens=None if position == "within" else [*along][-1].tokens,
        causes={each.name: f"{words}; look at {each.look_at}" for each, words in found if words},
        differences=tuple(differences.values()),
    )


def band_deviations(measured: RunCurves, curves: Mapping[str, BandCurve]) -> dict[str, list[Deviation]]:
    """Curve name -> deviation of every point for which the band is known; empty curves are left out."""
    found: dict[str, list[Deviation]] = {}
    for name, curve in curves.items():
        references = ((point, curve.at(point.tokens)) for point in measured.get(name, ()))
        points = [Deviation(point.tokens, point.value, at) for point, at in references if at]
        if points:
            found[name] = points
    return found


def _position(deviation: Deviation) -> Position:
    """Below, within or above the band; a value that is not finite is above."""
    if abs(deviation.z) <= 1:
        return "within"
    return "above" if deviation.z > 0 else "below"
