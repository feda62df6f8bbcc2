"""A run's curves, and the band of healthy runs' curves for one recipe, text and tokenizer."""

from __future__ import annotations

import bisect
import functools
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Series = NDArray[np.float64]

IDENTITY = (
    *("n_layer", "n_head", "n_embd", "context_length", "vocab_size", "init_from"),
    *("total_steps", "tokens_per_step", "batch_ramp_start_tokens", "batch_ramp_tokens"),
)
"""Settings that define the experiment: a run with other values has no reference."""
SETTINGS = (
    *("dropout", "peak_learning_rate", "weight_decay", "beta1", "beta2", "epsilon", "max_grad_norm"),
    *("warmup_steps", "learning_rate_decay", "decay_steps", "final_learning_rate_fraction"),
    *("packing", "shuffle_window", "validation_fraction", "evaluation_tokens"),
)
"""Settings that change the curves: reported where they differ."""
TEXT = ("source", "tokenizer", "tokenizer_fingerprint")
"""Fields of data.json that identify a text."""


class BandPoint(NamedTuple):
    """The band at one number of tokens."""

    low: float
    middle: float
    high: float


@dataclass(frozen=True, kw_only=True)
class BandCurve:
    """One quantity's band over the tokens trained on."""

    tokens: tuple[int, ...]
    low: tuple[float, ...]
    middle: tuple[float, ...]
    high: tuple[float, ...]

    def at(self, tokens: int) -> BandPoint | None:
        """The band, linear in the logarithm of the tokens between points; None outside of the points.

        Also None between the start and the next point, where the loss falls too fast to interpolate.
        """
        index = bisect.bisect_left(self.tokens, tokens)
        if index == len(self.tokens):
            return None
        if self.tokens[index] == tokens:
            return BandPoint(self.low[index], self.middle[index], self.high[index])
        if index == 0 or self.tokens[index - 1] == 0:
            return None
        ends = slice(index - 1, index + 1)
        at, logarithms = math.log(tokens), np.log(self.tokens[ends])
        edges = (self.low, self.middle, self.high)
        return BandPoint(*(float(np.interp(at, logarithms, edge[ends])) for edge in edges))


@dataclass(frozen=True, kw_only=True)
class ReferenceBand:
    """The curves of healthy runs of one recipe on one text, and their source."""

    recipe: str
    """The recipe's name."""
    source: str
    """Source of the figures, such as "5 recorded runs"."""
    date: str
    notes: str = ""
    """How the runs were made, and how the band was widened."""
    identity: Mapping[str, Any]
    """`IDENTITY` of the recipe."""
    settings: Mapping[str, Any]
    """Values of `SETTINGS` that the source states; others are not compared."""
    text: Mapping[str, tuple[str, ...]]
    """The allowed values of each field of `TEXT`."""
    unigram_nats: float | None
    """Entropy of the training text's token frequencies: the loss without any context."""
    curves: Mapping[str, BandCurve]
    """Curves by the names of `RunCurves`; unknown ones are left out."""

    def differences(self, settings: Mapping[str, Any]) -> dict[str, str]:
        """Setting -> how it differs from the reference's: "dropout is 0.1, and 0.0 in the reference"."""
        return {
            name: f"{name} is {_or_unset(settings.get(name))}, and {_or_unset(value)} in the reference"
            for name, value in self.settings.items()
            if settings.get(name) != value
        }

    def to_json(self) -> str:
        """The content of a file in bands/."""
        return json.dumps(asdict(self), indent=None) + "\n"


def read_band(text: str) -> ReferenceBand:
    """The band that `to_json` wrote."""
    values: dict[str, Any] = json.loads(text)
    values["curves"] = {
        name: BandCurve(**{key: tuple(numbers) for key, numbers in curve.items()})
        for name, curve in values["curves"].items()
    }
    values["text"] = {name: tuple(known) for name, known in values["text"].items()}
    return ReferenceBand(**values)


@functools.cache
def load_bands() -> tuple[ReferenceBand, ...]:
    """The bands of the package, sorted by file name."""
    folder = resources.files("overnight.baselines") / "bands"
    entries = sorted(folder.iterdir(), key=lambda entry: entry.name)
    return tuple(read_band(entry.read_text("utf-8")) for entry in entries if entry.name.endswith(".json"))


