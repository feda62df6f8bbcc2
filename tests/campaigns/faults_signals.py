"""S1: commands are told to stop by signals, in each phase of their work and at random moments, and go on.

A phase is made a little longer, so that the signal falls into it: the trap says when it is there, and when it
is over.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import random
import re
import shutil
import signal
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from faults_crashes import newest_whole
from faults_kills import count_lines
from faults_stops import essence
from faults_trials import (
    DONE,
    INTERRUPTED,
    Before,
    Ended,
    Place,
    Trial,
    check_lines,
    finish,
    report,
    start,
)
from killed import digest
from mutants import original, replace
from report import Report

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
LONGER: dict[str, object] = {"steps": 40, "save": 4, "evaluate": 3}
LONGER_SECONDS = 0.1  # that one call of a phase takes more
THERE, OVER = "phase-is-there", "phase-is-over"
PREPARE = ("prepare", "../text", "--out", "out", "--tokenizer", "bpe-300", "--validation-fraction", "0.2")


def writes_checkpoint(descriptor: int) -> bool:
    """True of a file or folder below checkpoints/."""
    return "/checkpoints/" in os.readlink(f"/proc/self/fd/{descriptor}")


class Phase(NamedTuple):
    """What a command does at times: a function, and how often at least, but for the last time."""

    name: str
    function: str
    calls: int
    applies: Callable[..., bool] = lambda *_: True


PHASES = (
    Phase("starting", "overnight.run.setup:build_run", 1),
    Phase("training", "overnight.training.step:train_step", 38),
    Phase("evaluating", "overnight.run.log:RunLog.evaluate", 13),
    Phase("sampling", "overnight.run.log:RunLog.sample", 9),
    Phase("saving", "os:fsync", 45, writes_checkpoint),
)
PREPARATION = (
    Phase("preparing", "overnight.preparation.prepare:_plan_work", 1),
    Phase("preparing", "overnight.preparation.tokenize:save_tokenizer", 1),
    Phase("preparing", "overnight.preparation.prepare:_tokenize_until_enough", 1),
    Phase("preparing", "overnight.preparation.assemble:decide_layout", 1),
    Phase("preparing", "overnight.preparation.assemble:write_shards", 1),
    Phase("preparing", "overnight.preparation.prepare:finish", 1),
)


def make_longer(phase: Phase, call: int, mutant: Before | None = None) -> None:
    """In the process of the command: that call of the phase's function takes longer, and says so."""
    if mutant is not None:
        mutant()
    real, calls = original(phase.function), itertools.count(1)

    def take_longer(*given: Any, **more: Any) -> Any:
        if not phase.applies(*given) or next(calls) != call:
            return real(*given, **more)
        Path(THERE).touch()
        time.sleep(LONGER_SECONDS / 2)
        done = real(*given, **more)
        time.sleep(LONGER_SECONDS / 2)
        Path(OVER).touch()
        return done

    take_longer.__name__ = real.__name__  # by which a preparation's steps are told apart
    replace(phase.function, take_longer)


class Stopped(NamedTuple):
    """What a signal did."""

    phase: str
    seconds: float
    """From the signal to the end of the process."""


Sent = tuple[Ended, Stopped] | None
Send = Callable[[Path, int], Sent]


def signal_in(
    folder: Path,
    phase: Phase,
    number: int,
    draw: random.Random,
    words: Sequence[str] | None = None,
    mutant: Before | None = None,
) -> Sent:
    """Send a signal within a phase; None if the phase was over before it was sent."""
    for name in (THERE, OVER):
        (folder / name).unlink(missing_ok=True)
    trial = start(folder, functools.partial(make_longer, phase, draw.randint(1, phase.calls), mutant), words)
    while not (folder / THERE).exists():
        if trial.wait(0.002):
            raise ValueError(f"the command never was {phase.name}: {trial.ended().said[-1000:]}")
    time.sleep(draw.uniform(0, LONGER_SECONDS))
    return end_by(trial, number, phase.name, folder / OVER)


