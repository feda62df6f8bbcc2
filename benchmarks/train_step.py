"""How long a training step of GPT-2 124M takes: overnight beside every peer that is named.

    python benchmarks/train_step.py --peer ../build-nanogpt --nanogpt ../nanoGPT --rows 2 --steps 5

Each side is a process of its own, and they step in turn. All begin with the same weights and read the
same rows of the same text, so that their losses, which are shown, must agree.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import platform
import statistics
import tempfile
from argparse import BooleanOptionalAction, Namespace
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import measure
from checkouts import (
    BUILD_NANOGPT,
    LLM_C_FILES,
    NANOGPT,
    check_llm_c,
    find_cuda_program,
    fingerprint,
    read_definitions,
)
from llmc import find_compiler
from overnight.bench.decide import about_peak, find_peak_flops_or_measure
from overnight.distributed.world import open_world
from overnight.hardware import find_memory_bytes
from overnight.model.model_config import ModelConfig
from overnight.training import ComputeConfig
from overnight.training.compute import resolve_compute
from sides import LLM_C, SIDES, Circumstances, Process, Side, Task, at_work, choose_sides
from text import read_ids

WARM_UPS_AT_LEAST = 2  # in its second step a process's heap still grows
ROWS_AND_MICRO_BATCHES = {"cpu": (2, 1), "cuda": (64, 8)}  # on a GPU build-nanogpt's: 524,288 tokens a step
BYTES_PER_PARAMETER = 16  # weight, gradient and AdamW's two moments, all float32
SAME_LOSS = 0.02  # bfloat16 and a padded vocabulary change a first loss by less, in nats; a mistake by more
FIGURES = (
    *("median ms", "min", "max", "tokens/s", "MFU", "executed", "overnight is", "peak GB", "first loss"),
    "last",
)


class Measured(NamedTuple):
    """What the rounds brought, by the side's name."""

    turns: Mapping[str, Sequence[Mapping[str, Any]]]
    """Those that warm up come first."""
    about: Mapping[str, Mapping[str, Any]]
    """What each process says of itself: its precision and its threads."""
    peak_flops: Mapping[str, float]
    """By precision: what the device could do."""


def report(options: Namespace) -> measure.Report:
    """Step all sides in turn. Raises ValueError, before any work, for invalid options."""
    sides, left_out, model = check(options)
    ids = fit_ids(read_ids(options.text, options.data, options.bpe), options, model)
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "ids.npy", ids)

        def task(side: Side) -> Task:
            checkout = checkouts_of(options).get(side.peer)
            return Task(
                peer=side.peer,
                checkout=None if checkout is None else str(checkout.resolve()),
                precision=side.precision,
                compile=side.compile,
                device=options.device,
                model=dataclasses.asdict(model),
                rows=options.rows,
                micro_batches=options.micro_batches,
                folder=folder,
            )

        with at_work(sides, task) as processes:
            measured = take_turns(processes, options)
    ours = find_ours(sides)
    return measure.Report(
        title=f"One training step of {measure.model_name(model)} on {measure.on_device(options.device)}",
        headings=("side", "precision", *FIGURES),
        rows=table_rows(measured, ours, model, options),
        measured=measured._asdict(),
        settings=describe_settings(options, measured),
        notes=[*describe_figures(measured, ours, model, options), *left_out],
        machine=measure.describe_machine(options.device),
    )


def take_turns(processes: Sequence[Process], options: Namespace) -> Measured:
    """All rounds; in each, the device's peak is measured as well where its maker publishes none."""
    about = {process.name: process.about for process in processes}
    turns: dict[str, Callable[[], Any]] = {process.name: process.step for process in processes}
    peaks = {
        each["precision"]: partial(find_peak_flops_or_measure, options.device, each["precision"])
        for each in about.values()
    }
    results: dict[str, list[Any]] = measure.interleave(turns | peaks, options.warm_ups + options.steps)
    peak_flops = {precision: statistics.median(results.pop(precision)) for precision in peaks}
    return Measured(results, about, peak_flops)


# ---------------------------------------------------------------- what was asked


