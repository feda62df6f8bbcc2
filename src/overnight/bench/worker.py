"""A training step in its own process, which runs on request and reports its duration.

A connection brings a `StepTask`, then a request for each timed step, each answered by a `TimedSteps`. In
between the process waits in a blocking read, without work.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from math import isfinite
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from overnight.data.loader import Batch
from overnight.distributed.launcher import end_with_parent, environment_of_process
from overnight.distributed.world import World, open_world
from overnight.hardware import peak_memory_bytes, release_cached_memory, reset_peak_memory
from overnight.model.gpt import GPT
from overnight.model.model_config import ModelConfig
from overnight.recipe import Recipe, Resolved
from overnight.run.setup import build_training
from overnight.terminal import progress
from overnight.training import Compute, ComputeConfig, OptimizerConfig
from overnight.training.batch import constant_plan
from overnight.training.optim import build_optimizer, build_scaler
from overnight.training.schedule import ScheduleConfig
from overnight.training.state import TrainState
from overnight.training.step import StepResult, train_step

SEED = 1337
PEAK_LEARNING_RATE, WARMUP_STEPS = 6e-4, 10  # a short warm-up, so that a few losses show the updates
TOTAL_STEPS = 1_000_000  # never reached, so that the learning rate does not decay
PROGRAM = "import sys; from overnight.bench.worker import serve; serve(*map(int, sys.argv[1:]))"
WARM_UPS = 2  # rounds that are not counted: a process's heap still grows in its second step
REMEDY = "give fewer --rows, or a smaller --model"


@dataclass(frozen=True, kw_only=True)
class StepTask:
    """A model and how its step is computed. Tasks of the same model start with the same weights."""

    model: ModelConfig
    compute: Compute
    ids: str = ""
    """A .npy file: the text, as one row of ids. It is written when everything is decided."""
    rows_per_step: int
    micro_batches: int
    """Number of equal parts of a step, computed one after the other."""
    vocabulary_multiple: int = 1
    """The embedding's rows are padded to a multiple of this; padding rows are never used."""
    fused_optimizer: bool = False
    large_pages: bool = False
    """True if the process is started with the allocator for training."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step."""
        return self.rows_per_step * self.model.context_length

    def settings(self) -> dict[str, object]:
        """How the step is computed, by name, without the model and the text."""
        values = dataclasses.asdict(self)
        computed = values.pop("compute")
        del values["model"], values["ids"]
        return {**dataclasses.asdict(ComputeConfig()), **computed, **values}


class Rows:
    """The rows of one array of ids, end to end; on the CPU."""

    def __init__(self, ids: Any, context_length: int) -> None:
        self._ids = ids
        self._context_length = context_length

    def batch(self, first_row: int, rows: int) -> Batch:
        """Rows first_row, ..., first_row + rows - 1."""
        start, end = first_row * self._context_length, (first_row + rows) * self._context_length
        span = torch.from_numpy(self._ids[start : end + 1].astype("int64"))
        assert len(span) == end + 1 - start, "the text is too short for this step"
        return Batch(span[:-1].view(rows, -1), span[1:].view(rows, -1))


