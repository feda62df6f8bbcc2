"""Where the curves of healthy runs lie: for one recipe, one text and one tokenizer."""

from __future__ import annotations

import bisect
import functools
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any, NamedTuple

IDENTITY = (
    *("n_layer", "n_head", "n_embd", "context_length", "vocab_size", "init_from"),
    *("total_steps", "tokens_per_step", "batch_ramp_start_tokens", "batch_ramp_tokens"),
)
"""Settings without which a run is another experiment."""
SETTINGS = (
    *("dropout", "peak_learning_rate", "weight_decay", "beta1", "beta2", "epsilon", "max_grad_norm"),
    *("warmup_steps", "learning_rate_decay", "decay_steps", "final_learning_rate_fraction"),
    *("packing", "shuffle_window", "validation_fraction", "evaluation_tokens"),
)
"""Settings that move the curves: told where they differ."""
TEXT = ("source", "tokenizer", "tokenizer_fingerprint")
"""Facts of data.json by which a text is known again."""


class BandPoint(NamedTuple):
    """Where healthy runs lie at one place."""

    low: float
    middle: float
    high: float

    def excess(self, value: float) -> float:
        """How far from the middle: -1 and 1 at the edges. Infinite for what is not finite."""
        if not math.isfinite(value):
            return math.inf
        room = self.high - self.middle if value > self.middle else self.middle - self.low
        return (value - self.middle) / room if room else math.copysign(math.inf, value - self.middle)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One quantity's band over the tokens trained on."""

    tokens: tuple[int, ...]
    low: tuple[float, ...]
    middle: tuple[float, ...]
    high: tuple[float, ...]

    def at(self, tokens: int) -> BandPoint | None:
        """The band there, in a straight line over the logarithm of the tokens; None outside of the points.

        None, too, between the start and the next point: what falls fast is not known in between.
        """
        index = bisect.bisect_left(self.tokens, tokens)
        if index == len(self.tokens):
            return None
        right = BandPoint(self.low[index], self.middle[index], self.high[index])
        if self.tokens[index] == tokens:
            return right
        if index == 0 or self.tokens[index - 1] == 0:
            return None
        left = BandPoint(self.low[index - 1], self.middle[index - 1], self.high[index - 1])
        begin, end = (math.log(self.tokens[place]) for place in (index - 1, index))
        share = (math.log(tokens) - begin) / (end - begin)
        return BandPoint(
            *((1 - share) * before + share * after for before, after in zip(left, right, strict=True))
        )


@dataclass(frozen=True, kw_only=True)
class ReferenceBand:
    """What runs of one recipe on one text looked like, and how that is known."""

    recipe: str
    """The recipe's name."""
    source: str
    """Where the figures come from, in a few words: "5 recorded runs"."""
    date: str
    notes: str = ""
    """How they were taken, and how the band was widened."""
    identity: Mapping[str, Any]
    """`IDENTITY` of the recipe."""
    settings: Mapping[str, Any]
    """`SETTINGS`, or those of them that the figures were taken with; others are not compared."""
    text: Mapping[str, tuple[str, ...]]
    """For each of `TEXT` what it may be."""
    unigram_nats: float | None
    """Entropy of the training text's single tokens: the loss of knowing nothing of their order."""
    curves: Mapping[str, Curve]
    """By the names of a `Course`; those that are not known are left out."""

    def fits(self, settings: Mapping[str, Any], text: Mapping[str, Any]) -> bool:
        """True for a run with these flat settings on a text with these facts."""
        return all(settings.get(name) == value for name, value in self.identity.items()) and all(
            text.get(name) in known for name, known in self.text.items()
        )

    def differences(self, settings: Mapping[str, Any]) -> dict[str, str]:
        """By name, settings that are not the reference's: "dropout is 0.1, and 0.0 in the reference"."""
        return {
            name: f"{name} is {_said(settings.get(name))}, and {_said(value)} in the reference"
            for name, value in self.settings.items()
            if settings.get(name) != value
        }

    def to_json(self) -> str:
        """The text of a file of bands/."""
        return json.dumps(asdict(self), indent=None) + "\n"


def read_band(text: str) -> ReferenceBand:
    """The band that `to_json` wrote."""
    values: dict[str, Any] = json.loads(text)
    values["curves"] = {
        name: Curve(**{key: tuple(numbers) for key, numbers in curve.items()})
        for name, curve in values["curves"].items()
    }
    values["text"] = {name: tuple(known) for name, known in values["text"].items()}
    return ReferenceBand(**values)


