"""How long a training step of GPT-2 124M takes on the CPU: overnight beside build-nanogpt.

    python benchmarks/train_step.py --peer ../build-nanogpt --rows 2 --context 1024 --steps 5

Each side is a process of its own, and they step in turn. All begin with the same weights and read the
same rows of the same text, so that their losses, which are shown, must agree.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import platform
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from measure import Report, interleave, model_name, paired_ratio, run_plainly, spread
from overnight.hardware import find_memory_bytes
from overnight.model.config import PRESETS, ModelConfig
from overnight.parallel import ComputeConfig, resolve_compute
from peer import PROGRAM, read_definitions
from sides import SIDES, Circumstances, Side, at_work, choose_sides
from stepper import Task
from text import read_ids

WARM_UPS_AT_LEAST = 2  # in its second step a process's heap still grows
BYTES_PER_PARAMETER = 16  # weight, gradient and AdamW's two moments, all float32
FIGURES = ("median ms", "min", "max", "tokens/s", "times as fast", "peak GB", "last loss")

Answers = Mapping[str, Sequence[Mapping[str, Any]]]


def measure(options: argparse.Namespace) -> Report:
    """Step all sides in turn. Raises ValueError, before any work, for what was asked wrongly."""
    sides, left_out, model = check(options)
    ids = fit_ids(read_ids(options.text, options.data, options.bpe), options, model)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "ids.npy"
        np.save(place, ids)

        def task(side: Side) -> Task:
            return Task(
                peer=str(options.peer) if side.is_peer else None,
                precision=side.precision,
                compile=side.compile,
                model=dataclasses.asdict(model),
                rows=options.rows,
                ids=str(place),
            )

        with at_work(sides, task) as processes:
            steps = {process.name: process.step for process in processes}
            answers = interleave(steps, options.steps, options.warm_ups)
            about = {process.name: process.about for process in processes}
    return Report(
        title=f"One training step of {model_name(model)} on the CPU",
        headings=("side", "precision", *FIGURES),
        rows=table_rows(answers, about, find_reference(sides), options.rows * options.context),
        measured=answers,
        settings=describe_settings(options, [process["threads"] for process in about.values()]),
        notes=[
            f"Times as fast as {find_reference(sides)}: the median of the ratios within each round.",
            f"While it waited for its turn, no side took more than {busiest_wait(answers):.2%} of a core.",
            *left_out,
        ],
    )


def check(options: argparse.Namespace) -> tuple[list[Side], list[str], ModelConfig]:
    """The sides, which were left out and why, and the model. Raises ValueError if they can't be measured."""
    if options.warm_ups < WARM_UPS_AT_LEAST:
        raise ValueError(f"--warm-ups {options.warm_ups} is too few; give at least {WARM_UPS_AT_LEAST}")
    for name in ("rows", "steps"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} {getattr(options, name)} is too few; give at least 1")
    if options.peer is not None:
        read_definitions(options.peer)
    model = dataclasses.replace(PRESETS["gpt2-124m"], context_length=options.context, n_layer=options.layers)
    if problems := model.problems():
        raise ValueError("; ".join(problems))
    compute = resolve_compute(ComputeConfig(compile=options.compile), "cpu")
    found = Circumstances(
        peer=options.peer is not None,
        compiler=bool(compute.compile),
        glibc=platform.libc_ver()[0] == "glibc",
        bf16=compute.precision == "bf16",
    )
    sides, left_out = choose_sides(options.sides, found)
    check_memory(sides, model, options.rows)
    return sides, left_out, model


def check_memory(sides: Sequence[Side], model: ModelConfig, rows: int) -> None:
    """Raise ValueError if so many models, one of them stepping, would not fit in memory: an estimate."""
    assert model.vocab_size is not None
    # Three float32 copies of the logits; about 34 C bytes a token and layer, twice for float32.
    per_token = 12 * model.vocab_size + 68 * model.n_layer * model.n_embd
    stepping = 1 + sum(side.large_pages for side in sides)  # that side gives nothing back
    needed = len(sides) * BYTES_PER_PARAMETER * model.parameter_count()
    needed += stepping * rows * model.context_length * per_token
    there = find_memory_bytes("cpu")
    if needed > there:
        raise ValueError(
            f"{len(sides)} sides at once need about {needed / 1e9:.0f} GB and this machine has "
            f"{there / 1e9:.0f} GB; choose some with --sides, or fewer --rows"
        )


