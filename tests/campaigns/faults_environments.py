"""C10: environments that are broken in many ways, and a command that must say so before its first step.

Each trouble is met by the real command, `train` or `train --resume`. It must end soon, with one sentence that
names the thing and how to mend it, and have changed nothing of a run. Once the trouble is over, the same
command must come to its end. The troubles themselves are in faults_troubles.py.
"""

from __future__ import annotations

import functools
import hashlib
import shutil
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from faults_stops import stop_after_lines
from faults_trials import (
    DONE,
    FAILED,
    INTERRUPTED,
    RUN,
    WRONG_USE,
    Before,
    Place,
    check_lines,
    finish,
    prepare_with,
    record,
    report,
    run,
    start,
    train,
)
from faults_troubles import MUTANTS, TROUBLES, Trouble
from report import Report

SMALL: dict[str, object] = {"steps": 6, "save": 2, "evaluate": 3}
SECONDS_AT_MOST = 30.0  # a refusal takes a fraction of one; the machine may be busy
SAFE = ("shards", "text", "spare", "others", "tasks")  # what a trouble may break besides the run


class Ground(NamedTuple):
    """Folders that are whole, of which trials take copies, and how runs undisturbed end there."""

    place: Place
    kinds: dict[str, Path]
    """new: nothing is begun; resumed: stopped after five of its steps."""
    ends: dict[str, dict[str, Any]]


def prepare_ground(place: Place) -> Ground:
    """A recipe, its shards beside it, other shards, a model to begin with; and a run that was stopped."""
    ground = Place(place.folder, Path("shards"))
    new = ground.new("new", **SMALL)
    shutil.copytree(place.shards, new / "shards")
    shutil.copytree(place.folder / "text", new / "text")
    run(prepare_with, str(new / "text"), str(new / "spare"), "bpe-300")
    shutil.copytree(new / "text", place.folder / "less")
    (place.folder / "less" / "07.txt").unlink()
    run(prepare_with, str(place.folder / "less"), str(new / "others"), "characters")
    (new / "tasks").mkdir()
    line = '{{"ctx": "Line {0} tells", "label": 0, "endings": ["of {0}.", "no.", "of.", "it."]}}\n'
    (new / "tasks" / "hellaswag_val.jsonl").write_text("".join(line.format(n) for n in range(4)))
    kinds, ends = {"new": new}, {"new": end_in_peace(new)}
    shutil.copytree(place.folder / "new-in-peace" / RUN, new / "spare" / "model")
    begun = place.folder / "begun"
    shutil.copytree(new, begun)
    if train(begun, functools.partial(stop_after_lines, 5)).status != INTERRUPTED:
        raise ValueError(f"the run in {begun} did not stop")
    resumed = begun.rename(place.folder / "resumed")  # or a trial whose data is missing would read this data
    return Ground(place, kinds | {"resumed": resumed}, ends | {"resumed": end_in_peace(resumed)})


def end_in_peace(folder: Path) -> dict[str, Any]:
    """What a copy of it records at its end."""
    peace = folder.with_name(f"{folder.name}-in-peace")
    shutil.copytree(folder, peace)
    finish(peace)
    return record(peace)


class Found(NamedTuple):
    """What became of a trial."""

    wrong: str | None
    seconds: float
    """Until the command had refused."""
    said: str


def meet(ground: Ground, kind: str, trouble: Trouble, mutant: Before | None = None) -> Found:
    """The command in the trouble, and once more after it."""
    folder = ground.place.folder / f"{trouble.name} {kind}".replace(" ", "-").replace("/", "-")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ground.kinds[kind], folder, symlinks=True)
    words = ["train", "small.toml"] if kind == "new" else ["train", "--resume", str(RUN)]
    undo = trouble.begin(folder)
    try:
        before = digest(folder / "runs")
        begun_at = time.monotonic()
        ended = start(
            folder,
            functools.partial(stand_in, trouble, mutant),
            [*(trouble.words or words), *trouble.options],
        ).ended()
        seconds = time.monotonic() - begun_at
        wrong = judge(ended, trouble, seconds) or look(folder, kind, before)
    finally:
        undo()
    if wrong is None:
        mend(ground, kind, folder)
        again = start(folder, None, [*words, *trouble.options_after]).ended()
        if again.status != DONE:
            wrong = f"mended, it ends with status {again.status}: {again.said[-1500:]}"
        elif len(check_lines(folder)) != SMALL["steps"]:
            wrong = "mended, it has not all its steps"
        elif not trouble.options_after and record(folder) != ground.ends[kind]:
            wrong = "mended, it ends otherwise than undisturbed"
    shutil.rmtree(folder)
    return Found(wrong, seconds, ended.said)


