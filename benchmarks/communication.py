"""How far the model of communication can be trusted: processes on this machine that talk by gloo.

    python benchmarks/communication.py
    python benchmarks/communication.py --processes 2 --largest 50 --repeats 5

Bandwidth and latency of each collective are fitted to some sizes, and foretell the others; then what a whole
step of training says, replicated, with ZeRO-1 and with FSDP2, said and not computed. The model is
overnight.planning.network's, the sums and broadcasts those of overnight.distributed.world.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import measure
from overnight.distributed.launcher import environment_of_process
from overnight.distributed.world import BUCKET_BYTES, World
from overnight.model.model_config import ModelConfig, parameter_shapes
from overnight.planning.network import (
    Collective,
    Kind,
    Link,
    ParallelLayout,
    collective_seconds,
    list_collectives,
    sent_bytes,
)
from overnight.training import Sharding
from overnight.training.sharding import assign_parameters

HEADINGS = ("what is said", "processes", "MB", "measured, ms", "foretold, ms", "error", "")
KINDS: tuple[Kind, ...] = ("all-reduce", "all-gather", "reduce-scatter", "broadcast")
SHARES = (0.0005, 0.002, 0.03, 0.12, 0.5, 1.0)  # of the largest size; every other one is fitted
STEPS: dict[str, Sharding] = {"replicated": "none", "ZeRO-1": "zero1", "FSDP2": "fsdp"}
MICRO_BATCHES = 2  # of each process in a step
Rows = list[list[str]]
MB = 10**6
FLOAT32 = 4


class Times(NamedTuple):
    """Seconds of one number of processes: of the slowest of them, in the best round."""

    of_size: dict[str, dict[int, float]]
    """By collective and bytes."""
    of_step: dict[str, float]
    """By what is divided."""
    copy_bytes_per_second: float
    """Read and written, while all processes copy."""


class Task(NamedTuple):
    """What the processes are to do."""

    sizes: tuple[int, ...]
    model: ModelConfig
    repeats: int
    folder: str
    """Where they meet, and where the first of them leaves what it measured."""


# ---------------------------------------------------------------- in each process


def work(rank: int, processes: int, task: Task) -> None:
    """Join the others, measure everything in turn, leave the shortest times."""
    torch.set_num_threads(1)
    here = World(rank=rank, size=processes, device="cpu", local_rank=rank, local_size=processes)
    meet = f"file://{task.folder}/meet-{processes}"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=processes)
    try:
        sides = {
            **{
                f"{kind} {size}": partial(time_size, kind, size, here)
                for kind in KINDS
                for size in task.sizes
            },
            **{name: partial(time_step, sharding, here, task.model) for name, sharding in STEPS.items()},
            "copies": time_copies,
        }
        times = measure.interleave(sides, task.repeats, warm_ups=1)
        best = {name: min(each) for name, each in times.items()}
        if here.is_main:
            Path(task.folder, f"{processes}.json").write_text(json.dumps(best), encoding="utf-8")
    finally:
        dist.destroy_process_group()


def slowest(action: Callable[[], object]) -> float:
    """Seconds that an action takes the slowest of all processes, which begin together."""
    dist.barrier()
    started_at = time.perf_counter()
    action()
    seconds = torch.tensor(time.perf_counter() - started_at)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return seconds.item()


def time_size(kind: Kind, size: int, here: World) -> float:
    """Seconds of one collective over this number of bytes."""
    whole = torch.zeros(size // FLOAT32)
    part = torch.zeros(size // FLOAT32 // here.size)
    return slowest(lambda: say(kind, whole, part))


def say(kind: Kind, whole: torch.Tensor, part: torch.Tensor) -> None:
    """One collective; torch has given two of them new names in 2.13."""
    gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    if kind == "all-reduce":
        dist.all_reduce(whole)
    elif kind == "all-gather":
        gather(whole, part)
    elif kind == "reduce-scatter":
        scatter(part, whole)
    else:
        dist.broadcast(whole, 0)


def time_step(sharding: Sharding, here: World, model: ModelConfig) -> float:
    """Seconds of all that a step says."""
    tensors = {name: torch.zeros(shape) for name, shape in parameter_shapes(model).items()}
    if sharding == "fsdp":
        groups = [("h.0.",)] * model.n_layer + [("w", "ln_f")]
        sizes = [
            sum(tensor.numel() for name, tensor in tensors.items() if name.startswith(group))
            for group in groups
        ]
        buffers = [(torch.zeros(size), torch.zeros(size // here.size)) for size in sizes]
        return slowest(lambda: say_shards(buffers))
    owners = assign_parameters({name: tensor.numel() for name, tensor in tensors.items()}, here.size)

    def reduce_and_spread() -> None:
        here.all_reduce(list(tensors.values()))
        for rank in range(here.size) if sharding == "zero1" else ():
            here.broadcast([tensor for name, tensor in tensors.items() if owners[name] == rank], rank)

    return slowest(reduce_and_spread)


def say_shards(buffers: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """What FSDP2 says in a step; the last of these is in no block, and is gathered once a micro-batch."""
    *blocks, others = buffers
    for _ in range(MICRO_BATCHES):
        for whole, part in [others, *blocks, *blocks]:
            say("all-gather", whole, part)
        for whole, part in buffers:
            say("reduce-scatter", whole, part)


def time_copies() -> float:
    """Seconds to copy a bucket together and apart, while all processes do."""
    tensor = torch.zeros(BUCKET_BYTES // FLOAT32)
    return slowest(lambda: tensor.copy_(torch.cat([tensor])))


# ---------------------------------------------------------------- before and after


def time_all(options: argparse.Namespace) -> dict[int, Times]:
    """The times of each number of processes, which are started for it."""
    model = model_of(options)
    os.environ |= environment_of_process(large_pages=True)  # they keep their memory as in `overnight train`
    found = {}
    for processes in options.processes:
        unit = FLOAT32 * processes
        sizes = tuple(max(unit, int(share * options.largest * MB) // unit * unit) for share in SHARES)
        with tempfile.TemporaryDirectory() as folder:
            task = Task(sizes, model, options.repeats, folder)
            mp.spawn(work, (processes, task), nprocs=processes)
            best = json.loads(Path(folder, f"{processes}.json").read_text(encoding="utf-8"))
        found[processes] = Times(
            of_size={kind: {size: best[f"{kind} {size}"] for size in sizes} for kind in KINDS},
            of_step={name: best[name] for name in STEPS},
            copy_bytes_per_second=4 * BUCKET_BYTES / best["copies"],
        )
    return found


def fit_link(kind: Kind, times: Mapping[int, float], processes: int) -> Link:
    """Bandwidth and latency with which the relative errors of these sizes are least, squared and added up."""
    alone = ParallelLayout(processes_per_machine=processes, within=_link(math.inf, 0.0))
    sent = [sent_bytes(Collective(kind, "all", 1, size), alone) for size in times]
    wanted = np.array(list(times.values()))
    terms = np.stack([np.ones(len(sent)), np.array(sent)], axis=1) / wanted[:, None]
    (start, per_byte), *_ = np.linalg.lstsq(terms, np.ones(len(sent)), rcond=None)
    return _link(1 / max(per_byte, 1e-15), max(float(start), 0.0))


def _link(bytes_per_second: float, start_seconds: float) -> Link:
    return Link(
        name="gloo",
        bytes_per_second=bytes_per_second,
        message_seconds=0.0,  # a call's start has the way round in it: two unknowns, not three
        start_seconds=start_seconds,
        source="measured here",
    )


def foretell(
    collectives: Sequence[Collective], links: Mapping[str, Link], processes: int, copies: float | None = None
) -> float:
    """Seconds by the model; each kind has its own link, since gloo has no one bandwidth for all."""

    def layout(kind: Kind) -> ParallelLayout:
        return ParallelLayout(
            processes_per_machine=processes, within=links[kind], memory_bytes_per_second=copies
        )

    return sum(collective_seconds(each, layout(each.kind)) for each in collectives)


def compare(options: argparse.Namespace) -> measure.Report:
    """Measure, fit, predict. Raises ValueError for invalid options."""
    if min(options.processes) < 2 or options.repeats < 1 or options.largest <= 0:
        raise ValueError("give --processes of at least 2, --repeats of at least 1 and a --largest above 0")
    measured = time_all(options)
    rows: list[list[str]] = []
    links_of = {}
    for processes, times in measured.items():
        links = {kind: fit_link(kind, fitted_sizes(times.of_size[kind]), processes) for kind in KINDS}
        links_of[processes] = links
        rows += [row for kind in KINDS for row in size_rows(kind, processes, times.of_size[kind], links)]
    checked = [row for row in rows if not row[-1]]
    step_rows = [
        row
        for processes, times in measured.items()
        for row in rows_of_steps(model_of(options), processes, times, links_of[processes])
    ]
    rates = " and ".join(f"{times.copy_bytes_per_second / 1e9:.2f}" for times in measured.values())
    return measure.Report(
        title="What communication.py foretells, and what processes that talk by gloo then took",
        headings=HEADINGS,
        rows=rows + step_rows,
        measured={
            "times": {processes: times._asdict() for processes, times in measured.items()},
            "links": {
                processes: {kind: dataclasses.asdict(link) for kind, link in links.items()}
                for processes, links in links_of.items()
            },
        },
        settings={"repeats": options.repeats, "parameters": model_of(options).parameter_count()},
        notes=[
            f"Of the sizes that were not fitted {summary(checked)}; of whole steps {summary(step_rows)}.",
            *(describe_links(processes, links) for processes, links in links_of.items()),
            "Each round has everything in turn; a time is the slowest process's, in the best round. A step "
            "has two micro-batches in each process; what is replicated is copied into buckets and out of "
            f"them, at {rates} GB/s. All processes share this machine's cores.",
        ],
    )


def model_of(options: argparse.Namespace) -> ModelConfig:
    """Whose steps are said."""
    return ModelConfig(
        n_layer=options.layers, n_head=1, n_embd=options.channels, context_length=1024, vocab_size=50257
    )


def fitted_sizes(times: Mapping[int, float]) -> dict[int, float]:
    """The times by which a link is fitted: those of every other size, from the smallest on."""
    return {size: times[size] for size in sorted(times)[::2]}


def size_rows(kind: Kind, processes: int, times: Mapping[int, float], links: Mapping[str, Link]) -> Rows:
    """A row for each size of one collective."""
    fitted = fitted_sizes(times)
    return [
        _row(
            kind,
            processes,
            size,
            (times[size], foretell([Collective(kind, "all", 1, size)], links, processes)),
            "fitted" if size in fitted else "",
        )
        for size in sorted(times)
    ]


def rows_of_steps(model: ModelConfig, processes: int, times: Times, links: Mapping[str, Link]) -> Rows:
    """A row for each way to divide what a step holds."""
    found = []
    for name, sharding in STEPS.items():
        link = _link(math.inf, 0.0)
        alone = ParallelLayout(processes_per_machine=processes, within=link, sharding=sharding)
        said = list_collectives(model, alone, MICRO_BATCHES)
        copies = None if sharding == "fsdp" else times.copy_bytes_per_second
        told = foretell(said, links, processes, copies)
        size = sum(each.bytes for each in said)
        found.append(_row(f"a step, {name}", processes, size, (times.of_step[name], told), ""))
    return found


def _row(name: str, processes: int, size: int, seconds: tuple[float, float], note: str) -> list[str]:
    taken, told = seconds
    times = [f"{1e3 * each:,.2f}" for each in seconds]
    return [name, str(processes), f"{size / MB:,.3g}", *times, f"{round(100 * (told / taken - 1)):+d}%", note]


def summary(rows: Rows) -> str:
    """How large the errors are, in words."""
    errors = [abs(int(row[5].strip("%"))) for row in rows]
    return f"the median error is {statistics.median(errors):.0f}%, the largest {max(errors)}%"


def describe_links(processes: int, links: Mapping[str, Link]) -> str:
    """What was fitted."""
    each = (
        f"{kind} {link.bytes_per_second / 1e9:.2f} GB/s and {1e3 * link.start_seconds:.2f} ms a call"
        for kind, link in links.items()
    )
    return f"Among {processes}: {', '.join(each)}."


def read_options(words: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = measure.command_line(__doc__, repeats=3, of="rounds, after one that does not count")
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4], help="how many talk")
    parser.add_argument("--largest", type=float, default=500.0, help="MB of the largest tensor")
    parser.add_argument("--layers", type=int, default=6, help="of the model whose steps are said")
    parser.add_argument("--channels", type=int, default=256, help="of the model whose steps are said")
    return parser.parse_args(words)


if __name__ == "__main__":
    measure.run_program(read_options, compare)
