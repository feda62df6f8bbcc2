"""Everything one run wrote, read for a page: what is missing stays empty, what is damaged is named."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from overnight.baselines.band import COLUMNS as COMPARED_COLUMNS
from overnight.baselines.band import find_band
from overnight.baselines.verdict import BandComparison, compare_with_band
from overnight.runs.status import (
    EVALUATION_KEYS,
    METRICS_KEYS,
    SAMPLE_KEYS,
    RunStatus,
    describe_run,
    read_lines,
)

COLUMNS = (
    "step",
    "tokens",
    "loss",
    "learning_rate",
    "grad_norm",
    "milliseconds",
    "tokens_per_second",
    "mfu",
    "mfu_executed",
)

Lines = tuple[dict[str, Any], ...]


@dataclass(frozen=True, kw_only=True)
class RunData:
    """One run, as its files tell it."""

    status: RunStatus

    recipe: dict[str, Any]
    environment: dict[str, Any]
    data: dict[str, Any]
    compression: dict[str, Any]
    """The four files' content; empty if there is no such file."""

    metrics: dict[str, Series]
    """One array per column of metrics.jsonl, NaN where a line lacks it; ordered by step."""

    evaluations: Lines
    samples: Lines
    tasks: Lines
    rollbacks: Lines

    verdict: BandComparison | None
    """How the run lies beside its recipe's reference; None if there is none, or nothing to compare yet."""

    problems: tuple[str, ...]
    """One sentence for everything that could not be read."""

    @property
    def steps(self) -> int:
        """How many steps the metrics tell of."""
        return len(self.metrics["step"])

    def smoothed_loss(self) -> Series:
        """The training loss in nats per token, each value over about a hundredth of the run."""
        return smoothed(self.metrics["loss"], tokens_of_each_step(self.metrics["tokens"]))


def read_run(path: Path) -> RunData:
    """Read the run in `path`. Damaged parts are left out and named in `problems`."""
    problems: list[str] = []
    lines = _read_steps(path / "metrics.jsonl", METRICS_KEYS, problems)
    metrics = {name: column(lines, name) for name in COLUMNS}
    evaluations = _read_steps(path / "events" / "evaluations.jsonl", EVALUATION_KEYS, problems)
    recipe, data = (_read_object(path / name, problems) for name in ("recipe.toml", "data.json"))
    return RunData(
        status=describe_run(path),
        recipe=recipe,
        environment=_read_object(path / "environment.json", problems),
        data=data,
        compression=_read_object(path / "compression.json", problems),
        metrics=metrics,
        evaluations=evaluations,
        samples=_read_events(path / "events" / "samples.jsonl", SAMPLE_KEYS, problems),
        tasks=_read_events(path / "events" / "tasks.jsonl", SAMPLE_KEYS, problems),
        rollbacks=_read_events(path / "events" / "rollbacks.jsonl", SAMPLE_KEYS, problems),
        verdict=_compare(recipe, data, metrics, evaluations),
        problems=tuple(problems),
    )


def _compare(
    recipe: Mapping[str, Any], data: Mapping[str, Any], metrics: Mapping[str, Series], evaluations: Lines
) -> BandComparison | None:
    """The run beside its recipe's reference, if there is one."""
    settings = {name: value for name, value in recipe.items() if not isinstance(value, dict)}
    for part in recipe.values():
        settings |= part if isinstance(part, dict) else {}
    band = find_band(settings, data)
    columns = {name: metrics[name].tolist() for name in COMPARED_COLUMNS}
    return compare_with_band(band, columns, evaluations, settings) if band else None


def _read_events(path: Path, numeric_keys: tuple[str, ...], problems: list[str]) -> Lines:
    lines = read_lines(path, numeric_keys)
    problems += lines.problems
    if lines.is_torn:
        problems.append(
            f"{path.name} has a torn last line, left out: its writing was cut short, or is under way"
        )
    return tuple(sorted(lines.values, key=lambda line: line["step"]))


def _read_steps(path: Path, numeric_keys: tuple[str, ...], problems: list[str]) -> Lines:
    """The lines of a file that should hold each step once; of a step that is there twice, the later line."""
    lines = _read_events(path, numeric_keys, problems)
    by_step = {line["step"]: line for line in lines}
    if len(by_step) < len(lines):
        repeated = len(lines) - len(by_step)
        problems.append(f"{path.name} tells of {repeated:,} steps more than once; the later line counts")
    return tuple(by_step.values())


