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


SIDES = {
    "overnight": Side(name="overnight, eager"),
    "overnight-compiled": Side(name="overnight, compiled", compile=True),
    "overnight-large-pages": Side(name="overnight, large pages", compile=True, large_pages=True),
    "peer-float32": Side(name="build-nanogpt, float32", is_peer=True, precision="fp32"),
    "peer": Side(name="build-nanogpt, as published", is_peer=True, precision="bf16"),
    "peer-compiled": Side(name="build-nanogpt, compiled", is_peer=True, precision="bf16", compile=True),
}


def choose_sides(names: Sequence[str], *, with_peer: bool, compiled: bool, glibc: bool) -> list[Side]:
    """Those of the named sides that can run here, in the order they were named.

    Where nothing is compiled, large pages are measured eagerly. Raises ValueError if no side is left.
    """
    chosen = []
    for name in names:
        side = SIDES[name]
        if side.large_pages:
            side = dataclasses.replace(side, compile=compiled)
        possible = (
            with_peer or not side.is_peer,
            compiled or not side.compile,
            glibc or not side.large_pages,
        )
        if all(possible):
            chosen.append(side)
    if not chosen:
        raise ValueError(f"none of {', '.join(names)} can run like this; give --peer, or other --sides")
    return chosen


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
