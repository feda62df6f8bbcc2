"""The sides of train_step.py: what they are, and the processes they live in."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overnight.distributed.launcher import environment_of_process
from peers import PEERS

LLM_C = "llm.c"


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a process is to train, and how."""

    peer: str | None
    """None: it is overnight that trains."""
    checkout: str | None
    """Where the peer lies; None for what is installed."""
    precision: str | None
    """fp32 or bf16; None: what `overnight train` takes on this machine."""
    compile: bool
    device: str
    """cpu or cuda."""
    model: Mapping[str, Any]
    """The fields of a ModelConfig."""
    rows: int
    """Of a micro-batch."""
    micro_batches: int
    """Of a step."""
    folder: str
    """For files, until all sides have ended. Its ids.npy holds the text, as one row of ids."""

    @property
    def ids(self) -> str:
        """The file of the text's ids."""
        return str(Path(self.folder) / "ids.npy")


@dataclass(frozen=True, kw_only=True)
class Side:
    """One way to do the step."""

    name: str
    peer: str | None = None
    """None: it is overnight."""
    precision: str | None = None
    """fp32 or bf16; None: what `overnight train` takes on this machine."""
    compile: bool = False
    large_pages: bool = False


WAYS = {
    "fp32": {"precision": "fp32", "compile": False},
    "fp32-compiled": {"precision": "fp32", "compile": True},
    "bf16": {"precision": "bf16", "compile": False},
    "bf16-compiled": {"precision": "bf16", "compile": True},
}


def _sides_of(peer: str) -> dict[str, Side]:
    """A peer that is written in PyTorch, in every way."""
    return {
        f"{peer}-{way}": Side(name=f"{PEERS[peer]}, {way.replace('-', ' ')}", peer=peer, **settings)  # type: ignore[arg-type]
        for way, settings in WAYS.items()
    }


SIDES = {
    "overnight": Side(name="overnight, eager"),
    "overnight-compiled": Side(name="overnight, compiled", compile=True),
    "overnight-large-pages": Side(name="overnight, large pages", compile=True, large_pages=True),
    **_sides_of("build-nanogpt"),
    **_sides_of("nanogpt"),
    **_sides_of("transformers"),
    LLM_C: Side(name=LLM_C, peer=LLM_C),
}


@dataclass(frozen=True, kw_only=True)
class Circumstances:
    """What a side may need, and whether it is there."""

    device: str
    """cpu or cuda."""
    missing: Mapping[str, str]
    """By a peer that can't be measured: why, as a clause."""
    compiler: bool
    """torch.compile may be used."""
    glibc: bool
    bf16: bool
    """The device multiplies bfloat16 matrices in hardware; emulated, a CPU takes ten times float32's time."""


def choose_sides(names: Sequence[str] | None, found: Circumstances) -> tuple[list[Side], list[str]]:
    """The named sides, or if none is named, all that make sense here; and a sentence on those left out.

    Of a peer, what makes sense is the shortest precision that the device has. Without a compiler large
    pages are measured eagerly. Raises ValueError for a named side that can't run.
    """
    chosen: list[Side] = []
    left_out: dict[str, list[str]] = {}
    for key in SIDES if names is None else names:
        side = _eager_if_need_be(SIDES[key], found)
        obstacle = _find_obstacle(side, found)
        if names is not None and obstacle is not None:
            raise ValueError(f"the side {key} can't run: {obstacle}")
        if names is None and obstacle is None:
            obstacle = _find_doubt(side, found)
        if obstacle is None:
            chosen.append(side)
        else:
            left_out.setdefault(obstacle, []).append(side.name)
    return chosen, [f"Left out, since {why}: {'; '.join(each)}." for why, each in left_out.items()]


def _eager_if_need_be(side: Side, found: Circumstances) -> Side:
    return dataclasses.replace(side, compile=found.compiler) if side.large_pages else side


def _find_obstacle(side: Side, found: Circumstances) -> str | None:
    """Why a side can't run; None if it can."""
    if side.peer is not None and side.peer in found.missing:
        return found.missing[side.peer]
    if side.compile and not found.compiler:
        return "nothing is compiled here"
    if side.large_pages and found.device != "cpu":
        return "large pages are for the memory of a CPU"
    if side.large_pages and not found.glibc:
        return "the C library is not glibc"
    return None


def _find_doubt(side: Side, found: Circumstances) -> str | None:
    """Why a side that can run is better left out unless it is named; None if it is not."""
    if side.precision == "bf16" and not found.bf16:
        return f"this {found.device} only emulates bfloat16 (--sides runs it all the same)"
    if side.precision == "fp32" and found.bf16:
        return "bfloat16 is faster here (--sides runs it all the same)"
    return None


class Process:
    """A side in a process: it takes a turn for each line of input, answers with a line, and waits idle."""

    def __init__(self, side: Side, task: Task) -> None:
        self.name = side.name
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("stepper.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment_of_process(large_pages=side.large_pages),
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
        """Take a turn: one timed step."""
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
