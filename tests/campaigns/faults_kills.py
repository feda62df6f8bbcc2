"""C2, R9, C9: runs are killed at random moments, and started many times at once."""

from __future__ import annotations

import contextlib
import functools
import random
import shutil
import time
from pathlib import Path
from typing import Any

from faults_crashes import newest_whole
from faults_trials import (
    DONE,
    INTERRUPTED,
    KILLED,
    RUN,
    SECONDS_AT_MOST,
    WRONG_USE,
    Before,
    Place,
    Trial,
    check_lines,
    find_difference,
    finish,
    record,
    report,
    start,
)
from mutants import original, replace
from report import Report

LONGER: dict[str, object] = {"steps": 90, "save": 9, "evaluate": 15}
ENDLESS: dict[str, object] = {"steps": 10**6, "save": 50, "evaluate": 10**6}
REFUSALS = ("is being trained by ", "already holds a run")


def forget_moments() -> None:
    """A mutant: it goes on with fresh moments, as many scripts do."""
    target = "overnight.training.checkpoint.load:restore"
    restore = original(target)

    def restore_weights(state: Any, opened: Any) -> None:
        restore(state, opened)
        state.optimizer.state.clear()

    replace(target, restore_weights)


def never_rewind() -> None:
    """A mutant: the lines of steps that are done again stay where they are."""
    replace("overnight.run_directory:RunDirectory.rewind", lambda *_: None)


def kill_once(folder: Path, moment: float, before: Before | None) -> str | None:
    """Start, and kill after so many seconds: where it stood, or None if it was done before.

    Raises ValueError if a line or a checkpoint is not as it should be then.
    """
    had = newest_whole(folder)
    trial = start(folder, before)
    if trial.wait(moment):
        ended = trial.ended()
        if ended.status != DONE:
            raise ValueError(f"status {ended.status}: {ended.said[-1000:]}")
        return None
    trial.process.kill()
    if trial.ended().status != KILLED:
        return None
    lines = len(check_lines(folder))
    if newest_whole(folder) < had:
        raise ValueError(f"checkpoint {had} is lost")
    is_saving = any((folder / RUN / "checkpoints").glob(".building-*"))
    return "saving" if is_saving else "training" if lines else "starting"


def kill_to_the_end(
    folder: Path, most: int, draw: random.Random, seconds: float, before: Before | None = None
) -> list[str]:
    """Kill a run at most so many times, until it is done; where it stood each time."""
    stood: list[str] = []
    while len(stood) < most:
        where = kill_once(folder, draw.uniform(0, seconds), before)
        if where is None:
            return stood
        stood.append(where)
    finish(folder, before)
    return stood


def measure_kills(place: Place, counts: dict[str, Any], seed: int) -> Report:
    """C2 and R9. Raises ValueError if a run is lost or differs, or if a mutant is not caught."""
    draw, peace = random.Random(seed), place.new("peace", **LONGER)
    begun_at = time.monotonic()
    finish(peace)
    seconds = 0.7 * (time.monotonic() - begun_at)
    expected, stood, runs = record(peace), list[str](), 0
    while len(stood) < counts["kills"]:
        folder = place.new(f"killed-{runs}", **LONGER)
        stood += kill_to_the_end(folder, counts["kills"] - len(stood), draw, seconds)
        if wrong := find_difference(folder, expected):
            raise ValueError(f"run {runs}, after {len(stood)} kills: {wrong}")
        shutil.rmtree(folder)
        runs += 1
    controls = [
        [f"control, a mutant that {words}: noticed", catch_killed(place, mutant, expected, seed)]
        for mutant, words in (
            (forget_moments, "loses the moments"),
            (never_rewind, "does not remove lines"),
        )
    ]
    where = [[f"of them while {name}", str(stood.count(name))] for name in ("starting", "training", "saving")]
    return report(
        title="C2, R9: kill -9 at random moments",
        rows=[
            ["kills", str(len(stood))],
            *where,
            ["runs, each killed and given its command again until it was done", str(runs)],
            ["runs lost", "0"],
            ["ended in the same bits: weights, moments, metrics, events", f"{runs}/{runs}"],
            [
                "metrics with one line for each step, after each kill and at the end",
                f"{len(stood) + runs}/{len(stood) + runs}",
            ],
            *controls,
        ],
        measured={"stood": stood},
        settings={"seed": seed, "steps": LONGER["steps"]},
    )