@functools.cache
def load_bands() -> tuple[ReferenceBand, ...]:
    """The bands that come with the package, by name."""
    folder = resources.files("overnight.baselines") / "bands"
    entries = sorted(folder.iterdir(), key=lambda entry: entry.name)
    return tuple(read_band(entry.read_text("utf-8")) for entry in entries if entry.name.endswith(".json"))


def find_band(
    settings: Mapping[str, Any], text: Mapping[str, Any], bands: Iterable[ReferenceBand] | None = None
) -> ReferenceBand | None:
    """The band for a run with these flat settings and the facts of its data.json; None if there is none."""
    known = load_bands() if bands is None else bands
    return next((band for band in known if band.fits(settings, text)), None)


def _said(value: object) -> str:
    return "left out" if value is None else str(value)


# ---------------------------------------------------------------- what a run's files tell of its training, as curves over tokens that can be laid beside oth


STRETCHES = 40
"""About so many to a run; the first ones are shorter, since the loss falls fast there."""
TAIL = 0.25
"""Share of the tokens so far over which the training loss beside a validation loss is taken."""
COLUMNS = ("tokens", "loss", "grad_norm", "learning_rate")


class Point(NamedTuple):
    """A curve's value once so many tokens were trained on."""

    tokens: int
    value: float


Columns = Mapping[str, Sequence[float]]
"""`COLUMNS` of metrics.jsonl, a number for each step; NaN where there is none."""
Course = Mapping[str, tuple[Point, ...]]
"""By name: loss, grad_norm, grad_norm_peak, learning_rate of each stretch; validation_loss, gap, norm_gain,
residual_ratio, applied_rate of each evaluation. Names without a point are left out."""


def columns_of(lines: Sequence[Mapping[str, Any]]) -> Columns:
    """`COLUMNS` of the lines of metrics.jsonl."""
    return {name: [_number(line.get(name)) for line in lines] for name in COLUMNS}


def window_ends(total_steps: int) -> list[int]:
    """The steps at which stretches end: 1, 2, 4, ... until they are a fortieth of the run, then evenly."""
    longest = max(1, math.ceil(total_steps / STRETCHES))
    ends = [1]
    while ends[-1] < total_steps:
        ends.append(min(total_steps, ends[-1] + min(ends[-1], longest)))
    return ends


def run_stats(columns: Columns, evaluations: Sequence[Mapping[str, Any]], ends: Sequence[int]) -> Course:
    """The curves of a run whose stretches end at `ends`, in tokens; a stretch under way has no point yet."""
    course = {name: tuple(points) for name, points in _training(columns, ends).items()}
    return {name: points for name, points in (course | _evaluated(columns, evaluations)).items() if points}


def _training(columns: Columns, ends: Sequence[int]) -> dict[str, list[Point]]:
    found: dict[str, list[Point]] = {
        name: [] for name in ("loss", "grad_norm", "grad_norm_peak", "learning_rate")
    }
    tokens, first = columns["tokens"], 0
    for end in ends:
        last = bisect.bisect_right(tokens, end)
        if last == first or tokens[last - 1] < end:
            continue
        losses = columns["loss"][first:last]
        found["loss"].append(Point(end, _mean(losses)))
        found["learning_rate"].append(Point(end, _mean(columns["learning_rate"][first:last])))
        # The norm of a step whose float16 gradients overflowed says nothing; a loss that broke does.
        norms = [norm for norm in columns["grad_norm"][first:last] if math.isfinite(norm)]
        if norms:
            found["grad_norm"].append(Point(end, statistics.median(norms)))
            found["grad_norm_peak"].append(Point(end, max(norms)))
        first = last
    return found


def _evaluated(columns: Columns, evaluations: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Point, ...]]:
    names = {"validation_loss": "loss", "norm_gain": "norm_gain", "residual_ratio": "residual_ratio"}
    found = {
        name: [Point(line["tokens"], _number(line[key])) for line in evaluations if line.get(key) is not None]
        for name, key in names.items()
    }
    found["gap"], found["applied_rate"] = [], []
    for line in evaluations:
        tokens = line["tokens"]
        last = bisect.bisect_right(columns["tokens"], tokens)
        if not last or columns["tokens"][last - 1] != tokens:  # the first evaluation precedes all steps
            continue
        first = bisect.bisect_right(columns["tokens"], tokens * (1 - TAIL))
        found["gap"].append(Point(tokens, _number(line["loss"]) - _mean(columns["loss"][first:last])))
        applied, logged = line.get("applied_learning_rate"), columns["learning_rate"][last - 1]
        if applied is not None and logged > 0:
            found["applied_rate"].append(Point(tokens, applied / logged))
    return {name: tuple(points) for name, points in found.items()}


