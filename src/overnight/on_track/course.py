"""What a run's files tell of its training, as curves over tokens that can be laid beside other runs' ones.

The training curves have a point at the end of each stretch of steps, over all of which it is taken, so that
single steps' noise counts for little and a live run has the same points as a finished one. The others have
one for each evaluation.
"""

from __future__ import annotations

import bisect
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

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


def stretch_ends(total_steps: int) -> list[int]:
    """The steps at which stretches end: 1, 2, 4, ... until they are a fortieth of the run, then evenly."""
    longest = max(1, math.ceil(total_steps / STRETCHES))
    ends = [1]
    while ends[-1] < total_steps:
        ends.append(min(total_steps, ends[-1] + min(ends[-1], longest)))
    return ends


def observe(columns: Columns, evaluations: Sequence[Mapping[str, Any]], ends: Sequence[int]) -> Course:
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