def build_step(task: StepTask) -> Callable[[], StepResult]:
    """A function that does one step of `overnight train` with the task's settings, from initial weights.

    In float16 it repeats a step until the gradients are finite, so that all tasks do the same updates.
    """
    device, context_length = task.compute.device, task.model.context_length
    plan = constant_plan(context_length, task.rows_per_step // task.micro_batches, task.micro_batches)
    schedule = ScheduleConfig(
        total_steps=TOTAL_STEPS, warmup_steps=WARMUP_STEPS, learning_rate_decay="constant"
    )
    recipe = Recipe(
        seed=SEED, optimizer=OptimizerConfig(peak_learning_rate=PEAK_LEARNING_RATE), schedule=schedule
    )
    resolved = Resolved(
        recipe=recipe, model=task.model, compute=task.compute, plan=plan, total_steps=TOTAL_STEPS
    )
    model = GPT(task.model, task.vocabulary_multiple, seed=SEED).to(device)
    optimizer = build_optimizer(model, recipe.optimizer, fused=task.fused_optimizer)
    state = TrainState(model, optimizer, scaler=build_scaler(device, task.compute.precision))
    rows = Rows(np.load(task.ids), context_length)
    training = build_training(resolved, model, rows, World(rank=0, size=1, device=device))

    def step() -> StepResult:
        result = train_step(state, training)
        while state.scaler.get_scale() > 1 and isfinite(result.loss) and not isfinite(result.grad_norm):
            state.step -= 1  # overflow: no weight has changed, and the loss scale is lower
            result = train_step(state, training)
        return result

    return step


class TimedSteps(NamedTuple):
    """The result of one process in one round."""

    milliseconds: float
    """Duration of the timed step."""
    losses: list[float]
    """Nats per token of all steps, the timed one last."""
    peak_bytes: int | None


def untimed_steps(device: str) -> int:
    """Number of steps before the timed one of each round.

    One on a GPU: it takes back the memory that was released for the other processes, and raises the clock.
    """
    return 0 if device == "cpu" else 1


def time_steps(step: Callable[[], StepResult], device: str) -> TimedSteps:
    """Time one step, after those that are not timed."""
    reset_peak_memory(device)
    results = [step() for _ in range(untimed_steps(device) + 1)]
    peak_bytes = peak_memory_bytes(device)
    release_cached_memory(device)
    return TimedSteps(results[-1].seconds * 1e3, [result.loss for result in results], peak_bytes)


def serve(file_descriptor: int, parent: int) -> None:
    """Answer requests until the other end is closed, or the process `parent` has ended.

    An out-of-memory error is sent as the last answer.
    """
    end_with_parent(parent)
    connection = Connection(file_descriptor)
    os.set_inheritable(file_descriptor, False)  # in a process started by this one it would stay open
    task: StepTask = connection.recv()
    device = open_world(task.compute.device).device
    try:
        step = build_step(task)
        connection.send("ready")
        while connection.recv():
            connection.send(time_steps(step, device))
    except EOFError:
        return
    except (torch.OutOfMemoryError, MemoryError):
        connection.send(MemoryError(f"{device} has too little memory"))


class StepWorker:
    """The process of one task, in a session of its own: Ctrl-C reaches only this process, which ends it."""

    def __init__(self, name: str, task: StepTask, folder: Path) -> None:
        self.name, self.task = name, task
        self._log = folder / f"{name}.log"
        self._connection, theirs = Pipe()
        self._connection.send(task)
        with self._log.open("wb") as log, theirs:
            self._process = subprocess.Popen(
                # -P: no module of the current folder is imported
                [sys.executable, "-P", "-c", PROGRAM, str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment_of_process(large_pages=task.large_pages),
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Id of the process and of its session."""
        return self._process.pid

    def time_step(self) -> TimedSteps:
        """Do one timed step."""
        with suppress(ConnectionError):  # it has ended; `receive` finds out why
            self._connection.send("step")
        timed: TimedSteps = self.receive()
        return timed

    def receive(self) -> Any:
        """The next answer: that the model is built, then the result of each timed step.

        Raises ValueError without enough memory, OSError if the process has ended.
        """
        try:
            answer = self._connection.recv()
        except (EOFError, ConnectionError):
            status = self._process.wait()
            if status == -signal.SIGKILL:
                raise ValueError(f"{self.name} was killed, most likely out of memory: {REMEDY}") from None
            log = self._log.read_text(encoding="utf-8", errors="replace").strip()
            raise ChildProcessError(f"{self.name} ended with status {status}:\n{log[-2000:]}") from None
        if isinstance(answer, MemoryError):
            raise ValueError(f"{self.name}: {answer}; {REMEDY}")
        return answer

    def end(self) -> None:
        """End the process at once, with the processes that it started (a compiler's, for example)."""
        self._connection.close()
        with suppress(ProcessLookupError):  # it has ended already
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()


@contextmanager
def running_workers(tasks: Mapping[str, StepTask]) -> Iterator[list[StepWorker]]:
    """Context manager with a ready process for each task; all end with the block, also on errors."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        workers = []
        for name, task in tasks.items():
            workers.append(StepWorker(name, task, folder))
            stack.callback(workers[-1].end)
        with progress("start", len(workers), "processes") as advance:
            for worker in workers:
                worker.receive()
                advance()
        yield workers


def interleave(workers: Sequence[StepWorker], rounds: int) -> Iterator[dict[str, TimedSteps]]:
    """The results of each round, after WARM_UPS others: A B C A B C.

    A machine's speed drifts with its temperature and other load; the steps of one round share both.
    """
    titles = [f"warm-up {number + 1}/{WARM_UPS}" for number in range(WARM_UPS)]
    for title in [*titles, *(f"round {number + 1}/{rounds}" for number in range(rounds))]:
        results = {}
        with progress(title, sum(worker.task.tokens_per_step for worker in workers), "tokens") as advance:
            for worker in workers:
                advance(0, worker.name)
                results[worker.name] = worker.time_step()
                advance(worker.task.tokens_per_step)
        yield results