def _number(value: object) -> float:
    """A number of a JSON line; NaN for null, and for what is none."""
    return float(value) if isinstance(value, int | float) else math.nan


def _mean(values: Sequence[float]) -> float:
    """The mean; infinite if one of them is not finite, for then something broke."""
    return statistics.fmean(values) if all(map(math.isfinite, values)) else math.inf


# ---------------------------------------------------------------- several healthy runs that differ in their seed -> the band in which another one is expecte


DEVIATIONS = 4.0
"""Half of a band's width in standard deviations: a run is compared at a hundred places, and a handful of
seeds gives their spread only roughly."""
NEIGHBOURS = 2
"""Points on each side whose spread is pooled with a point's own."""
LEAST = {
    "loss": 0.01,
    "validation_loss": 0.01,
    "gap": 0.02,
    "grad_norm": 0.1,
    "grad_norm_peak": 0.25,
    "learning_rate": 0.01,
    "norm_gain": 0.005,
    "residual_ratio": 0.1,
}
"""The least half width of each curve: as a share of the middle, the gap in nats. Chosen, not measured: what
another version of a library, another number of threads or another precision may move a healthy run by."""
MULTIPLY = frozenset({"grad_norm", "grad_norm_peak"})
"""Quantities that spread by factors."""


def record_curves(courses: Sequence[Course]) -> dict[str, Curve]:
    """The bands of all curves, at the tokens that all runs have a point at.

    Raises ValueError for fewer than two runs, and where one's values are not finite.
    """
    if len(courses) < 2:
        raise ValueError("a band needs two runs or more: give more seeds")
    return {name: _band(name, courses) for name in LEAST if all(name in course for course in courses)}


def describe_settings(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """`IDENTITY` and `SETTINGS` among a recipe's flat settings."""
    return {name: settings.get(name) for name in IDENTITY}, {name: settings.get(name) for name in SETTINGS}


def _band(name: str, courses: Sequence[Course]) -> Curve:
    runs = [dict(course[name]) for course in courses]
    tokens = sorted(set.intersection(*map(set, runs)))
    to, back = (math.log, math.exp) if name in MULTIPLY else (_as_it_is, _as_it_is)
    rows = [[to(run[at]) for run in runs] for at in tokens]
    if not all(math.isfinite(value) for row in rows for value in row):
        raise ValueError(f"a run whose {name} is not finite is no reference: leave it out")
    middles = [statistics.fmean(row) for row in rows]
    variances = [statistics.variance(row) for row in rows]
    start = int(tokens[0] == 0)  # before the first step nothing has spread yet
    spreads = [
        *(math.sqrt(each * (1 + 1 / len(runs))) for each in variances[:start]),
        *_pooled(variances[start:], len(runs)),
    ]
    halves = [
        max(_least(name, middle), DEVIATIONS * spread)
        for middle, spread in zip(middles, spreads, strict=True)
    ]
    sides = list(zip(middles, halves, strict=True))
    return Curve(
        tokens=tuple(tokens),
        low=tuple(_rounded(back(middle - half)) for middle, half in sides),
        middle=tuple(_rounded(back(middle)) for middle in middles),
        high=tuple(_rounded(back(middle + half)) for middle, half in sides),
    )


def _pooled(variances: Sequence[float], runs: int) -> list[float]:
    """The standard deviation of a new run about the mean of so many, at each point.

    It is the larger of the point's own and that of its neighbourhood, whose variances are pooled
    as their logarithms, since they fall by factors in the course of a run. Of few runs these are too small on
    average, by ln x - digamma(x) with x = (runs - 1) / 2, which is about 1 / 2x + 1 / 12x^2.
    """
    degrees = runs - 1
    correction = math.exp(1 / degrees + 1 / (3 * degrees**2))
    found = []
    for at, own in enumerate(variances):
        around = [each for each in variances[max(0, at - NEIGHBOURS) : at + NEIGHBOURS + 1] if each > 0]
        pooled = correction * statistics.geometric_mean(around) if around else 0.0
        found.append(math.sqrt(max(own, pooled) * (1 + 1 / runs)))
    return found


def _least(name: str, middle: float) -> float:
    if name in MULTIPLY:
        return math.log1p(LEAST[name])
    return LEAST[name] if name == "gap" else LEAST[name] * abs(middle)


def _as_it_is(value: float) -> float:
    return value


def _rounded(value: float) -> float:
    """Six digits: no curve is known to more."""
    return float(f"{value:.6g}")
