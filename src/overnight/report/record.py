"""Everything one run wrote, read for a page: what is missing stays empty, what is damaged is named."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from overnight.on_track.band import find_band
from overnight.on_track.course import COLUMNS as COMPARED_COLUMNS
from overnight.on_track.verdict import Verdict, judge
from overnight.report.curves import Series, column, smoothed, tokens_of_each_step
from overnight.report.lines import EVALUATION_KEYS, METRICS_KEYS, SAMPLE_KEYS, read_lines
from overnight.report.status import RunStatus, describe_run

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
class Record:
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

    verdict: Verdict | None
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


def read_run(path: Path) -> Record:
    """Read the run in `path`. Damaged parts are left out and named in `problems`."""
    problems: list[str] = []
    lines = _read_steps(path / "metrics.jsonl", METRICS_KEYS, problems)
    metrics = {name: column(lines, name) for name in COLUMNS}
    evaluations = _read_steps(path / "events" / "evaluations.jsonl", EVALUATION_KEYS, problems)
    recipe, data = (_read_object(path / name, problems) for name in ("recipe.toml", "data.json"))
    return Record(
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
) -> Verdict | None:
    """The run beside its recipe's reference, if there is one."""
    settings = {name: value for name, value in recipe.items() if not isinstance(value, dict)}
    for part in recipe.values():
        settings |= part if isinstance(part, dict) else {}
    band = find_band(settings, data)
    columns = {name: metrics[name].tolist() for name in COMPARED_COLUMNS}
    return judge(band, columns, evaluations, settings) if band else None


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
