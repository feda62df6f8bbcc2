"""A run beside its reference: below, within or above, since when, and which of the known mistakes fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from overnight.baselines.band import Columns, Course, Curve, ReferenceBand, run_stats
from overnight.baselines.diagnoses import MISTAKES, Deviation, RunStats, count_micro_batches

Place = Literal["below", "within", "above"]
JUDGED = {"validation_loss": "validation loss", "loss": "training loss"}
"""The curves that place a run, the one that counts more first, and what they are called."""
OF_VALIDATION = frozenset({"validation_loss", "gap"})
OF_SCHEDULE = frozenset(
    {"peak_learning_rate", "warmup_steps", "learning_rate_decay", "decay_steps"}
    | {"final_learning_rate_fraction"}
)


class LikelyCause(NamedTuple):
    """A known mistake that fits."""

    name: str
    evidence: str
    """What points to it."""
    look_at: str


@dataclass(frozen=True, kw_only=True)
class BandComparison:
    """How a run compares with its reference."""

    band: ReferenceBand
    place: Place
    """Of the latest validation loss; if that is within, of the latest training loss."""
    curve: str
    """What was judged: "validation loss" or "training loss"."""
    latest: Deviation
    since_tokens: int | None
    """Where that curve left the band to be outside ever since; None if it is within."""
    findings: tuple[LikelyCause, ...]
    """The mistakes that fit, likeliest first."""
    differences: tuple[str, ...]
    """Settings that are not the reference's."""

    @property
    def is_on_track(self) -> bool:
        """True if the losses are within the band, and nothing points to a mistake."""
        return self.place == "within" and not self.findings

    @property
    def word(self) -> str:
        """One word: within, below, above; or "suspect", within and with a mistake that fits."""
        return "suspect" if self.place == "within" and self.findings else self.place

    def brief(self) -> dict[str, str | None]:
        """What is written beside an evaluation: the word, and the name of the likeliest mistake, if any."""
        likely = self.findings[0].name if self.findings else None
        return {"on_track": self.word, "likely_mistake": likely}

    def line(self) -> str:
        """All that is said of it while it trains: the place, what differs, the likeliest mistake."""
        return "; ".join(self.sentences()[: 2 + bool(self.differences)])

    def sentences(self) -> list[str]:
        """Where the run lies, and, if it is off, what differs, which explains it best, and what fits."""
        reference, source = self.latest.reference, f"{self.band.recipe}, {self.band.source}"
        found = [
            f"{self.place} its reference ({source}): {self.curve} {self.latest.value:.4g} at "
            f"{self.latest.tokens:,} tokens, reference {reference.low:.4g} to {reference.high:.4g}"
        ]
        if self.is_on_track:
            return found
        if self.since_tokens is not None and self.since_tokens < self.latest.tokens:
            found[0] += f"; so since {self.since_tokens:,} tokens"
        if self.differences:
            found.append(f"settings that differ: {'; '.join(self.differences)}")
        for number, finding in enumerate(self.findings):
            also = "likeliest" if number == 0 else "also possible"
            found.append(f"{also}: {finding.name}, since {finding.evidence}; look at {finding.look_at}")
        if not self.findings and not self.differences:
            found.append("none of the known mistakes fits, and no setting differs")
        return found


def compare_with_band(
    band: ReferenceBand,
    columns: Columns,
    evaluations: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
) -> BandComparison | None:
    """The run's metrics and evaluations beside `band`; None while there is nothing to compare.

    `settings` are the recipe's, by their flat names.
    """
    ends = band.curves["loss"].tokens if "loss" in band.curves else ()
    course = run_stats(columns, evaluations, ends)
    differences = band.differences(settings)
    curves = deviation_at(course, band.curves)
    if "evaluation_tokens" in differences:  # other validation text: its losses say nothing
        curves = {name: found for name, found in curves.items() if name not in OF_VALIDATION}
    judged = [(name, curves[name]) for name in JUDGED if curves.get(name)]
    if not judged:
        return None
    outside = [(name, found) for name, found in judged if position_of(found[-1]) != "within"]
    name, found = (outside or judged)[0]
    place = position_of(found[-1])
    seen = RunStats(
        curves=curves,
        applied_rates=[point.value for point in course.get("applied_rate", ())],
        is_same_schedule=not differences.keys() & OF_SCHEDULE,
        micro_batches=count_micro_batches(settings),
        unigram_nats=band.unigram_nats,
    )
    return BandComparison(
        band=band,
        place=place,
        curve=JUDGED[name],
        latest=found[-1],
        since_tokens=None if place == "within" else _outside_since(found, place),
        findings=find_diagnoses(seen),
        differences=tuple(differences.values()),
    )


def deviation_at(course: Course, curves: Mapping[str, Curve]) -> dict[str, list[Deviation]]:
    """Every point of the course for which the reference's curve has a place."""
    found: dict[str, list[Deviation]] = {}
    for name, curve in curves.items():
        places = ((point, curve.at(point.tokens)) for point in course.get(name, ()))
        found[name] = [
            Deviation(point.tokens, point.value, reference) for point, reference in places if reference
        ]
    return {name: comparisons for name, comparisons in found.items() if comparisons}


def find_diagnoses(seen: RunStats) -> tuple[LikelyCause, ...]:
    """The known mistakes that fit, likeliest first."""
    told = ((mistake, mistake.evidence(seen)) for mistake in MISTAKES)
    return tuple(
        LikelyCause(mistake.name, evidence, mistake.look_at)
        for mistake, evidence in told
        if evidence is not None
    )


def position_of(comparison: Deviation) -> Place:
    """Below, within or above the band; a value that is not finite is above."""
    if abs(comparison.excess) <= 1:
        return "within"
    return "above" if comparison.excess > 0 else "below"


def _outside_since(found: Sequence[Deviation], place: Place) -> int:
    since = found[-1].tokens
    for comparison in reversed(found):
        if position_of(comparison) != place:
            break
        since = comparison.tokens
    return since
