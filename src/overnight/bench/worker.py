"""A training step in a process of its own: it steps when it is told to, and says how long that took.

Standard input brings one JSON line with a `StepTask`, then a line for each turn; each is answered by one JSON
line on standard output. In between the process waits in a blocking read, without work.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from overnight.data.loader import Batch
from overnight.distributed.machine import environment_of_process
from overnight.distributed.world import SINGLE_PROCESS, open_world
from overnight.hardware import peak_memory_bytes, release_cached_memory, reset_peak_memory
from overnight.model.gpt import GPT
from overnight.model.model_config import ModelConfig
from overnight.recipe import Recipe, Resolved
from overnight.run.setup import build_training
from overnight.terminal import progress
from overnight.training import Compute, OptimizerConfig
from overnight.training.batch import constant_plan
from overnight.training.optim import build_optimizer, build_scaler
from overnight.training.schedule import ScheduleConfig
from overnight.training.state import TrainState
from overnight.training.step import StepResult, train_step

SEED = 1337
PEAK_LEARNING_RATE, WARMUP_STEPS = 6e-4, 10  # a warm-up so short that the updates show in a few losses


@dataclass(frozen=True, kw_only=True)
class StepTask:
    """What is trained, and how. Tasks of the same model begin with the same weights."""

    model: ModelConfig
    compute: Compute
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
    model, compute = ModelConfig(**values.pop("model")), Compute(**values.pop("compute"))
    return StepTask(model=model, compute=compute, **values)


class Rows:
    """Rows of one array of ids, consecutive."""

    def __init__(self, ids: Any, context_length: int) -> None:
        self._ids, self._context_length = ids, context_length

    def batch(self, first_row: int, rows: int) -> Batch:
        """These rows, on the CPU."""
        start, end = first_row * self._context_length, (first_row + rows) * self._context_length
        window = torch.from_numpy(self._ids[start : end + 1].astype("int64"))
        assert len(window) == end + 1 - start, "the text is too short for this step"
        return Batch(window[:-1].view(rows, -1), window[1:].view(rows, -1))


def resolve_task(task: StepTask) -> Resolved:
    """The task as a resolved recipe: a constant learning rate after a short warm-up."""
    schedule = ScheduleConfig(total_steps=10**6, warmup_steps=WARMUP_STEPS, learning_rate_decay="constant")
    recipe = Recipe(
        run_name="bench",
        seed=SEED,
        model=task.model,
        optimizer=OptimizerConfig(peak_learning_rate=PEAK_LEARNING_RATE),
        schedule=schedule,
    )
    plan = constant_plan(
        task.model.context_length, task.rows_per_step // task.micro_batches, task.micro_batches
    )
    return Resolved(
        recipe=recipe,
        model=task.model,
        compute=task.compute,
        plan=plan,
        total_steps=schedule.total_steps or 0,
    )


def build_step(task: StepTask) -> Callable[[], StepResult]:
    """A function that does one step of `overnight train` as the task has it, from fresh weights on.

    In float16 it tries again until the gradients are finite, so that all tasks have done the same updates.
    """
    resolved = resolve_task(task)
    world = dataclasses.replace(SINGLE_PROCESS, device=task.compute.device)
    model = GPT(task.model, task.vocabulary_multiple, seed=SEED).to(world.device)
    optimizer = build_optimizer(model, resolved.recipe.optimizer, fused=task.fused_optimizer)
    state = TrainState(model, optimizer, scaler=build_scaler(world.device, task.compute.precision))
    setup = build_training(resolved, model, Rows(np.load(task.ids), task.model.context_length), world)

    def step() -> StepResult:
        result = train_step(state, setup)
        while state.scaler.get_scale() > 1 and isfinite(result.loss) and not isfinite(result.grad_norm):
            state.step -= 1  # float16's gradients overflowed: no weight has changed, and the scale is lower
            result = train_step(state, setup)
        return result

    return step


def untimed_steps(device: str) -> int:
    """How many steps come before the timed one of each turn.

    On a GPU one does: there the memory is taken again that was given back after the turn before, so that
    the other processes find it, and the clock has risen.
    """
    return 0 if device == "cpu" else 1


def time_steps(step: Callable[[], StepResult], device: str) -> dict[str, object]:
    """Time one step; returns its milliseconds, its peak memory, and the losses of all that were done."""
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

    task = read_task(sys.stdin.readline())
    device = open_world(task.compute.device).device
    try:
        step = build_step(task)
        answer({"threads": torch.get_num_threads()})
        while sys.stdin.readline():
            answer(time_steps(step, device))
    except (torch.OutOfMemoryError, MemoryError):
        answer({"problem": f"the memory of {device} does not suffice"})


if __name__ == "__main__":
    serve()


# ---------------------------------------------------------------- training steps compared


PROGRAM = ("-P", "-m", "overnight.bench.worker")  # -P: not a module that lies in the current folder
REMEDY = "take fewer --rows, or a smaller --model"


class TimedSteps(NamedTuple):
    """What one process did in one round."""

    milliseconds: float
    """Of its one timed step."""
    losses: tuple[float, ...]
    """Of all its steps, the timed one last; nats per token."""
    peak_bytes: int | None


class StepWorker:
    """A process that steps: told to by a line, it answers with a line, and waits without working.

    It stands in a session of its own, so that a Ctrl-C meets only the process that can close it.
    """

    def __init__(self, name: str, task: StepTask, folder: Path) -> None:
        self.name = name
        self._log = folder / f"{name}.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, *PROGRAM],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment_of_process(large_pages=task.large_pages),
                start_new_session=True,
                text=True,
            )
        self._tell(task.as_json())

    @property
    def pid(self) -> int:
        """Its number, which is its session's as well."""
        return self._process.pid

    def wait_until_ready(self) -> dict[str, Any]:
        """Wait for the model to be built; returns what the process says of itself."""
        return self._hear()

    def take_turn(self) -> TimedSteps:
        """Do one timed step."""
        self._tell("step")
        answer = self._hear()
        return TimedSteps(answer["milliseconds"], tuple(answer["losses"]), answer["peak_bytes"])

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended; what it said last is heard next
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def _hear(self) -> dict[str, Any]:
        """The next answer. Raises ValueError if memory does not suffice, OSError if the process has ended."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            if status == -signal.SIGKILL:
                raise ValueError(f"{self.name} was killed, most likely for its memory: {REMEDY}")
            last_words = self._log.read_text(encoding="utf-8", errors="replace").strip()
            raise ChildProcessError(f"{self.name} ended with status {status}:\n{last_words[-2000:]}")
        answer: dict[str, Any] = json.loads(line)
        if "problem" in answer:
            raise ValueError(f"{self.name}: {answer['problem']}; {REMEDY}")
        return answer

    def end(self) -> None:
        """End it at once, with everything that it started: a compiler has processes of its own."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):  # what was still to be told has no listener any more
                pipe.close()
        with suppress(ProcessLookupError):  # it was gone already
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()


@contextmanager
def running_workers(tasks: Mapping[str, StepTask]) -> Iterator[list[StepWorker]]:
    """A process for each task, ready to step; they end with the block, however it is left."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        processes = []
        for name, task in tasks.items():
            process = StepWorker(name, task, folder)
            stack.callback(process.end)
            processes.append(process)
        with progress("start", len(processes), "processes") as advance:
            for process in processes:
                process.wait_until_ready()
                advance()
        yield processes


def interleave(
    processes: Sequence[StepWorker], rounds: int, warm_ups: int, tokens_per_step: int
) -> Iterator[dict[str, TimedSteps]]:
    """Round by round, what each process did in it: A B C A B C; the first `warm_ups` rounds are among them.

    A machine's speed drifts with its heat and its other work; the turns of one round had the same machine.
    """
    for number in range(warm_ups + rounds):
        title = (
            f"warm-up {number + 1}/{warm_ups}"
            if number < warm_ups
            else f"round {number - warm_ups + 1}/{rounds}"
        )
        turns = {}
        with progress(title, tokens_per_step * len(processes), "tokens") as advance:
            for process in processes:
                advance(0, process.name)
                turns[process.name] = process.take_turn()
                advance(tokens_per_step)
        yield turns
