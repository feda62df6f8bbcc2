"""The sides of train_step.py: what they are, and the processes they live in."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepper import Task

# glibc then keeps freed memory instead of returning it after every tensor, and asks for large pages. A
# process reads this variable once, before its first instruction.
LARGE_PAGES = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:"
    "glibc.malloc.trim_threshold=100000000000:glibc.malloc.top_pad=268435456"
}


@dataclass(frozen=True, kw_only=True)
class Side:
    """One way to do the step."""

    name: str
    is_peer: bool = False
    precision: str | None = None
    """fp32 or bf16; None: what `overnight train` takes on this machine."""
    compile: bool = False
    large_pages: bool = False


@dataclass(frozen=True, kw_only=True)
class Circumstances:
    """What a side may need and not find."""

    peer: bool
    """A checkout of build-nanogpt was named."""
    compiler: bool
    """There is a C++ compiler, and it may be used."""
    glibc: bool
    bf16: bool
    """The CPU multiplies bfloat16 matrices in hardware. Emulated they take ten times as long as float32."""


SIDES = {
    "overnight": Side(name="overnight, eager"),
    "overnight-compiled": Side(name="overnight, compiled", compile=True),
    "overnight-large-pages": Side(name="overnight, large pages", compile=True, large_pages=True),
    "peer-float32": Side(name="build-nanogpt, float32", is_peer=True, precision="fp32"),
    "peer-float32-compiled": Side(
        name="build-nanogpt, float32 compiled", is_peer=True, precision="fp32", compile=True
    ),
    "peer": Side(name="build-nanogpt, bf16 as published", is_peer=True, precision="bf16"),
    "peer-compiled": Side(name="build-nanogpt, bf16 compiled", is_peer=True, precision="bf16", compile=True),
}


def choose_sides(names: Sequence[str] | None, found: Circumstances) -> tuple[list[Side], list[str]]:
    """The named sides, or if none is named, all that make sense here; and a sentence for each left out.

    Without a compiler large pages are measured eagerly. Raises ValueError for a named side that can't run.
    """
    chosen, left_out = [], []
    for key in SIDES if names is None else names:
        side = _eager_if_need_be(SIDES[key], found)
        obstacle = _find_obstacle(side, found)
        if names is not None and obstacle is not None:
            raise ValueError(f"the side {key} can't run: {obstacle}")
        if names is None and side.precision == "bf16" and not found.bf16:
            obstacle = obstacle or f"this CPU only emulates bfloat16; --sides {key} runs it all the same"
        if obstacle is None:
            chosen.append(side)
        else:
            left_out.append(f"{side.name} is left out: {obstacle}.")
    return chosen, left_out


def _eager_if_need_be(side: Side, found: Circumstances) -> Side:
    return dataclasses.replace(side, compile=found.compiler) if side.large_pages else side


def _find_obstacle(side: Side, found: Circumstances) -> str | None:
    """Why a side can't run; None if it can."""
    if side.is_peer and not found.peer:
        return "--peer names no checkout"
    if side.compile and not found.compiler:
        return "nothing is compiled here"
    if side.large_pages and not found.glibc:
        return "the C library is not glibc"
    return None


class Process:
    """A side at work: told to step by a line, it answers with a line, and waits without working."""

    def __init__(self, side: Side, task: Task) -> None:
        self.name = side.name
        environment = {name: value for name, value in os.environ.items() if name not in LARGE_PAGES}
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("stepper.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**environment, **(LARGE_PAGES if side.large_pages else {})},
            text=True,
        )
        self.about = self.ask(json.dumps(dataclasses.asdict(task)))

    def ask(self, line: str) -> dict[str, Any]:
        """Send a line and wait for its answer. Raises RuntimeError if the process has ended."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(line + "\n")
        stdin.flush()
        answer = stdout.readline()
        if not answer:
            self.close()
            raise RuntimeError(f"{self.name} ended with status {self._process.returncode}, see above")
        values: dict[str, Any] = json.loads(answer)
        return values

    def step(self) -> dict[str, Any]:
        """Do one step."""
        return self.ask("step")

    def close(self) -> None:
        """Let it end, and make sure that it does."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextmanager
def at_work(sides: Sequence[Side], task: Callable[[Side], Task]) -> Iterator[list[Process]]:
    """All sides, ready to step; they end with the block."""
    with ExitStack() as stack:
        processes = []
        for side in sides:
            print(f"starting {side.name}", file=sys.stderr, flush=True)
            process = Process(side, task(side))
            stack.callback(process.close)
            processes.append(process)
        yield processes
