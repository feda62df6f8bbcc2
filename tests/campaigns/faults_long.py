"""R3, L1: what shows only over many steps: rows read twice or never, and memory that is not given back."""

from __future__ import annotations

import functools
import json
import os
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from faults_trials import Before, Place, finish, report
from mutants import replace
from overnight.data.loader import TokenStream
from overnight.training.batch import BatchConfig, BatchPlan, plan_batches
from report import Report

TOKENS_PER_ROW = 8
ROWS_PER_STEP = 48
EPOCHS = 3
Share = Callable[[BatchPlan, int, int, int], range]


def read_in_order(plan: BatchPlan, processes: int, last_row: int, share: Share) -> Iterator[int]:
    """The rows of all steps up to `last_row`, as all processes together take them."""
    step = 0
    while plan.tokens_before(step) // plan.tokens_per_row < last_row:
        for rank in range(processes):
            for micro_batch in share(plan, step, rank, processes):
                first, rows = plan.rows(step, micro_batch)
                yield from range(first, first + rows)
        step += 1


def divisions(rows: int) -> Iterator[tuple[int, int]]:
    """(rows of a micro-batch, processes): all that divide a step of so many rows."""
    for at_once in range(1, rows + 1):
        for processes in range(1, rows // at_once + 1):
            if rows % (at_once * processes) == 0:
                yield at_once, processes


def keep_ledger(
    stream: TokenStream, at_once: int, processes: int, ramp: int, share: Share
) -> tuple[int, int]:
    """(windows missing, windows repeated) over whole epochs; another order than one process's is both."""
    config = BatchConfig(
        tokens_per_step=ROWS_PER_STEP * TOKENS_PER_ROW,
        micro_batch_size=at_once,
        batch_ramp_start_tokens=ROWS_PER_STEP * TOKENS_PER_ROW // ramp if ramp > 1 else None,
        batch_ramp_tokens=4000 if ramp > 1 else None,
    )
    plan = plan_batches(config, TOKENS_PER_ROW, at_once, processes)
    per_epoch = stream.rows_per_epoch
    rows = list(read_in_order(plan, processes, EPOCHS * per_epoch, share))[: EPOCHS * per_epoch]
    missing = repeated = 0
    for epoch in range(EPOCHS):
        seen = Counter(map(stream.row_start, rows[epoch * per_epoch : (epoch + 1) * per_epoch]))
        repeated += sum(seen.values()) - len(seen)
        missing += per_epoch - len(seen)
    if rows != list(range(EPOCHS * per_epoch)):
        missing, repeated = max(1, missing), max(1, repeated)
    return missing, repeated


def first_share(plan: BatchPlan, step: int, _rank: int, size: int) -> range:
    """A mutant: each process computes what the first one does."""
    return plan.share(step, 0, size)


def measure_rows(place: Place, counts: dict[str, Any], seed: int) -> Report:
    """R3. Raises ValueError if a window is missing or repeated, or the mutant is not caught."""
    ledgers = windows = caught = mutants = 0
    for shuffled in (None, 1000)[: counts["streams"]]:
        stream = TokenStream(place.shards, tokens_per_row=TOKENS_PER_ROW, seed=seed, shuffle_window=shuffled)
        for ramp in (1, 2):
            for at_once, processes in divisions(ROWS_PER_STEP // ramp):
                found = keep_ledger(stream, at_once, processes, ramp, BatchPlan.share)
                if found != (0, 0):
                    raise ValueError(f"{at_once} rows at once, {processes} processes: {found}")
                ledgers, windows = ledgers + 1, windows + EPOCHS * stream.rows_per_epoch
                if processes > 1:
                    mutants += 1
                    caught += keep_ledger(stream, at_once, processes, ramp, first_share) != (0, 0)
    if caught < mutants:
        raise ValueError(f"of {mutants} mutants {caught} were caught: the campaign proves nothing")
    return report(
        title="R3: every row once",
        rows=[
            ["pairs of micro-batch and number of processes, with and without a ramp", str(ledgers)],
            [f"windows of text over {EPOCHS} epochs of each", f"{windows:,}"],
            ["windows missing", "0"],
            ["windows repeated", "0"],
            ["in the order of one process", f"{ledgers}/{ledgers}"],
            ["control, a mutant that gives each process the first one's share", f"{caught}/{mutants}"],
        ],
        measured={},
        settings={"seed": seed},
    )


# ---------------------------------------------------------------- leaks


EVERY = 50


def note_memory(notes: Path, mutant: Before | None = None) -> None:
    """In the new process: every so many steps, its memory that is its own, and its open descriptors."""
    from overnight.run_directory import RunDirectory

    if mutant is not None:
        mutant()
    append = RunDirectory.append_metrics

    def append_and_note(self: RunDirectory, line: Any) -> None:
        append(self, line)
        if line["step"] % EVERY == 0:
            pages = Path("/proc/self/statm").read_text().split()
            own = (int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGE_SIZE")
            with notes.open("a") as file:
                file.write(json.dumps([line["step"], own, len(os.listdir("/proc/self/fd"))]) + "\n")

    replace("overnight.run_directory:RunDirectory.append_metrics", append_and_note)


def keep_a_little() -> None:
    """A mutant: 4 KB of each step stay, and the file of each save stays open."""
    from overnight.training.checkpoint.save import publish_checkpoint
    from overnight.training.step import train_step

    kept: list[object] = []

    def step_and_keep(*given: Any) -> Any:
        kept.append(os.urandom(4096))
        return train_step(*given)

    def keep_and_publish(snapshot: Any, building: Path, written: Any) -> None:
        publish_checkpoint(snapshot, building, written)
        kept.append(next(building.parent.glob("step-*/state.json")).open())

    replace("overnight.training.step:train_step", step_and_keep)
    replace("overnight.training.checkpoint.save:publish_checkpoint", keep_and_publish)


def watch_memory(place: Place, name: str, steps: int, mutant: Before | None = None) -> tuple[float, int]:
    """(bytes that a step adds, descriptors that are added), from the second third of a run to the last."""
    folder = place.new(
        name, steps=steps, save=steps // 200, evaluate=steps // 10, tokens_per_step=256, rows=8
    )
    notes = folder / "notes"
    finish(folder, functools.partial(note_memory, notes, mutant))
    lines = [json.loads(line) for line in notes.read_text().splitlines()]
    third = len(lines) // 3
    middle, last = lines[third : 2 * third], lines[2 * third : 3 * third]
    memory = [statistics.median(line[1] for line in part) for part in (middle, last)]
    descriptors = [max(line[2] for line in part) for part in (middle, last)]
    return (memory[1] - memory[0]) / (third * EVERY), descriptors[1] - descriptors[0]


def measure_leaks(place: Place, counts: dict[str, Any], seed: int) -> Report:
    """L1. Raises ValueError if a step adds a kilobyte, anything stays open, or the mutant is not caught."""
    steps = counts["steps"]
    added, opened = watch_memory(place, "watched", steps)
    if added > 1024 or opened > 0:
        raise ValueError(f"each step adds {added:.0f} bytes, and {opened} descriptors stay open")
    leaked, left = watch_memory(place, "mutant", counts["control_steps"], keep_a_little)
    if leaked < 1024 or left < 1:
        raise ValueError(f"the mutant adds {leaked:.0f} bytes and {left} descriptors: it was not caught")
    return report(
        title="L1: no leak",
        rows=[
            ["steps in one process", f"{steps:,}"],
            ["saves", "200"],
            ["bytes of its own memory that a step adds, last third against the second", f"{added:,.0f}"],
            ["open descriptors added", str(opened)],
            ["control, a mutant that keeps 4 KB of each step: bytes a step adds", f"{leaked:,.0f}"],
            ["control, and leaves a file of each save open: descriptors added", str(left)],
        ],
        measured={},
        settings={"seed": seed},
    )
