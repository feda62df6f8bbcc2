"""D4-D6: shards are prepared by commands that are killed, that come eight at once, in odd surroundings."""

from __future__ import annotations

import contextlib
import functools
import random
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import faults_disk
from faults_corpus import LOCK, OUT, TEXTS, command, digest, find_wrong, make_corpus, small_units
from faults_disk import Fault, list_changes
from faults_surroundings import list_surroundings, shuffle_folders, vary
from faults_trials import DONE, KILLED, PROCESSES, Before, Place, Trial, report, start
from mutants import replace
from report import Report

DEAD = 137
READER_SECONDS = 5.0  # to end in, once all commands have
CRASHES = {
    "kill": "killed before it",
    "torn": "killed with half of the write done",
    "power": "power cut before it: what was not fsynced is lost",
}


class Case(NamedTuple):
    """A command, where its trials are made, and the sha256 of what it makes undisturbed."""

    place: Path
    words: Sequence[str]
    expected: str

    def new(self, name: str) -> Path:
        """An empty folder to type the command in."""
        folder = self.place / name
        folder.mkdir(parents=True)
        return folder

    def start(self, folder: Path, *before: Before) -> Trial:
        """The command, in small units; `before` is done first."""
        return start(folder, functools.partial(do_each, (small_units, *before)), self.words)

    def finish(self, folder: Path, *before: Before) -> str | None:
        """Give the command to its end; what is wrong with that, if anything."""
        ended = self.start(folder, *before).ended()
        if ended.status != DONE:
            return f"can't go on: {ended.said[-1000:]}"
        return find_wrong(folder / OUT, self.expected)


def do_each(works: Sequence[Before]) -> None:
    """One after the other."""
    for work in works:
        work()


def make_case(place: Place, seed: int) -> Case:
    """The corpus, and what it becomes undisturbed. Raises ValueError if the command fails."""
    folder = place.folder / "preparation"
    corpus = make_corpus(folder / TEXTS, seed)
    case = Case(folder, command(corpus), "")
    peace = case.new("peace")
    ended = case.start(peace).ended()
    if ended.status != DONE:
        raise ValueError(f"the command fails undisturbed: {ended.said[-2000:]}")
    return case._replace(expected=digest(peace / OUT))


# ---------------------------------------------------------------- D4: killed


def measure_seconds(case: Case) -> float:
    """How long the command takes undisturbed."""
    begun_at = time.monotonic()
    if wrong := case.finish(case.new("timed")):
        raise ValueError(wrong)
    return time.monotonic() - begun_at


def kill_at_random(case: Case, folder: Path, draw: random.Random, seconds: float, *before: Before) -> int:
    """Kill until the command has come to its end; how often it was killed.

    Raises ValueError if it ends otherwise, or if something stands under the folder's name too early.
    """
    kills = 0
    while not (trial := case.start(folder, *before)).wait(draw.uniform(0, seconds)):
        trial.process.kill()
        kills += trial.ended().status == KILLED
        if (folder / OUT).exists() and digest(folder / OUT) != case.expected:
            raise ValueError(f"after {kills} kills a folder has its name before it is whole")
    ended = trial.ended()
    wrong = ended.said[-1000:] if ended.status != DONE else find_wrong(folder / OUT, case.expected)
    if wrong:
        raise ValueError(f"after {kills} kills: {wrong}")
    return kills


def kill_often(case: Case, count: int, seed: int) -> list[list[str]]:
    """So many kills at random moments. Raises ValueError if a folder differs, or the mutant is not caught."""
    draw, seconds, kills, folders = random.Random(seed), measure_seconds(case), 0, 0
    while kills < count:
        kills += kill_at_random(case, case.new(f"killed-{folders}"), draw, seconds)
        shutil.rmtree(case.place / f"killed-{folders}")
        folders += 1
    return [
        ["D4: kills at random moments", str(kills)],
        [
            "folders completed by the same command again, each equal to the uninterrupted one",
            f"{folders}/{folders}",
        ],
        [
            "control, a mutant that fills the folder under its own name: noticed in its folder number",
            str(catch_in_place(case, draw, seconds)),
        ],
    ]


def catch_in_place(case: Case, draw: random.Random, seconds: float) -> int:
    """Which of the mutant's folders was the first found wrong. Raises ValueError if none of them is."""
    for number in range(1, 31):
        try:
            kill_at_random(case, case.new(f"in-place-{number}"), draw, seconds, write_in_place)
        except ValueError:
            return number
    raise ValueError("the mutant that fills the folder under its own name was not caught")


def watch_changes(fault: Fault | None, log: Path | None) -> None:
    """In a new process: what it changes below out/ is counted."""
    faults_disk.WHERE = f"/{OUT.parent}/"
    faults_disk.install(fault, log)


