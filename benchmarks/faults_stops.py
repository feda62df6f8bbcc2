"""R1, S1: runs are told to stop, at random steps and at random moments, and go on to the same bits."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import re
import shutil
import signal
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from faults_crashes import newest_whole
from faults_kills import count_lines, forget_moments
from faults_trials import (
    DONE,
    INTERRUPTED,
    Before,
    Place,
    check_lines,
    finish,
    record,
    report,
    start,
    train,
)
from measure import Report

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
STEPS_AT_MOST = 6


def stop_after_lines(lines: int, mutant: Before | None = None) -> None:
    """In the new process: it gets SIGTERM when it has written so many lines of metrics."""
    from overnight.run_directory import RunDirectory

    if mutant is not None:
        mutant()
    append, left = RunDirectory.append_metrics, [lines]

    def append_and_stop(self: RunDirectory, line: Any) -> None:
        append(self, line)
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGTERM)

    RunDirectory.append_metrics = append_and_stop  # type: ignore[method-assign]


def same_noise_each_time() -> None:
    """A mutant: dropout draws from torch's own generator, whose state nobody saves."""
    import torch

    from overnight import trainer

    torch.manual_seed(1)
    trainer._seed_dropout = lambda *_: None


def draw_settings(draw: random.Random) -> dict[str, object]:
    """A recipe: dropout or none, micro-batches of any size, a few epochs of a few shards."""
    rows = draw.choice([24, 48])
    return {
        "steps": draw.randrange(8, 17),
        "dropout": draw.choice([0.0, 0.1, 0.3]),
        "tokens_per_step": 32 * rows,
        "rows": draw.choice([size for size in (4, 6, 8, 12, 24) if rows % size == 0]),
        "evaluate": draw.randrange(2, 6),
        "save": draw.randrange(2, 9),
    }


def essence(folder: Path) -> dict[str, Any]:
    """The record, of the checkpoints the newest only: a stop saves more of them than the recipe asks for."""
    found = record(folder)
    newest = max(name.partition("/")[0] for name in found["checkpoints"])
    kept = {name: digest for name, digest in found["checkpoints"].items() if name.startswith(newest)}
    return found | {"checkpoints": kept}


def stop_and_go_on(folder: Path, draw: random.Random, mutant: Before | None = None) -> int:
    """Stop after a few steps, again and again; returns how often. Raises ValueError if there is no end."""
    for stops in range(100):
        ended = train(folder, functools.partial(stop_after_lines, draw.randint(1, STEPS_AT_MOST), mutant))
        if ended.status == DONE:
            return stops
        if ended.status != INTERRUPTED or "stopped and saved after step" not in ended.said:
            raise ValueError(f"{folder}: status {ended.status}: {ended.said[-1000:]}")
    raise ValueError(f"{folder} does not come to its end")


