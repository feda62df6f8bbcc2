"""K: the files of a run are cut, deleted, swapped and edited; nothing then shows other figures in silence."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults_trials import RUN, Place, finish, report, run
from mutants import replace
from report import Report

Change = Callable[[Path, random.Random], None]


def cut(path: Path, draw: random.Random) -> None:
    """The file loses its end, at a line's end as likely as within a line."""
    data = path.read_bytes()
    ends = [0, *(i + 1 for i, byte in enumerate(data[:-1]) if byte == ord("\n"))]
    path.write_bytes(data[: draw.choice(ends) if draw.random() < 0.5 else draw.randrange(len(data))])


def delete(path: Path, _draw: random.Random) -> None:
    """The file is missing."""
    path.unlink()


def swap(path: Path, draw: random.Random) -> None:
    """The file has the content of another one of its folder, and that one this file's."""
    other = draw.choice(sorted(each for each in path.parent.iterdir() if each.is_file() and each != path))
    one, two = path.read_bytes(), other.read_bytes()
    path.write_bytes(two)
    other.write_bytes(one)


def edit(path: Path, draw: random.Random) -> None:
    """One digit of a text is another digit; one bit of another file is flipped."""
    data = bytearray(path.read_bytes())
    digits = [i for i, byte in enumerate(data) if chr(byte).isdigit()]
    if path.suffix == ".safetensors" or not digits:
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    else:
        at = draw.choice(digits)
        data[at] = ord(draw.choice("0123456789".replace(chr(data[at]), "")))
    path.write_bytes(data)


def drop_line(path: Path, draw: random.Random) -> None:
    """A line in the middle is missing."""
    lines = path.read_bytes().splitlines(keepends=True)
    del lines[draw.randrange(len(lines))]
    path.write_bytes(b"".join(lines))


CHANGES: tuple[Change, ...] = (cut, delete, swap, edit, drop_line)


def look(path: Path) -> tuple[bool, list[str]]:
    """Whether a command that reads the run says that something is wrong; what they show otherwise."""
    from overnight.conversion.open_model import open_model
    from overnight.report.run_data import read_run
    from overnight.run.resume import load_resumed

    shown, said = [], io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            data = read_run(path)
            about = dataclasses.replace(data.status, last_written_at=None)
            shown.append(repr(dataclasses.replace(data, status=about, metrics={})))
            shown += [f"{name} {column.tolist()}" for name, column in data.metrics.items()]
            shown.append(repr(load_resumed(path)))
            opened = open_model(str(path))
        except (ValueError, FloatingPointError):
            return True, []
    digest = hashlib.sha256()
    for weight in opened.model.parameters():
        digest.update(weight.detach().numpy().tobytes())
    shown += [digest.hexdigest(), opened.tokenizer.fingerprint]
    return bool(data.problems or said.getvalue()), shown


def change_many(folder: Path, out: Path, trials: int, seed: int, *, mutant: bool) -> None:
    """Change one file of the run each time; what became of it, as JSON, into `out`."""
    if mutant:
        replace("overnight.run_directory:RunDirectory.problems", lambda *_given, **_options: [])
        replace("overnight.training.checkpoint.load:verify_checkpoint", lambda *_: None)
    draw, whole, found = random.Random(seed), folder / RUN, Counter[str]()
    kept = shutil.copytree(whole, folder / f"kept-{mutant}")
    expected = look(whole)
    assert not expected[0], "the sound run is called damaged"
    files = sorted(path for path in whole.rglob("*") if path.is_file() and path.stat().st_size)
    for number in range(trials):
        change, path = CHANGES[number % len(CHANGES)], draw.choice(files)
        change(path, draw)
        try:
            noticed, shown = look(whole)
            became = "noticed" if noticed else "the same" if shown == expected[1] else "silent"
        except Exception as error:  # noqa: BLE001 - of any kind: a traceback
            became = f"crashed {type(error).__name__}"
        found[became] += 1
        if became not in {"noticed", "the same"}:
            found[f"{change.__name__} {path.relative_to(whole)}: {became}"] += 1
        shutil.rmtree(whole)
        shutil.copytree(kept, whole)
    out.write_text(json.dumps(found))


def measure_record(place: Place, counts: dict[str, int], seed: int) -> Report:
    """K23, K28. Raises ValueError if other figures are shown in silence, or if the mutant notices all."""
    folder, results = place.new("recorded"), list[dict[str, Any]]()
    finish(folder)
    for mutant in (False, True):
        out = folder / f"found-{mutant}.json"
        run(functools.partial(change_many, mutant=mutant), folder, out, counts["changes_of_files"], seed)
        results.append(json.loads(out.read_text()))
    found, control = results
    trials = counts["changes_of_files"]
    if found.get("noticed", 0) + found.get("the same", 0) != trials:
        raise ValueError(f"changed files went unnoticed: {found}")
    silent = trials - control.get("noticed", 0) - control.get("the same", 0)
    if not silent:
        raise ValueError("without the record all changes were noticed: the campaign proves nothing")
    return report(
        title="C11: a changed file of a run is noticed",
        rows=[
            ["files cut, deleted, swapped, edited: other figures shown in silence", f"0/{trials}"],
            ["reported, or refused", f"{found.get('noticed', 0)}/{trials}"],
            ["nothing that is shown depends on it", f"{found.get('the same', 0)}/{trials}"],
            ["control, a mutant that does not compare: unnoticed, or a crash", f"{silent}/{trials}"],
        ],
        measured={"found": found, "control": control},
    )