def strike(case: Case, fault: Fault, *mutant: Before) -> str | None:
    """Let the fault happen, and give the command again; what is wrong, if anything.

    Folders list what they hold in another order each time, since what is removed is removed in that order.
    """
    folder = case.new(f"{fault.kind}-{fault.at}")
    try:
        shuffle = functools.partial(shuffle_folders, fault.at)
        ended = case.start(folder, functools.partial(watch_changes, fault, None), shuffle, *mutant).ended()
        if ended.status != DEAD:
            return f"status {ended.status}: {ended.said[-1000:]}"
        if (folder / OUT).exists() and digest(folder / OUT) != case.expected:
            return "a folder has its name before it is whole"
        return case.finish(folder, *mutant)
    finally:
        shutil.rmtree(folder)


def kill_at_changes(case: Case, most: int | None, controls: int) -> list[list[str]]:
    """A trial for each change of the disk. Raises ValueError if one goes wrong or a mutant is not caught."""
    changes = log_changes(case, "watched")
    kinds = Counter(change.partition(" ")[0] for change in changes)
    told = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    rows = [[f"D4: changes of the disk: {told}", str(len(changes))]]
    for kind, words in CRASHES.items():
        places = [at for at, change in enumerate(changes, 1) if kind != "torn" or change.startswith("write")]
        places = spread_out(places, most)
        for at in places:
            if wrong := strike(case, Fault(at, kind)):
                raise ValueError(f"{kind} at change {at}, {changes[at - 1]!r}: {wrong}")
        rows.append([f"{words}: the same bytes in the end", f"{len(places)}/{len(places)}"])
    copied = log_changes(case, "copied", publish_by_copying)
    begin = next(at for at, change in enumerate(copied, 1) if change == "mkdir shards")
    places = spread_out(list(range(begin + 1, len(copied))), controls)
    caught = sum(strike(case, Fault(at, "kill"), publish_by_copying) is not None for at in places)
    words = "control, a mutant that publishes without a rename, file by file: kills within it noticed"
    return [*rows, [words, require(caught, len(places))]]


def log_changes(case: Case, name: str, *mutant: Before) -> list[str]:
    """Every change of the disk that the command makes."""
    folder = case.new(name)
    watch = functools.partial(watch_changes, None, folder / "changes")
    if wrong := case.finish(folder, watch, *mutant):
        raise ValueError(wrong)
    return list_changes(folder / "changes")