def catch_killed(place: Place, mutant: Before, expected: dict[str, Any], seed: int) -> str:
    """A mutant, killed between two checkpoints, must end otherwise. Raises ValueError if it does not."""
    folder = place.new(f"mutant-{mutant.__name__}-{seed}", **LONGER)  # type: ignore[attr-defined]
    trial = start(folder, mutant)
    while count_lines(folder) < 31:
        time.sleep(0.001)
    trial.process.kill()
    trial.ended()
    with contextlib.suppress(ValueError):
        finish(folder, mutant)
    if find_difference(folder, expected) is None:
        raise ValueError(f"the mutant {mutant} was not caught: the campaign proves nothing")
    return "1/1"


def count_lines(folder: Path) -> int:
    """Of the metrics, so far."""
    path = folder / RUN / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


# ---------------------------------------------------------------- one owner


def wait_at(gate: Path, mutant: Before | None = None) -> None:
    """In a new process: stand ready until the gate is open."""
    import overnight.run.command  # noqa: F401 - what would be loaded behind the gate

    if mutant is not None:
        mutant()
    while not gate.exists():
        time.sleep(0.001)


def unlocked() -> None:
    """A mutant: nobody asks whether another trains here."""
    replace("overnight.run_directory:RunDirectory.locked", lambda _: contextlib.nullcontext())
    replace("overnight.run.resume:check_directory", lambda *_, **__: None)


def race(folder: Path, count: int) -> list[Trial]:
    """So many commands at once; those that are still there when the others were refused.

    Raises ValueError if one ends otherwise.
    """
    words = ["train", "small.toml"]
    gate = folder / "gate"
    trials = [start(folder, functools.partial(wait_at, gate), words) for _ in range(count)]
    gate.touch()
    patience = time.monotonic() + SECONDS_AT_MOST
    while time.monotonic() < patience and sum(not each.wait(0) for each in trials) > 1:
        time.sleep(0.05)
    owners = [each for each in trials if not each.wait(0)]
    for trial in trials:
        if trial in owners:
            continue
        ended = trial.ended()
        if ended.status != WRONG_USE or not any(refusal in ended.said for refusal in REFUSALS):
            raise ValueError(f"refused with status {ended.status}: {ended.said[-1000:]}")
    return owners


def go_on_after_kill(folder: Path) -> bool:
    """True if a run whose owner was just killed goes on at once, and stops when it is told to."""
    fewest = count_lines(folder)  # they become fewer once, when the run takes back what is done again
    trial = start(folder)
    while not trial.wait(0.01) and count_lines(folder) <= fewest:
        fewest = min(fewest, count_lines(folder))
    trial.send(15)
    return trial.ended().status == INTERRUPTED


def measure_starts(place: Place, counts: dict[str, Any], seed: int) -> Report:
    """C9. Raises ValueError if a run has two owners or none, or a lock outlives its owner."""
    rounds, starts = counts["rounds"], counts["starts"]
    for number in range(rounds):
        folder = place.new(f"round-{number}", **ENDLESS)
        owners = race(folder, starts)
        if len(owners) != 1:
            raise ValueError(f"round {number}: {len(owners)} owners")
        owners[0].process.kill()
        owners[0].ended()
        if not go_on_after_kill(folder):
            raise ValueError(f"round {number}: the run does not go on after its owner was killed")
        shutil.rmtree(folder)
    mutants = race_of_mutants(place, min(starts, 8))
    return report(
        title="C9: one trainer for each run directory",
        rows=[
            [f"rounds of {starts} commands at once", str(rounds)],
            ["exactly one trained", f"{rounds}/{rounds}"],
            ["others refused with a sentence", f"{rounds * (starts - 1)}/{rounds * (starts - 1)}"],
            ["continued at once after kill -9 of the owner: no stale lock", f"{rounds}/{rounds}"],
            ["control, a mutant without the lock: owners at once", f"{mutants} of {min(starts, 8)}"],
        ],
        measured={},
        settings={"seed": seed},
    )


def race_of_mutants(place: Place, count: int) -> int:
    """How many begin in the same folder if nobody asks, and end by each other's files or are killed.

    Raises ValueError if it is one.
    """
    folder = place.new("mutants", **ENDLESS)
    gate = folder / "gate"
    gate.touch()
    before = functools.partial(wait_at, gate, unlocked)
    trials = [start(folder, before, ["train", "small.toml"]) for _ in range(count)]
    time.sleep(2 + 0.5 * count)
    for trial in trials:
        if not trial.wait(0):
            trial.process.kill()
    owners = sum(trial.ended().status != WRONG_USE for trial in trials)
    if owners < 2:
        raise ValueError("without the lock there is one owner as well: the campaign proves nothing")
    return owners
