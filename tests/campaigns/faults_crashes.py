"""C1, C3: each change that a run makes of its folder fails once: kill, power cut, error of the disk."""

from __future__ import annotations

import functools
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from faults_disk import WRITES, Fault, in_place, install, list_changes, without_fsync
from faults_trials import (
    DONE,
    FAILED,
    RUN,
    Before,
    Place,
    find_difference,
    finish,
    record,
    report,
    start,
    train,
)
from mutants import original, replace
from overnight.training.checkpoint.format import list_checkpoints, read_step
from overnight.training.checkpoint.load import verify_checkpoint
from report import Report

DEAD = 137
PUBLISHED = "rename small/checkpoints/step-"


class Course(NamedTuple):
    """A command whose changes are known: from an empty folder, or from a run that was killed."""

    name: str
    begin: Path | None
    """The folder that is copied; None: a new run."""
    changes: list[str]
    record: dict[str, Any]
    """Of the run undisturbed."""
    background: str = "false"
    """Whether a thread saves: then the order of changes varies."""


def watch_courses(place: Place) -> list[Course]:
    """A whole run, and the second half of one that was killed between two checkpoints."""
    whole = place.new("watched", background="false")
    finish(whole, functools.partial(install, None, whole / "changes"))
    changes, expected = list_changes(whole / "changes"), record(whole)
    first = next(number for number, change in enumerate(changes, 1) if change.startswith(PUBLISHED))
    killed = place.new("killed", background="false")
    # Four lines behind the first checkpoint: an evaluation and a sample are to be taken back as well.
    train(killed, functools.partial(install, Fault(first + 6, "kill")))
    again = place.folder / "killed-watched"
    shutil.copytree(killed, again)
    finish(again, functools.partial(install, None, again / "changes"))
    return [
        Course("whole run", None, changes, expected),
        Course("resumed run", killed, list_changes(again / "changes"), expected),
    ]


def published_before(course: Course, fault: Fault, changes: list[str]) -> int:
    """The step of the newest checkpoint that must be there after these changes, the last of them struck."""
    step = 0 if course.begin is None else 3
    done = changes[: fault.at - 1]
    for number, change in enumerate(done):
        kept = "fsync small/checkpoints" in done[number:] or fault.kind != "power"
        if change.startswith(PUBLISHED) and kept:
            step = int(change.removeprefix(PUBLISHED))
    return step


def newest_whole(folder: Path) -> int:
    """The step of the newest checkpoint that is what was written; 0 if there is none."""
    for checkpoint in reversed(list_checkpoints(folder / RUN / "checkpoints")):
        try:
            verify_checkpoint(checkpoint)
        except ValueError:
            continue
        return read_step(checkpoint)
    return 0


def strike(place: Place, course: Course, fault: Fault, mutant: Before | None = None) -> str | None:
    """Let the fault happen, go on; what is wrong with it, if anything. A mutant does both."""
    name = f"{course.name}-{fault.kind}-{fault.at}-{fault.lasting}".replace(" ", "-")
    if course.begin is None:
        folder = place.new(name, background=course.background)
    else:
        folder = place.folder / name
        shutil.copytree(course.begin, folder)
    try:
        return _strike(folder, course, fault, mutant)
    finally:
        shutil.rmtree(folder)


def _strike(folder: Path, course: Course, fault: Fault, mutant: Before | None) -> str | None:
    before = functools.partial(set_trap, fault, mutant, folder / "struck")
    ended = train(folder, before)
    is_error = fault.kind.startswith("E")
    if ended.status != (FAILED if is_error else DEAD):
        return f"status {ended.status}: {ended.said[-500:]}"
    if is_error and not ended.is_a_sentence():
        return f"no sentence: {ended.said[-1500:]}"
    changes = list_changes(folder / "struck") if course.background == "true" else course.changes
    found, wanted = newest_whole(folder), published_before(course, fault, changes)
    if found < wanted:
        return f"checkpoint {wanted} was published, the newest whole one is {found}"
    again = start(folder, mutant).ended()
    if again.status != DONE:
        return f"can't go on: {again.said[-500:]}"
    return find_difference(folder, course.record)


def set_trap(fault: Fault, break_it: Before | None, log: Path) -> None:
    """In the process that is to fail."""
    install(fault, log)
    if break_it is not None:
        break_it()


def crashes(course: Course, kind: str) -> Iterator[Fault]:
    """A fault for each change; torn writes for writes only."""
    for number, change in enumerate(course.changes, start=1):
        if kind != "torn" or change.startswith("write"):
            yield Fault(number, kind)


def errors(course: Course, kind: str, *, lasting: bool) -> Iterator[Fault]:
    """An error for each change that may meet it: a full disk refuses what would take space."""
    for number, change in enumerate(course.changes, start=1):
        what, _, where = change.partition(" ")
        if where in {"", "small"} and what == "mkdir":
            continue  # made with their parents: what fails first is tried again
        if kind != "ENOSPC" or what in WRITES:
            yield Fault(number, kind, lasting)


