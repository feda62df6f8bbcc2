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

from overnight.model.parts import MODEL_SWITCHES

Series = NDArray[np.float64]
DEFAULT_IDENTITY = {**MODEL_SWITCHES, "optimizer": "adamw"}
"""The switches of a band that was recorded before there were any: GPT-2's."""


class BandPoint(NamedTuple):
    """The band at one number of tokens."""

    low: float
    middle: float
    high: float

    def __str__(self) -> str:
        return f"{self.low:.4g} to {self.high:.4g}"


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
    """Settings that define the experiment: a run with other values has no reference."""
    settings: Mapping[str, Any]
    """Settings that change the curves: reported where they differ."""
    text: Mapping[str, tuple[str, ...]]
    """The allowed values of fields of data.json that identify the text."""
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
        return json.dumps(asdict(self)) + "\n"


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
        identity, own = {**DEFAULT_IDENTITY, **band.identity}, {**DEFAULT_IDENTITY, **settings}
        is_same_recipe = all(own.get(name) == value for name, value in identity.items())
        if is_same_recipe and all(text.get(name) in known for name, known in band.text.items()):
            return band
    return None


def _or_unset(value: object) -> str:
    return "not set" if value is None else str(value)


# A run's curves.

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
