"""How far a plan can be trusted: `overnight plan` beside a run of the same recipe, in turn.

    python benchmarks/plan.py shakespeare-char-cpu
    python benchmarks/plan.py gpt2-124m --data data/corpus --tokens_per_step 8192 --steps 6

All other options are the recipe's, and are given to both. A run is cut to a few steps, without evaluations
and samples, unless --whole asks for all of it. It happens in runs/ of the current folder and is deleted.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import measure
from overnight.run_directory import RunDirectory

HEADINGS = ("figure", "foretold", "measured", "foretold / measured")
WARM_UPS = 2  # in its second step a process's heap still grows
FIGURES = {
    "tokens_per_second": ("tokens per second", 1.0, "{:,.0f}"),
    "step_seconds": ("a step, ms", 1e3, "{:,.1f}"),
    "peak_bytes": ("peak memory, GB", 1e-9, "{:.2f}"),
    "estimated_bytes": ("peak memory, by arithmetic", 1e-9, "{:.2f}"),
    "checkpoint_bytes": ("a checkpoint, MB", 1e-6, "{:,.2f}"),
    "seconds": ("the whole run, s", 1.0, "{:,.1f}"),
}

Figures = dict[str, float]


def call(words: Sequence[str]) -> measure.Finished:
    """`overnight` with these words. Raises ValueError, with what it said last, if it fails."""
    return measure.run_process([*measure.overnight_command(), *words])


def foretell(words: Sequence[str], seconds: float, *, whole: bool) -> Figures:
    """What `overnight plan` says."""
    plan = json.loads(call(["plan", *words, "--json", f"--seconds={seconds}"]).output)
    if not plan["fits"]:
        raise ValueError(f"{words[0]} does not fit into this machine's memory")
    peak = plan["evaluation_peak_memory_bytes" if whole else "peak_memory_bytes"]
    figures = {name: plan[name] for name in ("tokens_per_second", "step_seconds", "seconds")}
    return {
        **figures,
        "peak_bytes": peak or 0,
        "estimated_bytes": plan["needed_bytes"],
        "checkpoint_bytes": plan["checkpoint_bytes"],
    }


def train(words: Sequence[str]) -> Figures:
    """What a run does; it is deleted. Raises ValueError if it fails."""
    directory = RunDirectory(Path("runs", f"plan-{os.getpid()}"))
    try:
        finished = call(["train", *words, "--run-name", directory.path.name])
        steps = directory.read_metrics()[WARM_UPS:]
        newest = max(directory.checkpoints.iterdir())
        return {
            "tokens_per_second": statistics.median(step["tokens_per_second"] for step in steps),
            "step_seconds": statistics.median(step["milliseconds"] for step in steps) / 1e3,
            "peak_bytes": finished.peak_bytes,
            "estimated_bytes": finished.peak_bytes,
            "checkpoint_bytes": sum(file.stat().st_size for file in newest.iterdir()),
            "seconds": finished.seconds,
        }
    finally:
        shutil.rmtree(directory.path, ignore_errors=True)


def compare(options: argparse.Namespace) -> measure.Report:
    """Predict and train, in turn. Raises ValueError for invalid options."""
    if options.steps <= WARM_UPS:
        raise ValueError(f"--steps {options.steps} is too few: {WARM_UPS} warm up; give more")
    words = [options.recipe, *options.overrides]
    if not options.whole:
        off = ("evaluate", "sample", "checkpoint")
        words += [f"--total-steps={options.steps}", "--warmup-steps=0"]
        words += [f"--{each}-every-steps=None" for each in off]
    sides = {
        "foretold": lambda: foretell(words, options.seconds, whole=options.whole),
        "measured": lambda: train(words),
    }
    found = measure.interleave(sides, options.repeats)
    return measure.Report(
        title=f"overnight plan {options.recipe}, and what a run then did",
        headings=HEADINGS,
        rows=table_rows(found),
        measured=found,
        settings={"steps": "all" if options.whole else options.steps, "repeats": options.repeats},
        notes=[
            "Medians of the rounds; the ratio is the median of the ratios within each round.",
            "The whole run is timed from the command's start to its end; a plan does not count the start.",
        ],
    )


def table_rows(found: Mapping[str, Sequence[Figures]]) -> list[list[str]]:
    """A row for each figure."""
    rows = []
    for name, (title, factor, form) in FIGURES.items():
        foretold, measured = ([figures[name] for figures in found[side]] for side in ("foretold", "measured"))
        ratio = statistics.median(before / after for before, after in zip(foretold, measured, strict=True))
        cells = [form.format(factor * statistics.median(values)) for values in (foretold, measured)]
        rows.append([title, *cells, f"{ratio:.2f}"])
    return rows


def read_options(words: Sequence[str]) -> argparse.Namespace:
    """The command line; what is not known here is the recipe's."""
    parser = measure.command_line(__doc__, repeats=1, of="plans and runs")
    parser.add_argument("recipe", help="a recipe, as overnight train takes it")
    parser.add_argument("--steps", type=int, default=30, help="steps of a run")
    parser.add_argument("--seconds", type=float, default=40.0, help="how long a plan measures")
    parser.add_argument("--whole", action="store_true", help="train the recipe to its end, as it is")
    options, overrides = parser.parse_known_args(words)
    options.overrides = overrides
    return options


if __name__ == "__main__":
    measure.run_program(read_options, compare)