def stand_in(trouble: Trouble, mutant: Before | None) -> None:
    """In the process of the command: what is broken there, and the mutant."""
    if mutant is not None:
        mutant()
    trouble.before()


def judge(ended: Any, trouble: Trouble, seconds: float) -> str | None:
    """What is wrong with how the command ended, if anything."""
    if ended.status not in {WRONG_USE, FAILED} or not ended.is_a_sentence():
        return f"status {ended.status}: {ended.said[-3000:]}"
    if ended.status != trouble.status:
        return f"status {ended.status} instead of {trouble.status}: {ended.said[-500:]}"
    missing = [word for word in trouble.says if word not in ended.said]
    if missing:
        return f"{missing} is not in: {ended.said[-1000:]}"
    lines = [line for line in ended.said.splitlines() if line.startswith("overnight: ")]
    if len(lines) != 1 or not ended.said.endswith(f"{lines[0]}\n"):
        return f"not one sentence: {ended.said[-1000:]}"
    return f"it took {seconds:.0f} s" if seconds > SECONDS_AT_MOST else None


def look(folder: Path, kind: str, before: dict[str, str]) -> str | None:
    """What is wrong with what the command has left behind, if anything."""
    after = digest(folder / "runs")
    if kind == "resumed":
        changed = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
        return f"it has changed {', '.join(changed)}" if changed else None
    begun = [name for name in after if name.endswith(("metrics.jsonl", "evaluations.jsonl"))]
    return f"it has begun: {begun}" if begun else None


def mend(ground: Ground, kind: str, folder: Path) -> None:
    """Everything that a trouble may break is whole again; of a new run, what the command has left stays."""
    for name in (*SAFE, "runs") if kind == "resumed" else SAFE:
        shutil.rmtree(folder / name, ignore_errors=True)
        shutil.copytree(ground.kinds[kind] / name, folder / name)
    shutil.copy(ground.kinds[kind] / "small.toml", folder)


def digest(folder: Path) -> dict[str, str]:
    """Of each file below a folder, by name; of a link, where it leads."""
    paths = [folder, *folder.rglob("*")]
    found = {str(path.relative_to(folder)): str(path.readlink()) for path in paths if path.is_symlink()}
    return found | {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in paths
        if path.is_file() and path.name != ".lock"
    }


def choose_troubles(most: int | None) -> list[tuple[str, Trouble]]:
    """(kind, trouble): all of them, or so many at equal distances."""
    trials = [(kind, trouble) for trouble in TROUBLES for kind in trouble.kinds]
    if most is None or most >= len(trials):
        return trials
    return [trials[number * len(trials) // most] for number in range(most)]


def catch(ground: Ground, number: int) -> str:
    """A mutant must fail at the troubles that it has no check for. Raises ValueError if it does not."""
    mutant, name, words = MUTANTS[number]
    trouble = next(each for each in TROUBLES if each.name == name)
    kind = trouble.kinds[-1]
    if meet(ground, kind, trouble, mutant).wrong is None:
        raise ValueError(f"the mutant that {words} was not caught: the campaign proves nothing")
    return "1/1"


def measure_environments(place: Place, counts: dict[str, Any], seed: int) -> Report:
    """C10. Raises ValueError if a trouble is not found before the first step, or a mutant is not caught."""
    ground = prepare_ground(place)
    trials = choose_troubles(counts["troubles"])
    seconds, wrongs = [], []
    for kind, trouble in trials:
        found = meet(ground, kind, trouble)
        seconds.append(found.seconds)
        wrongs += [f"{trouble.name} ({kind}): {found.wrong}"] if found.wrong else []
    if wrongs:
        raise ValueError("\n\n".join(wrongs))
    of_group = Counter(trouble.group for _, trouble in trials)
    mutants = range(len(MUTANTS))[: counts["mutants"]]
    controls = [[f"control, a mutant that {MUTANTS[n][2]}: noticed", catch(ground, n)] for n in mutants]
    total = len(trials)
    return report(
        title="C10: what is broken is found before the first step",
        rows=[
            ["broken environments, new runs and resumed ones", str(total)],
            *[[f"of them {group}", f"{count}/{count}"] for group, count in of_group.items()],
            ["refused with one sentence that names it, no step done, no file changed", f"{total}/{total}"],
            ["after the repair, the same command finished", f"{total}/{total}"],
            ["seconds until the error was printed: median", f"{statistics.median(seconds):.2f}"],
            ["seconds until the error was printed: the longest", f"{max(seconds):.2f}"],
            *controls,
        ],
        measured={"seconds": seconds},
        settings={"seed": seed},
    )