def find_band(
    settings: Mapping[str, Any], text: Mapping[str, Any], bands: Iterable[ReferenceBand] | None = None
) -> ReferenceBand | None:
    """The band for a run with these flat settings and fields of data.json; None if there is none."""
    for band in load_bands() if bands is None else bands:
        is_same_recipe = all(settings.get(name) == value for name, value in band.identity.items())
        if is_same_recipe and all(text.get(name) in known for name, known in band.text.items()):
            return band
    return None


def _or_unset(value: object) -> str:
    return "not set" if value is None else str(value)


# A run's curves.

WINDOWS = 40
"""Approximate number of averaging windows of a run; the first are shorter, since the loss falls fast."""
TAIL = 0.25
"""Share of the tokens so far over which the training loss is averaged for `gap`."""
COLUMNS = ("tokens", "loss", "grad_norm", "learning_rate")


class Point(NamedTuple):
    """A curve's value after `tokens` tokens of training."""

    tokens: int
    value: float


Columns = Mapping[str, Series]
"""`COLUMNS` of metrics.jsonl, one number for each step, NaN where it is missing."""
RunCurves = Mapping[str, tuple[Point, ...]]
"""By name: loss, grad_norm, grad_norm_peak, learning_rate of each window; validation_loss, gap, norm_gain,
residual_ratio, applied_rate of each evaluation. Names without a point are left out."""


def columns_of(lines: Sequence[Mapping[str, Any]], names: Sequence[str] = COLUMNS) -> dict[str, Series]:
    """The columns `names` of the lines of metrics.jsonl."""
    return {name: np.array([_number(line.get(name)) for line in lines], np.float64) for name in names}


def window_ends(total_steps: int) -> list[int]:
    """The steps at which windows end: 1, 2, 4, ... up to a fortieth of the run, then evenly spaced."""
    longest = max(1, math.ceil(total_steps / WINDOWS))
    ends = [1]
    while ends[-1] < total_steps:
        ends.append(min(total_steps, ends[-1] + min(ends[-1], longest)))
    return ends


def run_curves(columns: Columns, evaluations: Sequence[Mapping[str, Any]], ends: Sequence[int]) -> RunCurves:
    """The curves of a run with windows that end at `ends`, in tokens; an unfinished window has no point."""
    curves: defaultdict[str, list[Point]] = defaultdict(list)
    tokens, first = columns["tokens"], 0
    for end in ends:
        last = int(np.searchsorted(tokens, end, side="right"))
        if last == first or tokens[last - 1] < end:
            continue
        loss, norms, rate = (columns[name][first:last] for name in COLUMNS[1:])
        curves["loss"].append(Point(end, _mean(loss)))
        curves["learning_rate"].append(Point(end, _mean(rate)))
        # A norm that is not finite is a float16 overflow, whose step is skipped; such a loss is a failure.
        if (finite := norms[np.isfinite(norms)]).size:
            curves["grad_norm"].append(Point(end, float(np.median(finite))))
            curves["grad_norm_peak"].append(Point(end, float(finite.max())))
        first = last
    for line in evaluations:
        for name, value in _evaluation_values(columns, line):
            curves[name].append(Point(line["tokens"], value))
    return {name: tuple(points) for name, points in curves.items()}