def end_by(trial: Trial, number: int, phase: str, over: Path | None = None) -> Sent:
    """Send the signal and wait for the end; None if the phase was over."""
    sent_at = time.monotonic()
    trial.send(number)
    is_late = over is not None and over.exists()
    ended = trial.ended()
    return None if is_late else (ended, Stopped(phase, time.monotonic() - sent_at))


def signal_at(folder: Path, moment: float, number: int) -> Sent:
    """Send a signal after so many seconds; None if the run was done before."""
    trial = start(folder)
    if trial.wait(moment):
        trial.ended()
        return None
    trial.wait_until_begun()
    return end_by(trial, number, find_phase(folder))


def is_stopped(folder: Path, number: int, ended: Ended, stopped: Stopped) -> bool:
    """True if a run has stopped as promised: the step saved, status 130. False if it was done before.

    Before training there is nothing to save, and the signal ends the process. Raises ValueError otherwise.
    """
    told = re.search(r"stopped and saved after step (\d+)", ended.said)
    if told and ended.status == INTERRUPTED and "next: overnight train --resume" in ended.said:
        step = int(told.group(1))
        if len(check_lines(folder)) != step or (newest_whole(folder) != step):
            raise ValueError(f"step {step} was not saved: {ended.said[-500:]}")
        return True
    is_over = "trained runs/small" in ended.said or newest_whole(folder) == LONGER["steps"]
    if ended.status == DONE or is_over:
        return False
    if stopped.phase == "starting" and is_ended_at_once(number, ended):
        return True
    raise ValueError(f"signal {number} while {stopped.phase}: status {ended.status}: {ended.said[-1500:]}")


def is_ended_at_once(number: int, ended: Ended) -> bool:
    """True of what has no state to save: SIGINT is told, the others end it as they end any process."""
    is_told = ended.status == INTERRUPTED and "overnight: interrupted" in ended.said
    return (is_told or ended.status == -number) and "Traceback" not in ended.said


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


def stop_runs(place: Place, peace: Path, most: int, draw: random.Random, send: Send) -> list[Stopped]:
    """So many runs, each stopped by a signal, and gone on with. Raises ValueError if one ends otherwise."""
    expected, stops = essence(peace), list[Stopped]()
    for _ in range(100 * most):
        if len(stops) == most:
            break
        folder, number = place.new("signalled", **LONGER), draw.choice(SIGNALS)
        sent = send(folder, number)
        if sent is not None and is_stopped(folder, number, *sent):
            stops.append(sent[1])
        finish(folder)
        if essence(folder) != expected:
            raise ValueError(f"after signal {number} the run goes on otherwise: {sent}")
        shutil.rmtree(folder)
    return stops


def stop_preparations(place: Place, most: int, draw: random.Random) -> list[Stopped]:
    """So many preparations. Raises ValueError if one leaves a folder that is not whole, or ends otherwise."""
    peace = place.new("prepared-in-peace")
    if start(peace, None, PREPARE).ended().status != DONE:
        raise ValueError("a preparation undisturbed failed")
    expected, stops = digest(peace / "out"), list[Stopped]()
    folder = place.new("prepared")
    for attempt in range(100 * most):
        if len(stops) == most:
            break
        phase, number = PREPARATION[attempt % len(PREPARATION)], draw.choice(SIGNALS)
        sent = signal_in(folder, phase, number, draw, PREPARE)
        if sent is not None and sent[0].status != DONE:
            if not is_ended_at_once(number, sent[0]) or (folder / "out").exists():
                raise ValueError(f"signal {number} in {phase.function}: {sent[0]}")
            stops.append(sent[1])
        again = start(folder, None, PREPARE).ended()
        if again.status != DONE or digest(folder / "out") != expected:
            raise ValueError(f"after signal {number} in {phase.function}: {again}")
        shutil.rmtree(folder / "out")
    return stops


def slow_step() -> None:
    """Each step takes a quarter of an hour."""
    target = "overnight.training.step:train_step"
    step = original(target)

    def wait_and_step(*given: Any) -> Any:
        Path("in-step").touch()
        time.sleep(900)
        return step(*given)

    replace(target, wait_and_step)


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

    replace("overnight.run.train:StopConditions.__enter__", lambda stop: stop)
    replace("overnight.run.train:StopConditions.__exit__", lambda *_: None)


