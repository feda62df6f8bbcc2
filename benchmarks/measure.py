"""Sides measured in turn, their ratios in pairs, and the table that says so."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from overnight import __version__
from overnight.hardware import find_device_name, find_memory_bytes
from overnight.model.model_config import ModelConfig

T = TypeVar("T")

DONE, WRONG_USE = 0, 2


def interleave(sides: Mapping[str, Callable[[], T]], repeats: int, warm_ups: int = 0) -> dict[str, list[T]]:
    """What each side returned, `repeats` times, taken in turn: A B C A B C.

    A machine's speed drifts with its heat and its other work; sides of one round had the same machine.
    `warm_ups` rounds come first, and what they return is thrown away.
    """
    if repeats < 1:
        raise ValueError(f"{repeats} repeats measure nothing; give at least 1")
    results: dict[str, list[T]] = {name: [] for name in sides}
    for number in range(warm_ups + repeats):
        for name, side in sides.items():
            result = side()
            if number >= warm_ups:
                results[name].append(result)
    return results


def milliseconds(action: Callable[[], object]) -> float:
    """Wall time of one call."""
    started_at = time.perf_counter()
    action()
    return (time.perf_counter() - started_at) * 1e3


def timed(action: Callable[[], object]) -> Callable[[], float]:
    """`action` as a side of `interleave` that returns its milliseconds."""
    return lambda: milliseconds(action)


def paired_ratio(times: Sequence[float], reference: Sequence[float]) -> float:
    """How many times as fast as the reference: the median, over the rounds, of its time by ours.

    Unlike the ratio of two medians, it compares only what was measured side by side.
    """
    return statistics.median(theirs / ours for ours, theirs in zip(times, reference, strict=True))


def spread(times: Sequence[float], digits: int = 0) -> list[str]:
    """Median, least and most, as table cells."""
    return [f"{value:,.{digits}f}" for value in (statistics.median(times), min(times), max(times))]


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column stands left, the others, which are numbers, right."""
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = cells
        padded = [first.ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        return f"| {' | '.join(padded)} |"

    ruler = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(headings), line(ruler), *map(line, rows)])


def model_name(config: ModelConfig) -> str:
    """GPT-2 and its number of parameters: 124M, if no layer was left out for a quick try."""
    return f"GPT-2 {config.parameter_count() / 1e6:.0f}M"


def on_device(device: str) -> str:
    """Where something is computed, in words."""
    return "the CPU" if device == "cpu" else "a GPU"


def describe_machine(device: str = "cpu") -> dict[str, Any]:
    """What the figures were measured on, and how busy it was."""
    return {
        "device": find_device_name(device),
        "cores": os.cpu_count(),
        "memory_bytes": find_memory_bytes("cpu"),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "overnight": __version__,
        "load_average": round(os.getloadavg()[0], 2),
    }


@dataclass(frozen=True, kw_only=True)
class Report:
    """One question's answer: a table to read and everything that was measured, for a program."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    measured: Mapping[str, Any]
    """By side: every single figure."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
    """Sentences that belong under the table."""
    machine: Mapping[str, Any] = field(default_factory=describe_machine)
    date: str = field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M"))

    def as_markdown(self) -> str:
        """Title, table, notes, machine and date."""
        machine = self.machine
        where = (
            f"{machine['device']}, {machine['cores']} cores, {machine['memory_bytes'] / 1e9:.0f} GB; "
            f"Python {machine['python']}, torch {machine['torch']}, overnight {machine['overnight']}; "
            f"{machine['platform']}; load average {machine['load_average']}; {self.date}"
        )
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        table = markdown_table(self.headings, self.rows)
        lines = [f"### {self.title}", *filter(None, [settings]), table, *self.notes, where]
        return "\n\n".join(lines)

    def as_json(self) -> str:
        """The same, with every single figure."""
        parts = ("title", "date", "machine", "settings", "measured", "notes")
        return json.dumps({name: getattr(self, name) for name in parts}, indent=2)

    def save(self, folder: Path, part: str) -> None:
        """Write it to folder/part.md, where tools/figures.py reads it."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{part}.md").write_text(self.as_markdown(), encoding="utf-8")

    def show(self, *, as_json: bool) -> None:
        """Print it to standard output."""
        print(self.as_json() if as_json else self.as_markdown())


def run_plainly(work: Callable[[], Report], *, as_json: bool) -> int:
    """Show what `work` reports; the exit status. A ValueError is the user's, and is one plain sentence."""
    try:
        work().show(as_json=as_json)
    except ValueError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return WRONG_USE
    return DONE
