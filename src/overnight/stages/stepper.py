"""A training step in a process of its own: it steps when it is told to, and says how long that took.

Standard input brings one JSON line with a `StepTask`, then a line for each turn; each is answered by one JSON
line on standard output. In between the process waits in a blocking read, without work.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any

from overnight.model.config import ModelConfig
from overnight.parallel import ComputeConfig
from overnight.world import open_world

if TYPE_CHECKING:
    from overnight.data.ahead import Batches
    from overnight.trainer import StepResult

SEED = 1337
PEAK_LEARNING_RATE, WARMUP_STEPS = 6e-4, 10  # a warm-up so short that the updates show in a few losses


@dataclass(frozen=True, kw_only=True)
class StepTask:
    """What is trained, and how. Tasks of the same model begin with the same weights."""

    model: ModelConfig
    compute: ComputeConfig
    """With everything decided."""
    ids: str
    """A .npy file: the text, as one row of ids."""
    rows_per_step: int
    micro_batches: int
    """How many equal parts of a step are computed one after the other."""
    vocabulary_multiple: int
    """The embedding has the next multiple of so many rows; those beyond the vocabulary are never used."""
    fused_optimizer: bool
    large_pages: bool
    """Whether the process is to be started with the allocator that is fit for training."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step."""
        return self.rows_per_step * self.model.context_length

    def settings(self) -> dict[str, object]:
        """How the step is computed, by name; what is computed is left out."""
        others = ("rows_per_step", "micro_batches", "vocabulary_multiple", "fused_optimizer", "large_pages")
        return {**dataclasses.asdict(self.compute), **{name: getattr(self, name) for name in others}}

    def as_json(self) -> str:
        """On one line."""
        return json.dumps(dataclasses.asdict(self))


def read_task(line: str) -> StepTask:
    """What `as_json` wrote."""
    values = json.loads(line)
    model, compute = ModelConfig(**values.pop("model")), ComputeConfig(**values.pop("compute"))
    return StepTask(model=model, compute=compute, **values)


def learning_rate(step: int) -> float:
    """Of the step with that number, counted from 0; the same for all tasks."""
    return PEAK_LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS)


def read_rows(ids: Any, context_length: int) -> Batches:
    """(first row, rows) -> Batch, on the CPU: the rows lie end to end in `ids`."""
    import torch

    from overnight.data.stream import Batch

    def batch(first_row: int, rows: int) -> Batch:
        start, end = first_row * context_length, (first_row + rows) * context_length
        stretch = torch.from_numpy(ids[start : end + 1].astype("int64"))
        assert len(stretch) == end + 1 - start, "the text is too short for this step"
        return Batch(stretch[:-1].view(rows, -1), stretch[1:].view(rows, -1))

    return batch


def build_step(task: StepTask) -> Callable[[], StepResult]:
    """A function that does one step of `overnight train` as the task has it, from fresh weights on.

    In float16 it tries again until the gradients are finite, so that all tasks have done the same updates.
    """
    import numpy as np

    from overnight.batching import constant_plan
    from overnight.data.ahead import read_ahead
    from overnight.model.gpt import allocate_model
    from overnight.model.initialization import initialize
    from overnight.optim import OptimizerConfig, build_optimizer
    from overnight.parallel import build_loss
    from overnight.stages.pretrain import next_token_nats
    from overnight.state import TrainState, build_scaler
    from overnight.trainer import Training, train_step

    device, context_length = task.compute.device, task.model.context_length
    assert device is not None
    model = allocate_model(task.model, task.vocabulary_multiple)
    initialize(model, SEED)
    model.to(device)
    optimizer = OptimizerConfig(peak_learning_rate=PEAK_LEARNING_RATE)
    state = TrainState(
        model,
        build_optimizer(model, optimizer, fused=task.fused_optimizer),
        scaler=build_scaler(device, task.compute.precision),
    )
    training = Training(
        batches=read_ahead(read_rows(np.load(task.ids), context_length), device),
        loss=build_loss(model, next_token_nats, task.compute),
        plan=constant_plan(context_length, task.rows_per_step // task.micro_batches, task.micro_batches),
        learning_rate=learning_rate,
        max_grad_norm=optimizer.max_grad_norm,
        seed=SEED,
        device=device,
    )

    def step() -> StepResult:
        result = train_step(state, training)
        while state.scaler.get_scale() > 1 and isfinite(result.loss) and not isfinite(result.grad_norm):
            state.step -= 1  # float16's gradients overflowed: no weight has changed, and the scale is lower
            result = train_step(state, training)
        return result

    return step


def untimed_steps(device: str) -> int:
    """How many steps come before the timed one of each turn.

    On a GPU one does: there the memory is taken again that was given back after the turn before, so that
    the other processes find it, and the clock has risen.
    """
    return 0 if device == "cpu" else 1


def take_turn(step: Callable[[], StepResult], device: str) -> dict[str, object]:
    """Time one step; returns its milliseconds, its peak memory, and the losses of all that were done."""
    from overnight.measurement import peak_memory_bytes, release_cached_memory, reset_peak_memory

    reset_peak_memory(device)
    results = [step() for _ in range(untimed_steps(device) + 1)]
    peak_bytes = peak_memory_bytes(device)
    release_cached_memory(device)
    return {
        "milliseconds": results[-1].seconds * 1e3,
        "losses": [result.loss for result in results],
        "peak_bytes": peak_bytes,
    }


def serve() -> None:
    """Answer until standard input ends. Memory that does not suffice is an answer, too, and the last one."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints does not come between the answers

    def answer(values: Mapping[str, object]) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    import torch

    task = read_task(sys.stdin.readline())
    device = open_world(task.compute.device).device
    try:
        step = build_step(task)
        answer({"threads": torch.get_num_threads()})
        while sys.stdin.readline():
            answer(take_turn(step, device))
    except (torch.OutOfMemoryError, MemoryError):
        answer({"problem": f"the memory of {device} does not suffice"})


if __name__ == "__main__":
    serve()
