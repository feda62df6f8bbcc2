"""The files of one run: missing ones are empty, damaged ones are reported."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from overnight.baselines.band import Series, columns_of, find_band
from overnight.baselines.verdict import BandComparison, compare_with_band
from overnight.runs.json_lines import EVENT_KEYS, LOSS_KEYS, read_lines
from overnight.runs.status import RunStatus, describe_run, flat_settings

COLUMNS = (
    *("step", "tokens", "loss", "learning_rate", "grad_norm"),
    *("milliseconds", "tokens_per_second", "mfu", "mfu_executed"),
)
WINDOWS_PER_RUN = 100
"""A smoothed curve averages over this fraction of a run; shorter runs than twice that are not smoothed."""

Lines = tuple[dict[str, Any], ...]


@dataclass(frozen=True, kw_only=True)
class RunData:
    """The content of one run directory."""

    status: RunStatus
    recipe: dict[str, Any]
    environment: dict[str, Any]
    data: dict[str, Any]
    compression: dict[str, Any]
    """The four files' content; empty if there is no such file. `compression` may also be measured anew."""
    settings: dict[str, Any]
    """The recipe's settings by their current names."""
    metrics: dict[str, Series]
    """One array for each column of metrics.jsonl, ordered by step, NaN where a line lacks the column."""
    evaluations: Lines
    samples: Lines
    tasks: Lines
    rollbacks: Lines
    comparison: BandComparison | None
    """Comparison with the recipe's reference band; None if there is none, or nothing to compare yet."""
    problems: tuple[str, ...]
    """One sentence for each part that could not be read."""

    @property
    def steps(self) -> int:
        """Number of steps in the metrics."""
        return len(self.metrics["step"])

    @property
    def last_evaluation(self) -> dict[str, Any]:
        """The latest evaluation; empty if there is none."""
        return self.evaluations[-1] if self.evaluations else {}

    @property
    def loss_interval(self) -> tuple[float, float] | None:
        """The ends of the latest validation loss's 95% interval; None if it has none."""
        low, high = (self.last_evaluation.get(name) for name in ("low", "high"))
        return (low, high) if is_finite(low) and is_finite(high) else None

    @property
    def training_seconds(self) -> float | None:
        """The time spent in training steps; None if no step has one."""
        known = self.metrics["milliseconds"][np.isfinite(self.metrics["milliseconds"])]
        return float(known.sum()) / 1000 if known.size else None

    def smoothed_loss(self) -> Series:
        """The training loss in nats per token, averaged over about a hundredth of the run."""
        tokens_of_step = np.diff(self.metrics["tokens"], prepend=0.0)
        return smoothed(self.metrics["loss"], tokens_of_step)


def read_run(path: Path) -> RunData:
    """Read the run in `path`. Damaged parts are left out and reported in `problems`."""
    problems: list[str] = []
    events = path / "events"
    metrics = columns_of(_read_steps(path / "metrics.jsonl", problems), COLUMNS)
    evaluations = _read_steps(events / "evaluations.jsonl", problems)
    recipe, data, environment, compression = (
        _read_object(path / name, problems)
        for name in ("recipe.toml", "data.json", "environment.json", "compression.json")
    )
    samples, tasks, rollbacks = (
        _read_events(events / f"{kind}.jsonl", EVENT_KEYS, problems)
        for kind in ("samples", "tasks", "rollbacks")
    )
    status, settings = describe_run(path), flat_settings(recipe)
    if status.problem and status.problem not in problems:
        problems.append(status.problem)
    band = find_band(settings, data)
    return RunData(
        status=status,
        recipe=recipe,
        environment=environment,
        data=data,
        compression=compression,
        settings=settings,
        metrics=metrics,
        evaluations=evaluations,
        samples=samples,
        tasks=tasks,
        rollbacks=rollbacks,
        comparison=compare_with_band(band, metrics, evaluations, settings) if band else None,
        problems=tuple(problems),
    )


def _read_events(path: Path, numeric_keys: tuple[str, ...], problems: list[str]) -> Lines:
    lines = read_lines(path, numeric_keys)
    problems += lines.problems
    if lines.is_torn:
        problems.append(f"{path.name} has a torn last line, left out: it is being written, or was truncated")
    return tuple(sorted(lines.values, key=lambda line: line["step"]))


def _read_steps(path: Path, problems: list[str]) -> Lines:
    """The lines of a file that holds each step once; of a repeated step, the later line."""
    lines = _read_events(path, LOSS_KEYS, problems)
    by_step = {line["step"]: line for line in lines}
    if repeated := len(lines) - len(by_step):
        problems.append(f"{path.name} holds {repeated:,} steps more than once; the later line counts")
    return tuple(by_step.values())


def _read_object(path: Path, problems: list[str]) -> dict[str, Any]:
    """The table of a TOML or JSON file; {} if there is no such file or it cannot be read."""
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
    problems.append(f"{path.name} is left out: it is not a JSON object")
    return {}


def is_finite(number: object) -> TypeGuard[float]:
    """True for a number that can be drawn and printed."""
    return isinstance(number, int | float) and bool(np.isfinite(number))


def median(series: Series) -> float | None:
    """The median of the finite values; None if there is none."""
    finite = series[np.isfinite(series)]
    return float(np.median(finite)) if finite.size else None


def smoothed(series: Series, weights: Series | None = None, window: int | None = None) -> Series:
    """The weighted mean over `window` neighbours of each value; values that are not finite are skipped.

    The window is centred. Near the start it narrows on both sides, because a falling loss would be flattened
    there; near the end it is cut off on the right only, because a single last value would be noise. `window`
    defaults to a hundredth of the series. With tokens as weights, the mean of losses is those tokens' loss.
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