def fit_ids(ids: NDArray[Any], options: argparse.Namespace, model: ModelConfig) -> NDArray[Any]:
    """As many ids as all steps read; a short text begins again. Raises ValueError for ids not GPT-2's."""
    if ids.size == 0:
        raise ValueError("the text is empty; name another with --text or --data")
    needed = (options.warm_ups + options.steps) * options.rows * model.context_length + 1
    ids = np.resize(ids, needed)
    if ids.max() >= (model.vocab_size or 0):
        raise ValueError(f"{options.data} holds the id {ids.max()}, GPT-2 knows {model.vocab_size} ids")
    return ids


def find_reference(sides: Sequence[Side]) -> str:
    """The side that the others are compared with: the first peer, or the first of all."""
    return next((side for side in sides if side.is_peer), sides[0]).name


def table_rows(
    answers: Answers, about: Mapping[str, Mapping[str, Any]], reference: str, tokens: int
) -> list[list[str]]:
    """A row for each side; a step has so many `tokens`."""
    times = {name: [each["milliseconds"] for each in steps] for name, steps in answers.items()}
    return [
        [
            name,
            str(about[name]["precision"]),
            *spread(times[name]),
            f"{tokens / statistics.median(times[name]) * 1e3:,.0f}",
            f"{paired_ratio(times[name], times[reference]):.2f}",
            f"{steps[-1]['peak_bytes'] / 1e9:.2f}",
            f"{steps[-1]['loss']:.4f}",
        ]
        for name, steps in answers.items()
    ]


def busiest_wait(answers: Answers) -> float:
    """The largest share of a core that a side took while it waited for its turn."""
    every = [each for steps in answers.values() for each in steps]
    shares = [each["waited_cpu_seconds"] / max(each["waited_seconds"], 1e-9) for each in every]
    return float(max(shares))


def describe_settings(options: argparse.Namespace, threads: Sequence[int]) -> dict[str, object]:
    """What was asked for, and which version of the peer it was."""
    names = ("rows", "context", "layers", "steps", "warm_ups")
    settings: dict[str, object] = {name.replace("_", "-"): getattr(options, name) for name in names}
    settings["threads"] = "/".join(sorted({str(count) for count in threads}))
    if options.peer is not None:
        program = (options.peer / PROGRAM).read_bytes()
        settings[f"sha256 of the peer's {PROGRAM}"] = hashlib.sha256(program).hexdigest()[:12]
    return settings


def read_options(words: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--peer", type=Path, help="a checkout of build-nanogpt; without it, no peer is measured"
    )
    parser.add_argument("--rows", type=int, default=2, help="rows of a step")
    parser.add_argument("--context", type=int, default=1024, help="tokens of a row")
    parser.add_argument("--layers", type=int, default=12, help="fewer make a quick try")
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each side")
    parser.add_argument("--warm-ups", type=int, default=3, help="steps of each side before these")
    parser.add_argument("--sides", nargs="+", choices=SIDES, help="which, and in which order")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="if left out, where there is a C++ compiler"
    )
    parser.add_argument("--text", type=Path, help="a text file; Python's documentation if left out")
    parser.add_argument(
        "--bpe", type=Path, help="folder of encoder.json and vocab.bpe; the cache if left out"
    )
    parser.add_argument("--data", type=Path, help="instead of a text: a folder that overnight prepare wrote")
    parser.add_argument("--json", action="store_true", help="print every figure, as JSON")
    return parser.parse_args(words)


if __name__ == "__main__":
    chosen = read_options(sys.argv[1:])
    sys.exit(run_plainly(lambda: measure(chosen), as_json=chosen.json))