def check(options: Namespace) -> tuple[list[Side], list[str], ModelConfig]:
    """The sides, which were left out and why, and the model. Raises ValueError if they can't be measured."""
    open_world(options.device)
    rows, micro_batches = ROWS_AND_MICRO_BATCHES[options.device]
    options.rows = rows if options.rows is None else options.rows
    options.micro_batches = micro_batches if options.micro_batches is None else options.micro_batches
    measure.check_counts(options, "warm_ups", least=WARM_UPS_AT_LEAST)
    measure.check_counts(options, "rows", "micro_batches", "steps")
    model = measure.gpt2_124m(context_length=options.context, n_layer=options.layers)
    compute = resolve_compute(ComputeConfig(compile=options.compile), options.device)
    found = Circumstances(
        device=options.device,
        missing=find_missing(options),
        compiler=bool(compute.compile),
        glibc=platform.libc_ver()[0] == "glibc",
        bf16=compute.precision == "bf16",
    )
    sides, left_out = choose_sides(options.sides, found)
    check_memory(sides, model, options)
    return sides, left_out, model


def checkouts_of(options: Namespace) -> dict[str | None, Path]:
    """Where the peers lie that were named, by the peer."""
    named = {"build-nanogpt": options.peer, "nanogpt": options.nanogpt, LLM_C: options.llmc}
    return {peer: path for peer, path in named.items() if path is not None}


def find_missing(options: Namespace) -> dict[str, str]:
    """By a peer that can't be measured, why. Raises ValueError for a path that is no checkout of it."""
    named, missing = checkouts_of(options), {}
    for peer, option in (("build-nanogpt", "--peer"), ("nanogpt", "--nanogpt"), (LLM_C, "--llmc")):
        if peer not in named:
            missing[peer] = f"{option} names no checkout"
    for peer, program in (("build-nanogpt", BUILD_NANOGPT), ("nanogpt", NANOGPT)):
        if peer in named:
            read_definitions(program, named[peer])
    if LLM_C in named:
        check_llm_c(named[LLM_C], options.device)
        if options.device == "cpu" and options.micro_batches > 1:
            missing[LLM_C] = "its program for CPUs has no micro-batches"
        elif options.device == "cpu" and find_compiler() is None:
            missing[LLM_C] = "there is no C compiler"
    if importlib.util.find_spec("transformers") is None:
        missing["transformers"] = "it is not installed (pip install transformers)"
    return missing


def check_memory(sides: Sequence[Side], model: ModelConfig, options: Namespace) -> None:
    """Raise ValueError if the models of all sides, one of them stepping, do not fit in memory (estimate)."""
    assert model.vocab_size is not None
    width = 2 if all(side.precision == "bf16" or side.peer in {None, LLM_C} for side in sides) else 4
    # Three float32 copies of the logits; about 17 C numbers a token and layer.
    per_token = 12 * model.vocab_size + 17 * width * model.n_layer * model.n_embd
    # llm.c keeps attention's weights before and after softmax, and the gradients of everything.
    per_token_llm_c = 2 * per_token + 16 * model.n_layer * model.n_head * model.context_length
    tokens = options.rows * model.context_length
    stepping = 1 + sum(side.large_pages for side in sides)  # that side gives nothing back
    needed = len(sides) * BYTES_PER_PARAMETER * model.parameter_count() + stepping * tokens * per_token
    needed += sum(side.peer == LLM_C for side in sides) * tokens * per_token_llm_c
    there = find_memory_bytes(options.device)
    if needed > there:
        raise ValueError(
            f"{len(sides)} sides at once need about {needed / 1e9:.0f} GB and this {options.device} has "
            f"{there / 1e9:.0f} GB; choose some with --sides, or fewer --rows"
        )


def fit_ids(ids: NDArray[Any], options: Namespace, model: ModelConfig) -> NDArray[Any]:
    """As many ids as all steps read; a short text begins again. Raises ValueError for ids not GPT-2's."""
    if ids.size == 0:
        raise ValueError("the text is empty; name another with --text or --data")
    # A turn on a GPU has two steps, the first not timed; and rows are read one step ahead.
    steps = (options.warm_ups + options.steps) * (1 if options.device == "cpu" else 2) + 1
    ids = np.resize(ids, steps * tokens_per_step(options) + 1)
    if ids.max() >= (model.vocab_size or 0):
        raise ValueError(f"{options.data} holds the id {ids.max()}, GPT-2 knows {model.vocab_size} ids")
    return ids


def tokens_per_step(options: Namespace) -> int:
    """Of one step, all its micro-batches together."""
    return int(options.rows * options.micro_batches * options.context)


# ---------------------------------------------------------------- what came out


def find_ours(sides: Sequence[Side]) -> str:
    """The side that the others are compared with: the last of ours, which is to be the fastest."""
    return next((side for side in reversed(sides) if side.peer is None), sides[0]).name


