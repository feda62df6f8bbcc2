"""One side of train_step.py in a process of its own: it takes a turn for each line and reports its time.

Standard input brings one JSON line with a `Task`, then a line for each turn; each is answered by one JSON
line on standard output. In between it waits in a blocking read.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llmc
import peers
from overnight.bench import worker
from overnight.model.model_config import VOCABULARY_MULTIPLE, ModelConfig
from sides import LLM_C, Task

if TYPE_CHECKING:
    from overnight.model.gpt import GPT

SCHEDULE = (worker.PEAK_LEARNING_RATE, worker.WARMUP_STEPS)


def learning_rate(step: int) -> float:
    """Of a step, counted from 0: the constant rate after a linear warm-up that our side has."""
    return worker.PEAK_LEARNING_RATE * min(1.0, (step + 1) / worker.WARMUP_STEPS)


def build(task: Task) -> tuple[Callable[[], Mapping[str, Any]], str]:
    """A function that takes a turn, and the precision it works in."""
    if task.peer is None:
        step, precision = build_ours(task)
    elif task.peer == LLM_C:
        return llmc.cuda_turn(task, build_model(task), SCHEDULE), "bf16"
    else:
        step, precision = build_theirs(task, build_model(task))
    return lambda: worker.time_steps(step, task.device)._asdict(), precision


def build_model(task: Task) -> GPT:
    """The model that all sides begin with."""
    from overnight.model.gpt import GPT

    return GPT(ModelConfig(**task.model), seed=worker.SEED)


def build_ours(task: Task) -> tuple[Callable[[], Any], str]:
    """The step of `overnight train`."""
    from overnight.training import ComputeConfig
    from overnight.training.compute import resolve_compute

    chosen: Any = task.precision
    compute = resolve_compute(ComputeConfig(precision=chosen, compile=task.compile), task.device)
    step_task = worker.StepTask(
        model=ModelConfig(**task.model),
        compute=compute,
        ids=task.ids,
        rows_per_step=task.rows * task.micro_batches,
        micro_batches=task.micro_batches,
        vocabulary_multiple=VOCABULARY_MULTIPLE,
        fused_optimizer=True,
        large_pages="GLIBC_TUNABLES" in os.environ,
    )
    return worker.build_step(step_task), str(compute.precision)


def build_theirs(task: Task, model: GPT) -> tuple[Callable[[], Any], str]:
    """The step of a peer written in PyTorch, from the weights of `model`."""
    import numpy as np

    assert task.peer is not None
    checkout = Path(task.checkout) if task.checkout is not None else None
    peer = peers.build_peer(task.peer, checkout, model)
    stepping = peers.Stepping(
        batches=worker.Rows(np.load(task.ids), model.config.context_length).batch,
        rows=task.rows,
        micro_batches=task.micro_batches,
        precision=str(task.precision),
        compile=task.compile,
        device=task.device,
        learning_rate=learning_rate,
    )
    return peers.build_step(peer, stepping), peers.precision_name(peer, stepping)


def serve() -> None:
    """Answer until standard input ends."""
    task = Task(**json.loads(sys.stdin.readline()))
    if (task.peer, task.device) == (LLM_C, "cpu"):
        llmc.become_driver(task, build_model(task), SCHEDULE)  # which answers from here on
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a model prints must not come between the answers

    def answer(**values: object) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    import torch

    turn, precision = build(task)
    answer(precision=precision, threads=torch.get_num_threads())
    waiting_since, cpu_before = time.perf_counter(), time.process_time()
    while sys.stdin.readline():
        seconds, cpu_seconds = time.perf_counter() - waiting_since, time.process_time() - cpu_before
        answer(**turn(), waited_seconds=seconds, waited_cpu_seconds=cpu_seconds)
        waiting_since, cpu_before = time.perf_counter(), time.process_time()


if __name__ == "__main__":
    serve()
