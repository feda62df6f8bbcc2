"""One side of train_step.py in a process of its own: it steps when it is told to, and says how long.

Standard input brings one JSON line with a `Task`, then a line for each step; each is answered by one JSON
line on standard output. In between it waits in a blocking read.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overnight.model.config import ModelConfig

SEED = 1337
PEAK_LEARNING_RATE, WARMUP_STEPS = 6e-4, 10  # a warm-up so short that a few steps show in the loss


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a process is to train, and how."""

    peer: str | None
    """Path of build-nanogpt's checkout; None: it is overnight that trains."""
    precision: str | None
    """fp32 or bf16; None: what `overnight train` takes on this machine."""
    compile: bool
    model: Mapping[str, Any]
    """The fields of a ModelConfig."""
    rows: int
    ids: str
    """A .npy file: the text, as one row of ids."""


def learning_rate(step: int) -> float:
    """Of the step with that number, counted from 0; the same for all sides."""
    return PEAK_LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS)


def read_rows(ids: Any, context_length: int) -> Callable[[int, int], Any]:
    """(first row, rows) -> Batch: rows end to end, as build-nanogpt's loader lays them."""
    import torch

    from overnight.data.stream import Batch

    def batch(first_row: int, rows: int) -> Batch:
        start, end = first_row * context_length, (first_row + rows) * context_length
        stretch = torch.from_numpy(ids[start : end + 1].astype("int64"))
        assert len(stretch) == end + 1 - start, "the text is too short for this step"
        return Batch(stretch[:-1].view(rows, -1), stretch[1:].view(rows, -1))

    return batch


def build(task: Task) -> tuple[Callable[[], float], str]:
    """A function that does one step and returns its loss, and the precision it works in."""
    import numpy as np

    from overnight.model.gpt import GPT
    from overnight.model.initialization import initialize

    config = ModelConfig(**task.model)
    batches = read_rows(np.load(task.ids), config.context_length)
    model = GPT(config)
    initialize(model, SEED)
    return build_ours(task, model, batches) if task.peer is None else build_theirs(task, model, batches)


def build_ours(task: Task, model: Any, batches: Callable[[int, int], Any]) -> tuple[Callable[[], float], str]:
    """The step of `overnight train`."""
    from overnight.batching import BatchPlan
    from overnight.optim import OptimizerConfig, build_optimizer
    from overnight.parallel import ComputeConfig, build_loss, resolve_compute
    from overnight.stages.pretrain import next_token_nats
    from overnight.state import TrainState
    from overnight.trainer import Training, train_step

    chosen: Any = task.precision
    compute = resolve_compute(ComputeConfig(precision=chosen, compile=task.compile), "cpu")
    optimizer = OptimizerConfig(peak_learning_rate=PEAK_LEARNING_RATE)
    state = TrainState(model, build_optimizer(model, optimizer))
    training = Training(
        batches=batches,
        loss=build_loss(model, next_token_nats, compute),
        plan=BatchPlan(model.config.context_length, task.rows, 1),
        learning_rate=learning_rate,
        max_grad_norm=optimizer.max_grad_norm,
        seed=SEED,
        device="cpu",
    )
    return lambda: train_step(state, training).loss, str(compute.precision)


def build_theirs(
    task: Task, model: Any, batches: Callable[[int, int], Any]
) -> tuple[Callable[[], float], str]:
    """The step of build-nanogpt, from the same weights."""
    import peer

    assert task.peer is not None
    theirs = peer.build_model(peer.load_definitions(Path(task.peer)), model.config, model.weights())
    step = peer.build_step(
        theirs, bf16=task.precision == "bf16", compiled=task.compile, learning_rate=learning_rate
    )
    steps = iter(range(sys.maxsize))

    def next_step() -> float:
        batch = batches(next(steps) * task.rows, task.rows)
        return step(batch.ids, batch.targets)

    return next_step, str(task.precision)


def peak_bytes() -> int:
    """The most memory this process ever had resident."""
    kilobytes_or_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes_or_bytes * (1 if sys.platform == "darwin" else 1024)


def serve() -> None:
    """Answer until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a model prints does not come between the answers

    def answer(**values: object) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    import torch

    step, precision = build(Task(**json.loads(sys.stdin.readline())))
    answer(precision=precision, threads=torch.get_num_threads())
    waiting_since, cpu_before = time.perf_counter(), time.process_time()
    while sys.stdin.readline():
        started_at, cpu_at_start = time.perf_counter(), time.process_time()
        loss = step()
        ended_at = time.perf_counter()
        answer(
            milliseconds=(ended_at - started_at) * 1e3,
            loss=loss,
            peak_bytes=peak_bytes(),
            waited_seconds=started_at - waiting_since,
            waited_cpu_seconds=cpu_at_start - cpu_before,
        )
        waiting_since, cpu_before = time.perf_counter(), time.process_time()


if __name__ == "__main__":
    serve()
