"""How long one waits for a command to answer: every `--help`, and `overnight runs` over twenty runs.

    python benchmarks/startup.py --repeats 5

Beside them stands `python -c pass`, which is the least that any Python program takes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import measure
from overnight.cli import COMMANDS
from overnight.run_directory import RunDirectory

HEADINGS = ("command", "median ms", "min", "max", "more than python -c pass")
LEAST = "python -c pass"
RUNS, STEPS = 20, 1000


def write_runs(folder: Path, runs: int = RUNS, steps: int = STEPS) -> None:
    """`runs` run directories with `steps` metrics lines each, as `overnight train` writes them."""
    for number in range(runs):
        directory = RunDirectory(folder / f"run-{number:02d}")
        directory.begin(f"[schedule]\ntotal_steps = {steps}\n", {"device": "cpu"})
        same = {"learning_rate": 1e-3, "grad_norm": 1.0, "milliseconds": 100.0, "tokens_per_second": 20480.0}
        lines = [
            {"step": step, "tokens": step * 2048, "loss": 9.0 - step / steps, **same}
            for step in range(1, steps + 1)
        ]
        directory.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
        (directory.checkpoints / f"step-{steps:08d}").mkdir(parents=True)
        evaluation = {"step": steps, "tokens": steps * 2048, "loss": 8.0, "perplexity": 2981.0}
        counts = {"bits_per_byte": 2.5, "evaluated_tokens": 10_000, "evaluated_bytes": 46_000}
        directory.append_event("evaluations", {**evaluation, **counts})


def commands() -> dict[str, list[str]]:
    """What is measured, by what one types."""
    ours = measure.overnight_command()
    found = {LEAST: [sys.executable, "-c", "pass"], "overnight --help": [*ours, "--help"]}
    found |= {f"overnight {verb} --help": [*ours, verb, "--help"] for verb in COMMANDS}
    return {**found, f"overnight runs ({RUNS} runs)": [*ours, "runs"]}


def report(options: argparse.Namespace) -> measure.Report:
    """Call every command in turn."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_runs(folder / "runs")
        sides = {name: partial(measure.run_process, words, folder) for name, words in commands().items()}
        # The first call fills the disk's cache.
        times = measure.interleave_times(sides, options.repeats, warm_ups=1)
    least = times[LEAST]
    rows = []
    for typed, each in times.items():
        more = statistics.median(ours - theirs for ours, theirs in zip(each, least, strict=True))
        rows.append([typed, *measure.spread(each), f"{more:,.0f} ms"])
    return measure.Report(
        title="Until a command answers",
        headings=HEADINGS,
        rows=rows,
        measured=times,
        settings={"repeats": options.repeats},
    )


def read_options(words: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = measure.command_line(__doc__, repeats=5, of="measured calls of each command")
    return parser.parse_args(words)


if __name__ == "__main__":
    measure.run_program(read_options, report)
