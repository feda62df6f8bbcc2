"""Faults injected into real runs of a tiny model, many times each; every promise must hold every time.

    python tests/campaigns/faults.py --parts crashes kills
    python tests/campaigns/faults.py --quick

A part fails if one trial fails, or if its negative control (our own code without the protection) passes. With
--figures each part's table is written to FOLDER/PART.md, for tools/figures.py. Linux only.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in every trial

from faults_background import measure_background
from faults_crashes import measure_crashes, measure_errors
from faults_damage import measure_corruption, measure_fallback
from faults_environments import measure_environments
from faults_input import measure_input
from faults_kills import measure_kills, measure_starts
from faults_long import measure_leaks, measure_rows
from faults_parents import measure_parents
from faults_preparation import measure_preparation
from faults_record import measure_record
from faults_signals import measure_signals
from faults_stops import measure_stops
from faults_trials import Place, prepare_place
from report import Report, run_plainly

Measure = Callable[[Place, dict[str, Any], int], Report]
PARTS: dict[str, tuple[Measure, dict[str, Any], dict[str, Any]]] = {
    "corruption": (measure_corruption, {"flips": 1000, "damages": 200}, {"flips": 30, "damages": 12}),
    "record": (measure_record, {"changes_of_files": 500}, {"changes_of_files": 20}),
    "fallback": (measure_fallback, {"fallbacks": 200}, {"fallbacks": 3}),
    "crashes": (
        measure_crashes,
        {"course": 0, "crashes": None, "controls": 12},
        {"course": 0, "crashes": 1, "controls": 2},
    ),
    "resumes": (
        measure_crashes,
        {"course": 1, "crashes": None, "controls": 12},
        {"course": 1, "crashes": 2, "controls": 2},
    ),
    "errors": (
        measure_errors,
        {"errors": None, "resumed": None, "limits": 30, "controls": 12},
        {"errors": 1, "resumed": 1, "limits": 1, "controls": 2},
    ),
    "background": (
        measure_background,
        {"changed": 40, "killed": 40, "failed": 40},
        {"changed": 1, "killed": 1, "failed": 1},
    ),
    "environments": (
        measure_environments,
        {"troubles": None, "mutants": None},
        {"troubles": 5, "mutants": 1},
    ),
    "stops": (measure_stops, {"schedules": 100, "of_each": 10}, {"schedules": 4, "of_each": 2}),
    "kills": (measure_kills, {"kills": 100}, {"kills": 5}),
    "signals": (
        measure_signals,
        {"phases": 5, "of_each_phase": 12, "signals": 60, "twice": 10},
        {"phases": 1, "of_each_phase": 1, "signals": 1, "twice": 1},
    ),
    "rows": (measure_rows, {"streams": 2}, {"streams": 1}),
    "leaks": (
        measure_leaks,
        {"steps": 10_000, "control_steps": 2000},
        {"steps": 1200, "control_steps": 1200},
    ),
    "preparation": (
        measure_preparation,
        {
            "preparations": 50,
            "changes": None,
            "controls": 12,
            "crowds": 20,
            "commands": 8,
            "surroundings": None,
        },
        {"preparations": 2, "changes": 2, "controls": 2, "crowds": 1, "commands": 3, "surroundings": 1},
    ),
    "parents": (measure_parents, {"parents": 20}, {"parents": 2}),
    "input": (measure_input, {"inputs": 120}, {"inputs": 2}),
    "starts": (measure_starts, {"rounds": 20, "starts": 50}, {"rounds": 1, "starts": 4}),
}
"""By name: what measures it, how often, and how often in a hurry."""


def run_campaign(options: argparse.Namespace) -> int:
    """Run the parts in turn; print, and write, each table when its part is done. The exit status."""
    statuses = []
    for part in options.parts:
        work = functools.partial(measure, part, options)
        statuses.append(run_plainly(work, as_json=options.json))
        sys.stdout.flush()
    return max(statuses)


def measure(part: str, options: argparse.Namespace) -> Report:
    """Run one part in a temporary folder."""
    begun_at = time.monotonic()
    work, counts, in_a_hurry = PARTS[part]
    counts = (in_a_hurry if options.quick else counts) | dict(options.counts)
    with tempfile.TemporaryDirectory() as folder:
        report = work(prepare_place(Path(folder)), counts, options.seed)
    if options.figures is not None:
        report.save(options.figures, part)
    print(f"{part}: {time.monotonic() - begun_at:.0f} s", file=sys.stderr)
    return report


def read_count(word: str) -> tuple[str, int]:
    """("kills", 1000) of kills=1000. Raises ValueError if no count has that name."""
    name, _, number = word.partition("=")
    if not any(name in counts for _, counts, _ in PARTS.values()):
        raise ValueError(f"there is no count {name}")
    return name, int(number)


def read_options(words: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--quick", action="store_true", help="a few trials of each kind")
    parser.add_argument(
        "--counts", nargs="+", type=read_count, default=[], metavar="NAME=N", help="kills=1000, rounds=4, ..."
    )
    parser.add_argument("--seed", type=int, default=1, help="of what is drawn at random")
    parser.add_argument("--figures", type=Path, help="folder for each part's table")
    parser.add_argument("--json", action="store_true", help="print every figure, as JSON")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(run_campaign(read_options(sys.argv[1:])))