def _evaluation_values(columns: Columns, line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The points of an evaluation, by the names of their curves."""
    keys = {"validation_loss": "loss", "norm_gain": "norm_gain", "residual_ratio": "residual_ratio"}
    yield from ((name, _number(line[key])) for name, key in keys.items() if line.get(key) is not None)
    tokens = line["tokens"]
    first, last = np.searchsorted(columns["tokens"], [tokens * (1 - TAIL), tokens], side="right")
    if not last or columns["tokens"][last - 1] != tokens:  # the first evaluation is before all steps
        return
    yield "gap", _number(line["loss"]) - _mean(columns["loss"][first:last])
    applied, logged = line.get("applied_learning_rate"), float(columns["learning_rate"][last - 1])
    if applied is not None and logged > 0:
        yield "applied_rate", applied / logged


def _number(value: object) -> float:
    """A value of a JSON line as a float; NaN if it is not a number."""
    return float(value) if isinstance(value, int | float) else math.nan


def _mean(values: Series) -> float:
    """The mean; infinite if one value is not finite."""
    return float(values.mean()) if np.isfinite(values).all() else math.inf


# How a band is recorded from several healthy runs that differ in their seed.

HALF_WIDTH = 4.0
"""Half of a band's width in standard deviations: a run is compared at a hundred points, and a few seeds
estimate their spread only roughly."""
NEIGHBOURS = 2
"""Points on each side whose spread is pooled with a point's own."""
MIN_HALF_WIDTH = {
    "loss": 0.01,
    "validation_loss": 0.01,
    "gap": 0.02,
    "grad_norm": 0.1,
    "grad_norm_peak": 0.25,
    "learning_rate": 0.01,
    "norm_gain": 0.005,
    "residual_ratio": 0.1,
}
"""The least half width of each curve: as a share of the middle, the gap in nats. Chosen, not measured: the
effect of another library version, number of threads or precision on a healthy run."""
LOG_SCALE = frozenset({"grad_norm", "grad_norm_peak"})
"""Quantities that vary by factors."""


def record_curves(runs: Sequence[RunCurves]) -> dict[str, BandCurve]:
    """The bands of the curves that all runs have, at the tokens where all have a point.

    Raises ValueError for fewer than two runs, and for values that are not finite.
    """
    if len(runs) < 2:
        raise ValueError("a band needs at least two runs: give more seeds")
    names = [name for name in MIN_HALF_WIDTH if all(name in run for run in runs)]
    return {name: _band_curve(name, [dict(run[name]) for run in runs]) for name in names}


def describe_settings(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """`IDENTITY` and `SETTINGS` among a recipe's flat settings."""
    return {name: settings.get(name) for name in IDENTITY}, {name: settings.get(name) for name in SETTINGS}


def _band_curve(name: str, runs: Sequence[Mapping[int, float]]) -> BandCurve:
    """The band of one curve from each run's values by tokens."""
    tokens = sorted(set.intersection(*map(set, runs)))
    values = np.array([[run[at] for run in runs] for at in tokens])
    if name in LOG_SCALE:
        values = np.log(values)
    if not np.isfinite(values).all():
        raise ValueError(f"a run whose {name} is not finite can't be a reference: leave it out")
    middle, variances = values.mean(axis=1), values.var(axis=1, ddof=1)
    start = int(tokens[0] == 0)  # before the first step the runs differ only in their initial weights
    variances[start:] = _pooled(variances[start:], len(runs))
    least = MIN_HALF_WIDTH[name] * (1.0 if name == "gap" else np.abs(middle))
    if name in LOG_SCALE:
        least = np.log1p(MIN_HALF_WIDTH[name])
    half = np.maximum(least, HALF_WIDTH * np.sqrt(variances * (1 + 1 / len(runs))))  # of a new run
    edges = np.stack([middle - half, middle, middle + half])
    if name in LOG_SCALE:
        edges = np.exp(edges)
    low, middles, high = (tuple(float(f"{value:.6g}") for value in edge) for edge in edges)
    return BandCurve(tokens=tuple(tokens), low=low, middle=middles, high=high)


def _pooled(variances: Series, runs: int) -> list[float]:
    """At each point, the larger of the point's own variance and that of its neighbours.

    Their variances are pooled as logarithms, since they fall by factors during a run. The logarithm of a
    variance of few runs is too small on average, by ln x - digamma(x) with x = (runs - 1) / 2, which is about
    1 / 2x + 1 / 12x^2.
    """
    degrees = runs - 1
    correction = 1 / degrees + 1 / (3 * degrees**2)
    pooled = []
    for at, own in enumerate(variances):
        around = variances[max(0, at - NEIGHBOURS) : at + NEIGHBOURS + 1]
        around = around[around > 0]
        pooled.append(max(float(own), math.exp(np.log(around).mean() + correction) if around.size else 0.0))
    return pooled
