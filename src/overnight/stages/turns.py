"""Training steps compared: each in a process of its own, in turn, so that a busy machine hurts all alike."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from overnight.stages.stepper import StepTask
from overnight.terminal import progress
from overnight.world.cores import environment_of_process

PROGRAM = ("-P", "-m", "overnight.stages.stepper")  # -P: not a module that lies in the current folder
REMEDY = "take fewer --rows, or a smaller --model"


class Turn(NamedTuple):
    """What one process did in one round."""

    milliseconds: float
    """Of its one timed step."""
    losses: tuple[float, ...]
    """Of all its steps, the timed one last; nats per token."""
    peak_bytes: int | None


class SteppingProcess:
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

    def take_turn(self) -> Turn:
        """Do one timed step."""
        self._tell("step")
        answer = self._hear()
        return Turn(answer["milliseconds"], tuple(answer["losses"]), answer["peak_bytes"])

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
def at_work(tasks: Mapping[str, StepTask]) -> Iterator[list[SteppingProcess]]:
    """A process for each task, ready to step; they end with the block, however it is left."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        processes = []
        for name, task in tasks.items():
            process = SteppingProcess(name, task, folder)
            stack.callback(process.end)
            processes.append(process)
        with progress("start", len(processes), "processes") as advance:
            for process in processes:
                process.wait_until_ready()
                advance()
        yield processes


def take_turns(
    processes: Sequence[SteppingProcess], rounds: int, warm_ups: int, tokens_per_step: int
) -> Iterator[dict[str, Turn]]:
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