def table_rows(measured: Measured, ours: str, model: ModelConfig, options: Namespace) -> list[list[str]]:
    """A row for each side."""
    timed = {name: turns[options.warm_ups :] for name, turns in measured.turns.items()}
    times = {name: [turn["milliseconds"] for turn in turns] for name, turns in timed.items()}
    rows = []
    for name, turns in timed.items():
        precision = measured.about[name]["precision"]
        speed = tokens_per_step(options) / statistics.median(times[name]) * 1e3
        flops_at_hand = measured.peak_flops[precision] / speed  # what the device could do in a token's time
        peaks = [turn["peak_bytes"] for turn in turns if turn["peak_bytes"] is not None]
        rows.append(
            [
                name,
                precision,
                *measure.spread(times[name]),
                f"{speed:,.0f}",
                f"{model.flops_per_token() / flops_at_hand:.1%}",
                f"{model.executed_flops_per_token('none') / flops_at_hand:.1%}",
                measure.times_as_fast(times[ours], times[name]),
                f"{max(peaks) / 1e9:.2f}" if peaks else "",
                f"{first_loss(measured, name):.4f}",
                f"{turns[-1]['losses'][-1]:.4f}",
            ]
        )
    return rows


def first_loss(measured: Measured, name: str) -> float:
    """Of a side's very first step: all sides have the same weights there, and the same rows."""
    return float(measured.turns[name][0]["losses"][0])


def describe_figures(measured: Measured, ours: str, model: ModelConfig, options: Namespace) -> list[str]:
    """What must be known to read the table; and whether the sides did the same work, and rested."""
    losses = [first_loss(measured, name) for name in measured.turns]
    apart = max(losses) - min(losses)
    peaks = [
        f"{flops / 1e12:.3g} TFLOP/s in {precision} ({about_peak(options.device, precision)})"
        for precision, flops in measured.peak_flops.items()
    ]
    return [
        f"overnight is: how many times as fast {ours} is; the median of the ratios within each round.",
        f"MFU: {model.flops_per_token() / 1e6:.0f} MFLOP a token (6 N + 12 L C T), as a share of "
        f"{', '.join(peaks)}; executed: the {model.executed_flops_per_token('none') / 1e6:.0f} MFLOP that a "
        "step has with a padded vocabulary and half the square of attention.",
        f"The first losses lie within {apart:.4f} nats"
        + ("." if apart <= SAME_LOSS else ": THE SIDES DO NOT DO THE SAME WORK."),
        f"While it waited for its turn, no side took more than {busiest_wait(measured):.2%} of a core.",
    ]


def busiest_wait(measured: Measured) -> float:
    """The largest share of a core that a side took while it waited for its turn."""
    every = [turn for turns in measured.turns.values() for turn in turns]
    return float(max(turn["waited_cpu_seconds"] / max(turn["waited_seconds"], 1e-9) for turn in every))


def describe_settings(options: Namespace, measured: Measured) -> dict[str, object]:
    """What was asked for, and which versions of the peers it was."""
    names = ("rows", "micro_batches", "context", "layers", "steps", "warm_ups")
    settings: dict[str, object] = {name.replace("_", "-"): getattr(options, name) for name in names}
    settings["tokens-per-step"] = tokens_per_step(options)
    settings["threads"] = "/".join(sorted({str(each["threads"]) for each in measured.about.values()}))
    if options.peer is not None:
        settings["build-nanogpt"] = fingerprint(options.peer / BUILD_NANOGPT.file)
    if options.nanogpt is not None:
        settings["nanoGPT"] = fingerprint(options.nanogpt / NANOGPT.file)
    if options.llmc is not None:
        is_cpu = options.device == "cpu"
        program = options.llmc / LLM_C_FILES[0] if is_cpu else find_cuda_program(options.llmc)
        settings[LLM_C] = fingerprint(program)
    return settings


def read_options(words: Sequence[str]) -> Namespace:
    """The command line."""
    parser = measure.command_line(__doc__, "peer nanogpt device layers text data bpe")
    parser.add_argument("--llmc", type=Path, help="a checkout of llm.c; on a GPU, or its built train_gpt2cu")
    parser.add_argument("--rows", type=int, help="rows of a micro-batch; 2, or 64 on a GPU, if left out")
    parser.add_argument("--micro-batches", type=int, help="of a step; 1, or 8 on a GPU, if left out")
    parser.add_argument("--context", type=int, default=1024, help="tokens of a row")
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each side")
    parser.add_argument("--warm-ups", type=int, default=3, help="steps of each side before these")
    parser.add_argument("--sides", nargs="+", choices=SIDES, help="which, and in which order")
    parser.add_argument("--compile", action=BooleanOptionalAction, help="where a compiler is, if left out")
    return parser.parse_args(words)


if __name__ == "__main__":
    measure.run_program(read_options, report)
