"""`overnight train` whose talk with other processes is timed, a call at a time: started by torchrun.

    torchrun --nproc-per-node 2 benchmarks/overheard.py NOTES train RECIPE ...

Each process writes NOTES/<rank>.json: for every step, from its beginning to that of the next, its seconds,
and for every call of torch.distributed in it when it began and ended, and the bytes it is about. On one
machine all processes read the same clock, which tells the transfer from the wait for whoever comes last.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

CALLS = (
    *("all_reduce", "broadcast", "batch_isend_irecv", "all_gather_object"),
    *("all_gather_into_tensor", "all_gather_single", "reduce_scatter_tensor", "reduce_scatter_single"),
)  # before torch 2.13 the last two pairs had their first names only
UNTIMED_STEPS = 3  # connections are made and memory is taken in the first ones


class Step(NamedTuple):
    """One step of one process, and what it says until the next begins."""

    seconds: float
    calls: list[tuple[float, float, int]]
    """When each began and ended, and its bytes."""


class Talk(NamedTuple):
    """What a step spends on the others."""

    seconds: float
    """Of all of it."""
    moving: float
    """From when the last process has come to when the last has what it wants."""
    waiting: float
    """For the last to come, on average over the processes."""
    bytes: int
    """Of the tensors that one process hands over."""


def divide(steps: Sequence[Step]) -> Talk:
    """The same step of all processes."""
    moving = waiting = 0.0
    for calls in zip(*(step.calls for step in steps), strict=True):
        last = max(begun for begun, _, _ in calls)
        moving += max(0.0, max(ended for _, ended, _ in calls) - last)
        waiting += statistics.mean(last - begun for begun, _, _ in calls)
    seconds = max(step.seconds for step in steps)
    return Talk(seconds, moving, waiting, sum(size for _, _, size in steps[0].calls))


def read_notes(folder: Path, processes: int) -> list[Talk]:
    """Every step but the first few."""
    ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]
    steps = [[Step(*step) for step in notes] for notes in ranks]
    return [divide(together) for together in zip(*steps, strict=True)][UNTIMED_STEPS:]


def listen(folder: Path) -> Callable[[], None]:
    """Begin to take notes; returns what writes them."""
    import torch.distributed as dist

    from overnight.training import step as step_module

    notes: list[Step] = []
    calls: list[tuple[float, float, int]] = []
    begun_at: list[float] = []
    within: list[str] = []  # one call of torch's may make others

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def timing(*given: Any, **named: Any) -> Any:
            if within:
                return call(*given, **named)
            within.append(call.__name__)
            begun = time.monotonic()
            answer = call(*given, **named)
            requests = answer if isinstance(answer, list) else []
            for request in requests:
                request.wait()
            calls.append((begun, time.monotonic(), bytes_of(given, named)))
            within.clear()
            return [] if requests else answer  # to wait once more for what has come would take for ever

        return timing

    for name in CALLS:
        if hasattr(dist, name):
            setattr(dist, name, timed(getattr(dist, name)))
    train_step = step_module.train_step

    def step(state: Any, training: Any) -> Any:
        now = time.monotonic()
        if begun_at:
            notes.append(Step(now - begun_at[-1], list(calls)))
        begun_at.append(now)
        calls.clear()
        return train_step(state, training)

    step_module.train_step = step

    def write() -> None:
        folder.mkdir(exist_ok=True)
        (folder / f"{dist.get_rank()}.json").write_text(json.dumps(notes))

    return write


def bytes_of(given: Sequence[Any], named: dict[str, Any]) -> int:
    """Of the largest tensor that a call is about: the whole, where it is gathered from parts or divided."""
    parts = given[0] if given and isinstance(given[0], list) else [*given, *named.values()]
    return max((getattr(getattr(part, "tensor", part), "nbytes", 0) for part in parts), default=0)


def main(words: Sequence[str]) -> int:
    """Train and take notes; the exit status is that of `overnight`."""
    from overnight.cli import main as overnight
    from overnight.run import train

    write = listen(Path(words[0]))
    fit = train.fit

    def fit_and_write(*given: Any) -> None:
        fit(*given)
        write()

    train.fit = fit_and_write
    return overnight(words[1:])


if __name__ == "__main__":
    from overnight.distributed.launcher import exit_process

    exit_process(main(sys.argv[1:]))
