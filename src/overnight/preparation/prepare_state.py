"""What is to be prepared, as every worker on every machine reads it; and how far it has come.

The folder that is being filled, hidden beside the one that it will be:

    work.json            what is asked for, the units of the source, and what they become
    tokenizer/
    benchmarks/          passages that are looked for, see contamination.py
    near/                near-duplicates, see near_duplicates.py
    units/               what one unit became: 00017.ids, 00017.documents.npy, and, last, 00017.json
    fates.npy            what became of every document
    slurm-job            its number, if Slurm does the work
    layout.json          where each unit's tokens stand, hence how many shards there are
    train-00000.bin ...  and last manifest.json
    so-far.json          a manifest of the shards that are complete, while there is more to come
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import shutil
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overnight.data.shards import MANIFEST, read_manifest
from overnight.data.text_files import TextFile
from overnight.preparation.documents import Part
from overnight.run_directory import write_atomically
from overnight.tokenizer.open_tokenizer import load_tokenizer
from overnight.tokenizer.tokenizer import Tokenizer

SLURM_JOB = "slurm-job"
Unit = tuple[Part, ...]
Request = dict[str, str | int | float | None]


@dataclass(frozen=True, kw_only=True)
class PrepareState:
    """Everything that decides what the shards hold."""

    request: Request
    """In words that mean the same on every machine: compared when the folder is asked for again."""
    source: str
    licence: str
    units: tuple[Unit, ...]
    """What is read in one piece, in the source's order. The shards do not depend on where it is cut."""
    unit_bytes: tuple[int, ...]
    """About how much text each unit holds."""
    damaged_files: tuple[str, ...]
    """Left out as on_bad_file="skip" asks, before a word of them was read."""
    text_column: str
    on_bad_text: str
    on_bad_file: str
    validation_fraction: float
    tokens: int | None
    shard_tokens: int
    benchmarks: tuple[str, ...] = ()
    """Whose passages are looked for; in the order of their bits."""
    on_contaminated: str = "report"
    near_duplicates: str = "keep"

    def units_for(self, text_bytes: float) -> int:
        """How many units hold so much text; all of them if there is less."""
        short = sum(size < text_bytes for size in itertools.accumulate(self.unit_bytes))
        return min(len(self.units), short + 1)

    def to_json(self) -> str:
        """The text of work.json."""
        return json.dumps(dataclasses.asdict(self)) + "\n"


def write_state(place: Path, work: PrepareState) -> None:
    """Say what is to be done in an empty folder."""
    write_atomically(place / "work.json", work.to_json())


def read_state(place: Path) -> PrepareState:
    """What `write_state` wrote."""
    return _parse_work((place / "work.json").read_text(encoding="utf-8"))


@functools.lru_cache(maxsize=2)
def _parse_work(text: str) -> PrepareState:
    values: dict[str, Any] = json.loads(text)
    units = tuple(tuple(_read_part(part) for part in unit) for unit in values.pop("units"))
    values |= {name: tuple(values[name]) for name in ("unit_bytes", "damaged_files", "benchmarks")}
    return PrepareState(units=units, **values)


def _read_part(values: dict[str, Any]) -> Part:
    groups = values["groups"]
    return Part(TextFile(**values["file"]), groups and tuple(groups))


def is_complete(place: Path) -> bool:
    """True if all is done but for removing what only the work needed; some of that may be gone."""
    return (place / MANIFEST).is_file()


def is_begun(place: Path, work: PrepareState) -> bool:
    """True if the folder holds a beginning of this very work, or all of it."""
    try:
        request = read_manifest(place).request if is_complete(place) else read_state(place).request
        return request == work.request
    except (OSError, ValueError, LookupError, TypeError):
        return False


def request_units(place: Path, units: int) -> None:
    """Say that the first so many units are to be encoded: as many as the tokens wanted will take."""
    write_atomically(place / "wanted", f"{units}\n")


def target_units(place: Path) -> int:
    """What `request_units` said last."""
    return int((place / "wanted").read_text(encoding="utf-8"))


def remove_traces(place: Path, shards: Container[str]) -> None:
    """Remove everything but what is to stay: the shards of these names, tokenizer and manifest.

    The last to go says who is at it.
    """
    for path in sorted(place.iterdir(), key=lambda path: path.name == SLURM_JOB):
        if path.name in {"tokenizer", MANIFEST} or path.name in shards:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def group_parts(sizes: Mapping[Part, int], unit_bytes: int) -> tuple[Unit, ...]:
    """The parts in their order, as many together as have about so many bytes of text."""
    units: list[Unit] = []
    waiting: list[Part] = []
    held = 0
    for part, size in sizes.items():
        if waiting and held + size > unit_bytes:
            units.append(tuple(waiting))
            waiting, held = [], 0
        waiting.append(part)
        held += size
    return (*units, tuple(waiting))


@functools.lru_cache(maxsize=2)
def _open_tokenizer(folder: str, _state: str) -> Tokenizer:
    return load_tokenizer(Path(folder))


def open_tokenizer(place: Path) -> Tokenizer:
    """The one in the folder, opened once in a process."""
    files = sorted((place / "tokenizer").iterdir())
    state = " ".join(f"{path.name} {path.stat().st_mtime_ns}" for path in files)
    return _open_tokenizer(str(place / "tokenizer"), state)