def _read_object(path: Path, problems: list[str]) -> dict[str, Any]:
    """A TOML or JSON file's table; {} if there is no such file or it cannot be read."""
    if not path.is_file():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        value = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (ValueError, RecursionError) as error:
        problems.append(f"{path.name} cannot be read and is left out: {error}")
        return {}
    if isinstance(value, dict):
        return value
    problems.append(f"{path.name} is left out: it holds no object")
    return {}


def is_finite(number: object) -> TypeGuard[float]:
    """True for a number that can be drawn and printed."""
    return isinstance(number, int | float) and bool(np.isfinite(number))


# ---------------------------------------------------------------- long series made fit for a picture


Series = NDArray[np.float64]

WINDOWS_PER_RUN = 100
"""A smoothed curve averages over one part in so many; below twice that, there is nothing to average."""


def column(lines: Sequence[Mapping[str, Any]], key: str) -> Series:
    """`key` of every line as float64; NaN where a line has no such number."""
    values = (line.get(key) for line in lines)
    return np.array([value if isinstance(value, int | float) else np.nan for value in values], np.float64)


def median(series: Series) -> float | None:
    """The median of the finite values; None if there is none."""
    finite = series[np.isfinite(series)]
    return float(np.median(finite)) if finite.size else None


def smoothed(series: Series, weights: Series | None = None, window: int | None = None) -> Series:
    """The weighted mean over `window` neighbours of each value; values that are not finite count for nothing.

    Centred, so that nothing is delayed. Near the start the window narrows on both sides, since a
    falling loss would be flattened there; near the end it is cut off on the right only, since a single
    last value would be noise. `window` defaults to a hundredth of the series. With tokens as weights,
    the mean of losses is the loss of those tokens.
    """
    count = len(series)
    reach = (max(1, count // WINDOWS_PER_RUN) if window is None else window) // 2
    is_finite = np.isfinite(series)
    weights = np.where(is_finite, 1.0 if weights is None else weights, 0.0)
    sums = np.concatenate([[0.0], np.cumsum(np.where(is_finite, series, 0.0) * weights)])
    totals = np.concatenate([[0.0], np.cumsum(weights)])
    at = np.arange(count)
    left = at - np.minimum(reach, at)
    right = np.minimum(at + np.minimum(reach, at) + 1, count)
    total = totals[right] - totals[left]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(total > 0, (sums[right] - sums[left]) / total, np.nan)


def thinned(series: Series, points: int) -> NDArray[np.int64]:
    """Indices of at most `points` values that look like the whole series: each stretch's lowest and highest.

    A spike of a single step stays visible. The first and the last value are always kept.
    """
    count = len(series)
    if count <= points:
        return np.arange(count)
    edges = np.linspace(0, count, max(1, (points - 2) // 2) + 1).astype(int)
    kept = {0, count - 1}
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        stretch = series[start:stop]
        if np.isfinite(stretch).any():
            kept |= {start + int(np.nanargmin(stretch)), start + int(np.nanargmax(stretch))}
    return np.array(sorted(kept), np.int64)


def tokens_of_each_step(tokens: Series) -> Series:
    """How many tokens each line's step saw, from the cumulative counts; the first line counts from zero."""
    return np.diff(tokens, prepend=0.0)


def spread(positions: Sequence[float], gap: float) -> list[float]:
    """Positions at least `gap` apart, in the same order and as near to the wanted ones as that allows."""
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    groups: list[tuple[float, list[int]]] = []
    for index in order:
        groups.append((positions[index], [index]))
        while len(groups) > 1 and _overlap(groups[-2], groups[-1], gap):
            (low, before), (high, after) = groups[-2:]
            middle = (low * len(before) + high * len(after)) / (len(before) + len(after))
            groups[-2:] = [(middle, before + after)]
    placed = [0.0] * len(positions)
    for middle, members in groups:
        for rank, index in enumerate(members):
            placed[index] = middle + (rank - (len(members) - 1) / 2) * gap
    return placed


def _overlap(low: tuple[float, list[int]], high: tuple[float, list[int]], gap: float) -> bool:
    return high[0] - low[0] < gap * (len(low[1]) + len(high[1])) / 2
