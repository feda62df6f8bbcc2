"""Sides measured in turn, their ratios in pairs, and the table that says so."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

from overnight import __version__
from overnight.hardware import find_device_name, find_memory_bytes
from overnight.model.model_config import ModelConfig
from overnight.model.presets import PRESETS

T = TypeVar("T")

DONE, WRONG_USE = 0, 2
OVERNIGHT_IS = "overnight is: how many times as fast it is; the median of the ratios within each round."

OPTIONS: dict[str, dict[str, Any]] = {
    "peer": {"type": Path, "help": "a checkout of build-nanogpt"},
    "nanogpt": {"type": Path, "help": "a checkout of nanoGPT"},
    "device": {"choices": ("cpu", "cuda"), "default": "cpu"},
    "layers": {"type": int, "default": 12, "help": "fewer make a quick try"},
    "text": {"type": Path, "help": "a text file; Python's documentation if left out"},
    "data": {"type": Path, "help": "instead of a text: a folder that overnight prepare wrote"},
    "bpe": {"type": Path, "help": "folder of encoder.json and vocab.bpe; the cache if left out"},
}
"""Those that several programs have."""


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


def interleave_times(
    sides: Mapping[str, Callable[[], object]], repeats: int, warm_ups: int = 0
) -> dict[str, list[float]]:
    """The milliseconds of each side's calls, in turn."""
    return interleave({name: partial(milliseconds, side) for name, side in sides.items()}, repeats, warm_ups)


class Finished(NamedTuple):
    """What a command left behind."""

    output: str
    seconds: float
    """From the command to its end."""
    cpu_seconds: float
    """Of all cores together: other work on the machine changes it little, threads that wait add to it."""
    peak_bytes: int
    """The most that the largest of its processes had resident."""


def run_process(
    command: Sequence[str], folder: Path | None = None, environment: Mapping[str, str] | None = None
) -> Finished:
    """Run a command to its end. Raises ValueError, with what it said last, if it fails."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+", errors="replace") as errors:
        started_at = time.perf_counter()
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started_at
        process.returncode = os.waitstatus_to_exitcode(status)  # it was waited for behind the object's back
        output.seek(0)
        errors.seek(0)
        if process.returncode:
            last = errors.read().strip()[-1500:] or "it said nothing"
            raise ValueError(f"{' '.join(command[:4])} ... failed: {last}")
        unit = 1 if sys.platform == "darwin" else 1024
        cpu_seconds = usage.ru_utime + usage.ru_stime
        return Finished(output.read(), seconds, cpu_seconds, usage.ru_maxrss * unit)


def overnight_command() -> list[str]:
    """`overnight` as one types it."""
    script = Path(sys.executable).with_name("overnight")
    return [str(script)] if script.is_file() else [sys.executable, "-m", "overnight"]


def paired_ratio(times: Sequence[float], reference: Sequence[float]) -> float:
    """How many times as fast as the reference: the median, over the rounds, of its time by ours.

    Unlike the ratio of two medians, it compares only what was measured side by side.
    """
    return statistics.median(theirs / ours for ours, theirs in zip(times, reference, strict=True))


def times_as_fast(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """The ratio as a table cell; OVERNIGHT_IS explains it."""
    return f"{paired_ratio(ours, theirs):.2f}x as fast"


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


def gpt2_124m(**changes: Any) -> ModelConfig:
    """With these changes, fewer layers for a quick try. Raises ValueError if they do not make a model."""
    config = dataclasses.replace(PRESETS["gpt2-124m"], **changes)
    if problems := config.problems():
        raise ValueError("; ".join(problems))
    return config


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


def command_line(
    about: str | None, shared: str = "", repeats: int | None = None, of: str = "measured repeats of each side"
) -> argparse.ArgumentParser:
    """The options --json, --repeats if there is a default, and the `shared` ones of OPTIONS."""
    parser = argparse.ArgumentParser(description=(about or "").split("\n")[0])
    for name in shared.split():
        parser.add_argument(f"--{name}", **OPTIONS[name])
    if repeats is not None:
        parser.add_argument("--repeats", type=int, default=repeats, help=of)
    parser.add_argument("--json", action="store_true", help="print every figure, as JSON")
    return parser


def check_counts(options: argparse.Namespace, *names: str, least: int = 1) -> None:
    """Raise ValueError if one of these options is too small."""
    for name in names:
        if (count := getattr(options, name)) < least:
            raise ValueError(f"--{name.replace('_', '-')} {count} is too few; give at least {least}")


def run_plainly(work: Callable[[], Report], *, as_json: bool) -> int:
    """Show what `work` reports; the exit status. A ValueError is the user's, and is one plain sentence."""
    try:
        work().show(as_json=as_json)
    except ValueError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return WRONG_USE
    return DONE


def run_program(
    read_options: Callable[[Sequence[str]], argparse.Namespace], work: Callable[[argparse.Namespace], Report]
) -> NoReturn:
    """Report, as the command line asks."""
    options = read_options(sys.argv[1:])
    sys.exit(run_plainly(lambda: work(options), as_json=options.json))
