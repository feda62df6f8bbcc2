"""Inputs that look for the way through our code: what is promised must hold for each.

    python tests/campaigns/fuzz.py --target encoding --runs 100000 --seed 1

Each target is fuzzed by atheris, Google's fuzzer for Python, which keeps the inputs that reach a new place in
overnight's modules, and changes those. Afterwards it must find a mutant, our own code with a mistake, within
as many inputs, or the target ends with an error. Only fuzzing needs atheris.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fuzz_targets import TARGETS
from report import Report, run_plainly

HEADINGS = ("what", "inputs", "places reached", "kept", "seconds", "the mutant is found at input")
DONE_LINE = re.compile(r"^#(\d+)\s+DONE\s+(?:cov: (\d+) ft: \d+ )?corp: (\d+)/", re.MULTILINE)
WRONG_LINE = re.compile(r"^wrong at input (\d+): (.*)", re.MULTILINE)
INPUT_LINE = re.compile(r"^Base64: (.*)", re.MULTILINE)
SECONDS_OF_INPUT = 30  # after which it hangs
NEEDS_ATHERIS = (
    "fuzzing needs atheris, which is not installed: pip install atheris==3.0.0 (Linux, Python 3.11 to 3.13; "
    "nothing else needs it)"
)


class Fuzzed(NamedTuple):
    """What a target's process said."""

    inputs: int
    places: int
    """Edges of overnight's modules that were reached."""
    kept: int
    """Inputs that reached something new, and what they were made of."""
    wrong: str | None
    """What the last input showed, and that input, if it showed anything."""


def read_output(said: str) -> Fuzzed:
    """From what libFuzzer, and the target, print. Raises ValueError if neither has come to an end."""
    if wrong := WRONG_LINE.search(said):
        given = INPUT_LINE.search(said)
        return Fuzzed(int(wrong[1]), 0, 0, f"{wrong[2]} (input in Base64: {given[1] if given else 'none'})")
    if done := DONE_LINE.search(said):
        return Fuzzed(*(int(number or 0) for number in done.groups()), None)
    raise ValueError(f"the fuzzer did not come to its end: {said[-1500:]}")


def fuzz(name: str, options: argparse.Namespace, mutant: str = "-") -> Fuzzed:
    """Fuzz one target, or its mutant, in a process of its own."""
    program = str(Path(__file__).resolve().with_name("fuzz_targets.py"))
    words = [f"-runs={options.runs}", f"-seed={options.seed}", f"-max_total_time={options.seconds}"]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, program, name, mutant, *words, f"-timeout={SECONDS_OF_INPUT}", "-len_control=0"],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
    return read_output(done.stdout.decode(errors="replace"))


def measure(options: argparse.Namespace) -> Report:
    """Each target and its mutant. Raises ValueError if something is wrong, or a mutant is not found."""
    if importlib.util.find_spec("atheris") is None:
        raise ValueError(NEEDS_ATHERIS)
    rows, measured = [], {}
    for name in options.target:
        begun_at = time.monotonic()
        found = fuzz(name, options)
        if found.wrong:
            raise ValueError(f"{name}: input {found.inputs} shows {found.wrong}")
        seconds = time.monotonic() - begun_at
        control = fuzz(name, options, "mutant")
        if control.wrong is None:
            raise ValueError(f"{name}: its mutant was not found: the fuzzing proves nothing")
        counts = [f"{number:,}" for number in (found.inputs, found.places, found.kept)]
        rows.append([TARGETS[name].promise, *counts, f"{seconds:.0f}", f"{control.inputs:,}"])
        measured[name] = {**found._asdict(), "seconds": seconds, "mutant": control._asdict()}
        print(f"{name}: {found.inputs:,} inputs, {seconds:.0f} s", file=sys.stderr)
    return Report(
        title="Any input, guided by what it reaches",
        headings=HEADINGS,
        rows=rows,
        measured=measured,
        notes=["0 inputs showed anything wrong."],
        settings={"seed": options.seed, "runs": options.runs, "seconds at most": options.seconds},
    )


def read_options(words: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--runs", type=int, default=100_000, help="inputs for each target, at most")
    parser.add_argument("--seconds", type=int, default=300, help="for each target, at most")
    parser.add_argument("--seed", type=int, default=1, help="of what is drawn at random")
    parser.add_argument("--json", action="store_true", help="print every figure, as JSON")
    return parser.parse_args(words)


if __name__ == "__main__":
    chosen = read_options(sys.argv[1:])
    sys.exit(run_plainly(lambda: measure(chosen), as_json=chosen.json))
