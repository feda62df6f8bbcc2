"""C7: a thread saves while training goes on, and writes what was copied, whatever happens meanwhile."""

from __future__ import annotations

import functools
import random
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults_crashes import Course, crashes, errors, spread_out, strike_all
from faults_disk import install, list_changes
from faults_stops import draw_settings
from faults_trials import Before, Place, find_difference, finish, record, report
from mutants import original, replace
from overnight.run_directory import RunDirectory
from overnight.training.state import TensorShard
from report import Report

SLOW_SECONDS = 0.01  # of each write and each fsync: a step takes half of that


def slow_disk(notes: Path | None = None, mutant: Before | None = None) -> None:
    """In the new process: threads that save wait at each write; steps done meanwhile are noted."""
    from overnight.distributed.launcher import DAEMON

    if mutant is not None:
        mutant()

    def slowly(function: Callable[..., Any]) -> Callable[..., Any]:
        def wait_and_do(*given: Any, **named: Any) -> Any:
            if threading.current_thread().name == DAEMON:
                time.sleep(SLOW_SECONDS)
            return function(*given, **named)

        return wait_and_do

    for target in ("overnight.training.checkpoint.format:save_file", "overnight.run_directory:flush_to_disk"):
        replace(target, slowly(original(target)))
    append = RunDirectory.append_metrics

    def append_and_note(self: RunDirectory, line: Any) -> None:
        append(self, line)
        if notes is not None and any(self.checkpoints.glob(".building-*")):
            with notes.open("a") as file:
                file.write(f"{line['step']}\n")

    replace("overnight.run_directory:RunDirectory.append_metrics", append_and_note)


def train_on(place: Place, name: str, settings: dict[str, object], mutant: Before | None = None) -> int:
    """Steps done while a checkpoint was written. Raises ValueError if the files are not the foreground's."""
    peace = place.new(f"{name}-foreground", **settings, background="false")
    finish(peace)
    folder = place.new(f"{name}-background", **settings)
    finish(folder, functools.partial(slow_disk, folder / "meanwhile", mutant))
    wrong = find_difference(folder, record(peace))
    steps = len((folder / "meanwhile").read_text().split()) if (folder / "meanwhile").exists() else 0
    for path in (peace, folder):
        shutil.rmtree(path)
    if wrong:
        raise ValueError(f"{name}, {settings}: saved by a thread, {wrong}")
    return steps


def watch_thread(place: Place) -> Course:
    """A run whose checkpoints a thread writes to a slow disk: about in this order."""
    folder = place.new("watched")
    finish(folder, functools.partial(listen, folder / "changes"))
    return Course("run", None, list_changes(folder / "changes"), record(folder), background="true")


def listen(log: Path) -> None:
    """In the new process: write down each change."""
    install(None, log)
    slow_disk()


def view(tensors: Any, length: int) -> dict[str, TensorShard]:
    """In place of the copy: the tensors themselves, of a single process."""
    return {name: TensorShard(tensor[:length], 0) for name, tensor in tensors.items()}


def aliases() -> None:
    """A mutant: what is saved is not copied, and changes while it is written."""
    replace("overnight.training.checkpoint.save:_copy", view)


def does_not_wait() -> None:
    """A mutant: the run ends, whether its last checkpoint is there or not."""
    replace("overnight.training.checkpoint.save:Saver.wait", lambda _: None)
    replace("overnight.training.checkpoint.save:Saver.abandon", lambda _: None)


def notice(place: Place, mutant: Before) -> str:
    """Raises ValueError if a mutant's files are the foreground's."""
    try:
        train_on(place, mutant.__name__, {"steps": 12}, mutant)  # type: ignore[attr-defined]
    except ValueError:
        return "1/1"
    raise ValueError(f"the mutant {mutant} was not caught: the campaign proves nothing")


def measure_background(place: Place, counts: dict[str, Any], seed: int) -> Report:
    """C7. Raises ValueError if a checkpoint is not what was copied, or is lost, or a mutant is not caught."""
    draw, steps = random.Random(seed), 0
    for number in range(counts["changed"]):
        steps += train_on(place, f"changed-{number}", draw_settings(draw))
    if not steps:
        raise ValueError("no step was done while a thread saved: the campaign proves nothing")
    course = watch_thread(place)
    struck = functools.partial(strike_all, place, course, before=slow_disk)
    by_thread = {number for number, change in enumerate(course.changes, 1) if "checkpoints/" in change}
    rows = [
        ["runs with random recipes, saved by a thread to a slow disk", str(counts["changed"])],
        ["steps that changed the weights during a save", f"{steps:,}"],
        ["every file equal to that of a run that waits", f"{counts['changed']}/{counts['changed']}"],
    ]
    for kind, words in (
        ("kill", "killed at a change of the disk during a save: nothing lost"),
        ("power", "power cut there: nothing lost"),
    ):
        faults = [fault for fault in crashes(course, kind) if fault.at in by_thread]
        rows.append([words, struck(spread_out(faults, counts["killed"]))])
    failing = [fault for fault in errors(course, "EIO", lasting=False) if fault.at in by_thread]
    rows.append(
        [
            "an I/O error in the thread: reported, nothing lost",
            struck(spread_out(failing, counts["failed"])),
        ]
    )
    return report(
        title="C7: saved while training goes on",
        rows=[
            *rows,
            ["control, a mutant that does not copy: noticed", notice(place, aliases)],
            ["control, a mutant that does not wait at the end: noticed", notice(place, does_not_wait)],
        ],
        measured={"steps": steps},
        settings={"seed": seed},
    )