def catch_deaf(folder: Path) -> None:
    """Raises ValueError if the mutant stops as promised."""
    trial = start(folder, deaf)
    while count_lines(folder) < 5:
        time.sleep(0.001)
    trial.send(signal.SIGTERM)
    if trial.ended().status == INTERRUPTED:
        raise ValueError("the mutant without handlers was not caught: the campaign proves nothing")


def impatient() -> None:
    """A mutant: a signal ends what is being done, and does not wait for the step."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def stop_at_once(stop: Any) -> Any:
        for number in SIGNALS:
            signal.signal(number, interrupt)
        return stop

    replace("overnight.run.train:StopConditions.__enter__", stop_at_once)
    replace("overnight.run.train:StopConditions.__exit__", lambda *_: None)


def catch_impatient(folder: Path, draw: random.Random) -> None:
    """Raises ValueError if the mutant stops as promised in the middle of a save."""
    sent = None
    while sent is None:
        shutil.rmtree(folder / "runs", ignore_errors=True)
        sent = signal_in(folder, PHASES[-1], signal.SIGTERM, draw, mutant=impatient)
    try:
        is_stopped(folder, signal.SIGTERM, *sent)
    except ValueError:
        return
    raise ValueError("the mutant that does not wait was not caught: the campaign proves nothing")


def measure_signals(place: Place, counts: dict[str, Any], seed: int) -> Report:
    """S1. Raises ValueError if a command does not stop as promised, or goes on otherwise."""
    draw, stops, peace = random.Random(seed), list[Stopped](), place.new("in-peace", **LONGER)
    begun_at = time.monotonic()
    finish(peace)
    seconds = time.monotonic() - begun_at
    for phase in PHASES[-counts["phases"] :]:
        stops += stop_runs(
            place,
            peace,
            counts["of_each_phase"],
            draw,
            lambda folder, number, phase=phase: signal_in(folder, phase, number, draw),
        )
    stops += stop_preparations(place, counts["of_each_phase"], draw)
    scattered = stop_runs(
        place,
        peace,
        counts["signals"],
        draw,
        lambda folder, number: signal_at(folder, draw.uniform(0.02, seconds), number),
    )
    seconds_twice = [signal_twice(place.new(f"twice-{n}", **LONGER)) for n in range(counts["twice"])]
    catch_deaf(place.new("deaf", **LONGER))
    catch_impatient(place.new("impatient", **LONGER), draw)
    waits = sorted(stop.seconds for stop in [*stops, *scattered])
    aimed = Counter(stop.phase for stop in stops)
    total, twice = len(waits), len(seconds_twice)
    return report(
        title="S1: told to stop",
        rows=[
            ["SIGINT, SIGTERM or SIGUSR1", str(total)],
            *[[f"aimed at the run while {phase}", str(count)] for phase, count in aimed.items()],
            ["at a random moment of a run", str(len(scattered))],
            ["stopped as promised, and resumed to the same bits", f"{total}/{total}"],
            ["seconds from the signal to the end: median", f"{statistics.median(waits):.2f}"],
            ["99th percentile", f"{waits[min(total - 1, int(0.99 * total))]:.2f}"],
            ["a second signal in the middle of a step of 15 minutes: ended", f"{twice}/{twice}"],
            ["seconds until then: the longest", f"{max(seconds_twice):.2f}"],
            ["control, a mutant that does not listen: noticed", "1/1"],
            ["control, a mutant that does not wait for the step, in a save: noticed", "1/1"],
        ],
        measured={"stops": [stop._asdict() for stop in [*stops, *scattered]], "twice": seconds_twice},
        notes=[
            f"What a signal is aimed at is made {LONGER_SECONDS:g} s longer. While starting and preparing it "
            "ends the command at once; in all other phases the step is saved, and the status is 130."
        ],
        settings={"seed": seed},
    )