def spread_out(places: list[int], most: int | None) -> list[int]:
    """All, or so many of them at equal distances."""
    if most is None or len(places) <= most:
        return places
    return [places[number * len(places) // most] for number in range(most)]


def require(caught: int, tried: int) -> str:
    """`caught/tried`. Raises ValueError if nothing was caught."""
    if not caught:
        raise ValueError("a mutant was not caught: the campaign proves nothing")
    return f"{caught}/{tried}"


def write_in_place() -> None:
    """A mutant: the folder is filled where everybody sees it."""
    replace("overnight.data.atomic_folder:staging_path", lambda folder: folder)


def publish_by_copying() -> None:
    """A mutant: the finished folder is copied, file by file."""
    from overnight.data.atomic_folder import staging_path

    def publish(folder: Path) -> None:
        folder.mkdir()
        for path in sorted(staging_path(folder).rglob("*")):
            copy = folder / path.relative_to(staging_path(folder))
            copy.mkdir() if path.is_dir() else copy.write_bytes(path.read_bytes())
            time.sleep(0.005)
        shutil.rmtree(staging_path(folder))

    replace("overnight.data.atomic_folder:publish_folder", publish)


def unlocked() -> None:
    """A mutant: nobody asks whether another fills the same folder."""
    replace("overnight.data.atomic_folder:exclusive", lambda _: contextlib.nullcontext())


# ---------------------------------------------------------------- D5: eight at once


class Seen(NamedTuple):
    """What a reader found while others wrote."""

    openings: int
    """Of the folder, from its appearance on; each shard verified."""
    rows: int
    """Read before the folder was complete, the last ones as soon as it was."""


def wait_at(gate: Path) -> None:
    """In a new process: stand ready until the gate is open."""
    from overnight.data import shards  # noqa: F401 - what would be loaded behind the gate

    while not gate.exists():
        time.sleep(0.001)


def read_on(folder: Path) -> None:
    """Open what is there again and again until all commands have ended; note what was found."""
    from overnight.data.loader import TokenStream

    out, openings, wrong = folder / OUT, 0, ""
    while not (folder / "over").exists() and not wrong:
        if not out.exists():
            continue
        try:
            for split in ("train", "validation"):
                TokenStream(out, split, tokens_per_row=64).batch(0, 1)
            openings += 1
        except (ValueError, OSError) as error:
            wrong = str(error)
    (folder / "openings").write_text(wrong or str(openings))


def read_along(folder: Path) -> None:
    """Train, so to say, on what is not complete yet, row after row; note whether they are the final rows."""
    import torch

    from overnight.data import incremental, shards
    from overnight.data.loader import TokenStream

    replace("overnight.data.incremental:POLL_SECONDS", 0.002)
    replace("overnight.terminal:echo", lambda _: None)
    out, options = folder / OUT, {"tokens_per_row": 64, "seed": 1, "shuffle_window": 20_000}
    is_over = (folder / "over").exists
    while not (shards.is_being_prepared(out) or out.exists() or is_over()):
        time.sleep(0.001)
    try:
        stream = incremental.IncrementalStream(incremental.open_incremental(out, 20_000), **options)
        batches = []
        while not stream.folder.is_complete and stream.wait_for(len(batches) + 1, is_over):
            batches.append(stream.batch(len(batches), 1))
        whole = TokenStream(out, **options)
        same = all(torch.equal(whole.batch(row, 1).ids, each.ids) for row, each in enumerate(batches))
        found = str(len(batches)) if same else "a row was another in the end"
    except (ValueError, OSError) as error:
        found = str(error)
    (folder / "rows").write_text(found)


def crowd(case: Case, folder: Path, count: int, *mutant: Before) -> Seen:
    """So many commands at once, and two readers. Raises ValueError if anything is not as it should be."""
    gate = folder / "gate"
    trials = [case.start(folder, *mutant, functools.partial(wait_at, gate)) for _ in range(count)]
    readers = [PROCESSES.Process(target=work, args=(folder,)) for work in (read_on, read_along)]
    for reader in readers:
        reader.start()
    gate.touch()
    endings = [trial.ended() for trial in trials]
    (folder / "over").touch()
    for reader in readers:
        reader.join(READER_SECONDS)
        reader.kill()
    if bad := [ended for ended in endings if ended.status != DONE]:
        raise ValueError(f"{len(bad)} of {count} ended otherwise: {bad[0].said[-1000:]}")
    found = [
        path.read_text() if path.is_file() else "no end" for path in (folder / "openings", folder / "rows")
    ]
    if wrong := [each for each in found if not each.isdigit()]:
        raise ValueError(f"a reader met something else than a whole folder: {wrong[0]}")
    if wrong_end := find_wrong(folder / OUT, case.expected):
        raise ValueError(wrong_end)
    return Seen(*map(int, found))


def crowd_often(case: Case, rounds: int, count: int) -> list[list[str]]:
    """Round after round, and the mutants. Raises ValueError if one goes wrong or a mutant is not caught."""
    seen = []
    for number in range(rounds):
        folder = case.new(f"crowd-{number}")
        seen.append(crowd(case, folder, count))
        shutil.rmtree(folder)
    rows = [
        [f"D5: rounds of {count} commands at once, all ended with status 0", f"{rounds}/{rounds}"],
        ["the folder equals the uninterrupted one", f"{rounds}/{rounds}"],
        ["opened by a reader during this, each time complete", f"{sum(each.openings for each in seen):,}"],
        [
            "rows read before it was complete, each equal to the final one",
            f"{sum(each.rows for each in seen):,}",
        ],
    ]
    tried = min(2, rounds)
    for mutant, words in ((unlocked, "has no lock"), (publish_by_copying, "publishes file by file")):
        caught = 0
        for number in range(tried):
            try:
                crowd(case, case.new(f"{mutant.__name__}-{number}"), count, mutant)
            except ValueError:
                caught += 1
        rows.append([f"control, a mutant that {words}: noticed", require(caught, tried)])
    return rows


# ---------------------------------------------------------------- all of it


def measure_preparation(place: Place, counts: dict[str, Any], seed: int) -> Report:
    """D4-D6. Raises ValueError if a byte differs, a command ends otherwise, or a mutant is not caught."""
    case, these = make_case(place, seed), list_surroundings()[: counts["surroundings"]]
    return report(
        title="D4-D6: a preparation that is killed, repeated at once, done elsewhere",
        rows=[
            *kill_often(case, counts["preparations"], seed),
            *kill_at_changes(case, counts["changes"], counts["controls"]),
            *crowd_often(case, counts["crowds"], counts["commands"]),
            *vary(case.place, case.expected, these),
        ],
        measured={"sha256": case.expected},
        notes=[
            f"One sha256 over all names and bytes of the folder, {case.expected[:16]}..., in every row. "
            f"Environments: {', '.join(each.name for each in these)}. "
            f"Next to the folder only its lock is left, {LOCK}."
        ],
        settings={"seed": seed},
    )