def spread_out(faults: list[Fault], most: int | None) -> list[Fault]:
    """All, or so many of them at equal distances."""
    if most is None or len(faults) <= most:
        return faults
    return [faults[number * len(faults) // most] for number in range(most)]


def strike_all(place: Place, course: Course, faults: list[Fault], before: Before | None = None) -> str:
    """`k/k` if nothing is ever wrong. Raises ValueError otherwise."""
    for fault in faults:
        if wrong := strike(place, course, fault, before):
            raise ValueError(f"{course.name}, {course.changes[fault.at - 1]!r}, {fault}: {wrong}")
    return f"{len(faults)}/{len(faults)}"


def catch(place: Place, course: Course, faults: list[Fault], mutant: Before) -> str:
    """How many of these faults show that the mutant is broken. Raises ValueError if none does."""
    wrongs = [strike(place, course, fault, mutant) for fault in faults]
    caught = sum(wrong is not None for wrong in wrongs)
    if not caught:
        raise ValueError(f"the mutant {mutant} was not caught: the campaign proves nothing")
    return f"{caught}/{len(faults)}"


CRASHES = {
    "kill": "killed before it",
    "torn": "killed with half of the write done",
    "power": "power cut before it: what was not fsynced is lost",
}


def saves(course: Course) -> list[Fault]:
    """Kills within the second save of a course."""
    begin = next(
        number for number, change in enumerate(course.changes, 1) if "building-step-00000006" in change
    )
    return [Fault(number, "kill") for number in range(begin, begin + 24)]


def measure_crashes(place: Place, counts: dict[str, Any], seed: int) -> Report:
    """C1. Raises ValueError if a checkpoint is lost, or a run differs, or a mutant is not caught."""
    course, few = watch_courses(place)[counts["course"]], counts["controls"]
    kinds = Counter(change.partition(" ")[0] for change in course.changes)
    told = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    rows = [[f"changes of the disk in a {course.name}: {told}", str(len(course.changes))]]
    for kind, words in CRASHES.items():
        faults = spread_out(list(crashes(course, kind)), counts["crashes"])
        rows.append([words, strike_all(place, course, faults)])
    cuts = [Fault(at, "power") for at in range(len(course.changes) // 2, len(course.changes) + 1)]
    for mutant, faults, words in (
        (in_place, saves(course), "writes in place and does not verify: kills within a save noticed"),
        (without_fsync, cuts, "never calls fsync: power cuts noticed"),
    ):
        caught = catch(place, course, spread_out(faults, few), mutant)
        rows.append([f"control, a mutant that {words}", caught])
    return report(
        title=f"C1: a crash at any change of the disk in a {course.name}",
        rows=rows,
        measured={"changes": course.changes},
        notes=[
            "In each trial the newest published checkpoint is still there and whole, and the run, given its "
            "command again, ends in the same bits: weights, moments, metrics, events."
        ],
        settings={"seed": seed},
    )


def delete_first() -> None:
    """A mutant: room is made by deleting the old checkpoints before the new one is written."""
    target = "overnight.training.checkpoint.save:make_staging_folder"
    make_staging_folder = original(target)

    def make_room(step: int, folder: Path, world: Any) -> Path:
        for checkpoint in list_checkpoints(folder):
            shutil.rmtree(checkpoint)
        return make_staging_folder(step, folder, world)

    replace(target, make_room)


def limit_files(most: int) -> None:
    """The kernel refuses to let any file grow beyond so many bytes: EFBIG, from real system calls."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


def outgrow(place: Place, name: str, most: int, expected: dict[str, Any]) -> str | None:
    """A run whose files may not grow beyond a limit, then without it; what is wrong, if anything."""
    folder = place.new(name)
    ended = train(folder, functools.partial(limit_files, most))
    if ended.status != FAILED or not ended.is_a_sentence():
        return f"status {ended.status}: {ended.said[-1500:]}"
    again = train(folder)
    wrong = find_difference(folder, expected) if again.status == DONE else again.said[-500:]
    shutil.rmtree(folder)
    return wrong


def measure_errors(place: Place, counts: dict[str, Any], seed: int) -> Report:
    """C3. Raises ValueError if a checkpoint is lost, a command ends otherwise, or a mutant is not caught."""
    courses = watch_courses(place)
    rows = []
    for course, most in zip(courses, (counts["errors"], counts["resumed"]), strict=True):
        for kind, lasting, words in (
            ("ENOSPC", True, "the disk is full from this write on"),
            ("EIO", False, "this change fails with EIO"),
        ):
            faults = spread_out(list(errors(course, kind, lasting=lasting)), most)
            rows.append([f"{course.name}: {words}", strike_all(place, course, faults)])
    largest = max(
        path.stat().st_size for path in (place.folder / "watched" / RUN).rglob("*") if path.is_file()
    )
    limits = [100 + (largest - 200) * number // counts["limits"] for number in range(counts["limits"])]
    for number, limit in enumerate(limits):
        if wrong := outgrow(place, f"limit-{number}", limit, courses[0].record):
            raise ValueError(f"files of at most {limit} bytes: {wrong}")
    rows.append(
        ["RLIMIT_FSIZE, from 100 bytes to the largest file: real errors", f"{len(limits)}/{len(limits)}"]
    )
    in_saves = [Fault(fault.at, "EIO") for fault in saves(courses[0])]
    caught = catch(place, courses[0], spread_out(in_saves, counts["controls"]), delete_first)
    rows.append(
        ["control, a mutant that deletes the old checkpoint before it has saved: errors noticed", caught]
    )
    return report(
        title="C3: a full disk, an error of the disk",
        rows=rows,
        measured={},
        notes=[
            "In each trial the command ends with status 1 and one sentence, the newest published checkpoint "
            "is still there, and once the disk works again the run is resumed to the same bits."
        ],
        settings={"seed": seed},
    )
