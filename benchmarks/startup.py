"""How long one waits for a command to answer: every `--help`, and `overnight runs` over twenty runs.

    python benchmarks/startup.py --repeats 5

Beside them stands `python -c pass`, which is the least that any Python program takes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from measure import Report, interleave, run_plainly, spread, timed
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
        lines = [
            {
                "step": step,
                "tokens": step * 2048,
                "loss": 9.0 - step / steps,
                "learning_rate": 1e-3,
                "grad_norm": 1.0,
                "milliseconds": 100.0,
                "tokens_per_second": 20480.0,
            }
            for step in range(1, steps + 1)
        ]
        directory.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
        (directory.checkpoints / f"step-{steps:08d}").mkdir(parents=True)
        evaluation = {"step": steps, "tokens": steps * 2048, "loss": 8.0, "perplexity": 2981.0}
        counts = {"bits_per_byte": 2.5, "evaluated_tokens": 10_000, "evaluated_bytes": 46_000}
        directory.append_event("evaluations", {**evaluation, **counts})


def commands() -> dict[str, list[str]]:
    """What is measured, by what one types."""
    overnight = Path(sys.executable).with_name("overnight")
    ours = [str(overnight)] if overnight.is_file() else [sys.executable, "-m", "overnight"]
    found = {LEAST: [sys.executable, "-c", "pass"], "overnight --help": [*ours, "--help"]}
    found |= {f"overnight {verb} --help": [*ours, verb, "--help"] for verb in COMMANDS}
    return {**found, f"overnight runs ({RUNS} runs)": [*ours, "runs"]}


def call(command: Sequence[str], folder: Path) -> Callable[[], object]:
    """`command` in `folder`, its words thrown away. Calling it raises RuntimeError if the command fails."""

    def run() -> None:
        finished = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if finished.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} failed: {finished.stderr}")

    return run


def measure(options: argparse.Namespace) -> Report:
    """Call every command in turn."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_runs(folder / "runs")
        sides = {typed: timed(call(command, folder)) for typed, command in commands().items()}
        times = interleave(sides, options.repeats, warm_ups=1)  # the first call fills the disk's cache
    least = times[LEAST]
    rows = []
    for typed, each in times.items():
        more = statistics.median(ours - theirs for ours, theirs in zip(each, least, strict=True))
        rows.append([typed, *spread(each), f"{more:,.0f} ms"])
    return Report(
        title="Until a command answers",
        headings=HEADINGS,
        rows=rows,
        measured=times,
        settings={"repeats": options.repeats},
    )


def read_options(words: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5, help="measured calls of each command")
    parser.add_argument("--json", action="store_true", help="print every figure, as JSON")
    return parser.parse_args(words)


if __name__ == "__main__":
    chosen = read_options(sys.argv[1:])
    sys.exit(run_plainly(lambda: measure(chosen), as_json=chosen.json))