def measure_stops(place: Place, counts: dict[str, Any], seed: int) -> Report:
    """R1. Raises ValueError if a run differs, or a mutant is not caught."""
    draw, stops, schedules = random.Random(seed), [], counts["schedules"]
    recipes = -(-schedules // counts["of_each"])
    for number in range(schedules):
        if number % counts["of_each"] == 0:
            settings = draw_settings(draw)
            peace = place.new(f"peace-{number}", **settings)
            finish(peace)
            expected = essence(peace)
        folder = place.new(f"stopped-{number}", **settings)
        stops.append(stop_and_go_on(folder, draw))
        found = essence(folder)
        if found != expected:
            parts = [part for part in found if found[part] != expected[part]]
            raise ValueError(f"schedule {number} of {settings}: {', '.join(parts)} differ")
        shutil.rmtree(folder)
    controls = [
        [f"control, a mutant that {words}: noticed", catch_stopped(place, mutant, seed)]
        for mutant, words in (
            (forget_moments, "forgets the moments"),
            (same_noise_each_time, "leaves dropout to torch's generator"),
        )
    ]
    return report(
        title="R1: stopped and resumed, to the bit",
        rows=[
            ["recipes drawn: dropout, accumulation, epochs, shards", str(recipes)],
            ["schedules of stops", str(schedules)],
            ["stops in all", str(sum(stops))],
            ["the same weights, moments, metrics and events, to the bit", f"{schedules}/{schedules}"],
            *controls,
        ],
        measured={"stops": stops},
        settings={"seed": seed},
    )


def catch_stopped(place: Place, mutant: Before, seed: int) -> str:
    """A mutant must end otherwise when it is stopped than in peace. Raises ValueError if it does not."""
    name, settings = mutant.__name__, {"steps": 9, "dropout": 0.1}  # type: ignore[attr-defined]
    whole = place.new(f"{name}-whole", **settings)
    finish(whole, mutant)
    stopped = place.new(f"{name}-stopped", **settings)
    stop_and_go_on(stopped, random.Random(seed), mutant)
    if essence(stopped) == essence(whole):
        raise ValueError(f"the mutant {name} was not caught: the campaign proves nothing")
    return "1/1"


# ---------------------------------------------------------------- signals


LONGER: dict[str, object] = {"steps": 60, "save": 4, "evaluate": 3}


class Stopped(NamedTuple):
    """What a signal did."""

    phase: str
    seconds: float
    """From the signal to the end of the process."""


def signal_once(folder: Path, number: int, moment: float, before: Before | None = None) -> Stopped | None:
    """Send a signal after so many seconds; None if the run was done before.

    Raises ValueError if it did not stop as promised: the step saved, status 130; before training there is
    nothing to save, and the signal ends the process.
    """
    trial = start(folder, before)
    if trial.wait(moment):
        trial.ended()
        return None
    while not trial.said.exists() and not trial.wait(0.001):
        pass  # the process is not the command's yet
    phase = find_phase(folder)
    sent_at = time.monotonic()
    trial.send(number)
    ended = trial.ended()
    seconds = time.monotonic() - sent_at
    told = re.search(r"stopped and saved after step (\d+)", ended.said)
    if told and ended.status == INTERRUPTED and "next: overnight train --resume" in ended.said:
        step = int(told.group(1))
        if len(check_lines(folder)) != step or (newest_whole(folder) != step):
            raise ValueError(f"step {step} was not saved: {ended.said[-500:]}")
        return Stopped(phase, seconds)
    if ended.status == DONE or "trained runs/small" in ended.said:
        return None
    if phase == "starting" and ended.status in {INTERRUPTED, -number} and "Traceback" not in ended.said:
        return Stopped(phase, seconds)
    raise ValueError(f"signal {number} while {phase}: status {ended.status}: {ended.said[-1500:]}")


def find_phase(folder: Path) -> str:
    """What a run is doing, as its files tell."""
    from overnight.run_directory import RunDirectory

    directory = RunDirectory(folder / "runs/small")
    if any(directory.checkpoints.glob(".building-*")):
        return "saving"
    with contextlib.suppress(ValueError):
        if directory.read_metrics():
            return "training"
    return "starting"


def slow_step() -> None:
    """Each step takes a quarter of an hour."""
    from overnight import trainer

    step = trainer.train_step

    def wait_and_step(*given: Any) -> Any:
        Path("in-step").touch()
        time.sleep(900)
        return step(*given)

    trainer.train_step = wait_and_step


def signal_twice(folder: Path) -> float:
    """Seconds from the second signal, in the middle of a step, to the end. Raises ValueError if it waits."""
    trial = start(folder, slow_step)
    while not (folder / "in-step").exists():
        time.sleep(0.005)
    trial.send(signal.SIGTERM)
    time.sleep(0.1)
    if trial.wait(0):
        raise ValueError("the first signal did not wait for the step")
    sent_at = time.monotonic()
    trial.send(signal.SIGTERM)
    ended = trial.ended()
    if ended.status != INTERRUPTED:
        raise ValueError(f"a second signal: status {ended.status}: {ended.said[-500:]}")
    return time.monotonic() - sent_at


def deaf() -> None:
    """A mutant: nobody has told the system what to do about signals."""
    from overnight.stages import pretrain

    @contextlib.contextmanager
    def ignore() -> Iterator[Any]:
        yield lambda: False

    pretrain.stop_on_signal = ignore


def catch_deaf(folder: Path) -> None:
    """Raises ValueError if the mutant stops as promised."""
    trial = start(folder, deaf)
    while count_lines(folder) < 5:
        time.sleep(0.001)
    trial.send(signal.SIGTERM)
    if trial.ended().status == INTERRUPTED:
        raise ValueError("the mutant without handlers was not caught: the campaign proves nothing")


def measure_signals(place: Place, counts: dict[str, Any], seed: int) -> Report:
    """S1. Raises ValueError if a run does not stop as promised, or goes on otherwise."""
    draw, peace = random.Random(seed), place.new("peace", **LONGER)
    begun_at = time.monotonic()
    finish(peace)
    seconds, expected = time.monotonic() - begun_at, essence(peace)
    stops: list[Stopped] = []
    for number in range(100 * counts["signals"]):
        folder = place.new(f"signal-{number}", **LONGER)
        stopped = signal_once(folder, draw.choice(SIGNALS), draw.uniform(0.02, seconds))
        finish(folder)
        if essence(folder) != expected:
            raise ValueError(f"signal {number}: the run goes on otherwise")
        shutil.rmtree(folder)
        stops += [stopped] if stopped else []
        if len(stops) == counts["signals"]:
            break
    seconds_twice = [signal_twice(place.new(f"twice-{n}", **LONGER)) for n in range(counts["twice"])]
    catch_deaf(place.new("deaf", **LONGER))
    phases, waits = Counter(stop.phase for stop in stops), sorted(stop.seconds for stop in stops)
    total = len(stops)
    return report(
        title="S1: told to stop",
        rows=[
            ["SIGINT, SIGTERM or SIGUSR1 at a random moment", str(total)],
            *[[f"of them while {phase}", str(count)] for phase, count in sorted(phases.items())],
            ["stopped as promised, and went on to the same bits", f"{total}/{total}"],
            ["seconds from the signal to the end: median", f"{statistics.median(waits):.2f}"],
            ["99th percentile", f"{waits[min(total - 1, int(0.99 * total))]:.2f}"],
            [
                "a second signal in the middle of a step of 15 minutes: ended",
                f"{len(seconds_twice)}/{len(seconds_twice)}",
            ],
            ["seconds until then: the longest", f"{max(seconds_twice):.2f}"],
            ["control, a mutant that does not listen: noticed", "1/1"],
        ],
        measured={"stops": [stop._asdict() for stop in stops], "twice": seconds_twice},
        settings={"seed": seed},
    )
