"""The state of a preparation: the files in the staging folder, which all workers share.

work.json            the request, the units of the source, and how they are tokenized
wanted               how many units are to be tokenized
tokenizer/
benchmarks.npz       passages to search for, see decontaminate.py
mismatch, rejected   why fastokens is no longer used: before and after the units are tokenized again
units/               tokenized units: 00017.ids, 00017.documents, 00017.signatures, and, last, 00017.json
splits.npy           the split of every document
layout.json          where the tokens of each unit lie, hence how many shards there are
train-00000.bin ...  shards, each with its record in a .json; last manifest.json
so-far.json          a manifest of the complete shards, while there is more to come
slurm-job            the number of the last Slurm job
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import shutil
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from overnight.data.shards import MANIFEST, read_manifest
from overnight.data.text_files import TextFile
from overnight.files import write_atomically
from overnight.preparation.documents import Part
from overnight.preparation.prepare_config import PrepareConfig
from overnight.terminal import echo
from overnight.tokenizer.fast_byte_pair import accelerate
from overnight.tokenizer.open_tokenizer import load_tokenizer
from overnight.tokenizer.tokenizer import Tokenizer

SLURM_JOB = "slurm-job"
MISMATCH, REJECTED = "mismatch", "rejected"
Unit = tuple[Part, ...]
Request = dict[str, str | int | float | None]
Content = TypeVar("Content")


@dataclass(frozen=True, kw_only=True)
class PrepareState:
    """Everything that decides the content of the shards."""

    request: Request
    """The same on every machine: compared when the folder is asked for again."""
    source: str
    licence: str
    config: PrepareConfig
    """Only what is in the request decides the content."""
    units: tuple[Unit, ...]
    """Units of work, in the order of the source. The shards do not depend on the division."""
    unit_bytes: tuple[int, ...]
    """Estimated bytes of text in each unit."""
    damaged_files: tuple[str, ...]
    """Files skipped because their size or columns could not be read (on_bad_file="skip")."""
    validation_fraction: float
    files_read: dict[str, list[int]]
    """Kind of file -> [number, bytes]."""
    files_left_alone: dict[str, list[int]]

    def units_for(self, text_bytes: float) -> int:
        """The number of units that hold at least `text_bytes` of text; all units if there is less."""
        short = sum(size < text_bytes for size in itertools.accumulate(self.unit_bytes))
        return min(len(self.units), short + 1)


def write_state(staging: Path, state: PrepareState) -> None:
    """Write work.json into an empty staging folder."""
    write_atomically(staging / "work.json", json.dumps(dataclasses.asdict(state)) + "\n")


def read_state(staging: Path) -> PrepareState:
    """Read work.json, once per process: it takes megabytes for a large source."""
    return read_once(_parse_state, staging / "work.json")


def open_tokenizer(staging: Path) -> Tokenizer:
    """The tokenizer in the staging folder, read once per process."""
    return read_once(load_tokenizer, staging / "tokenizer")


def open_encoder(staging: Path) -> tuple[Tokenizer, str | None]:
    """(the tokenizer, encoding by fastokens if that is right, None), or with a sentence that says why not."""
    is_small = len(read_state(staging).units) == 1  # done sooner than fastokens has started
    if is_small or (staging / MISMATCH).exists() or (staging / REJECTED).exists():
        return open_tokenizer(staging), None
    return read_once(_accelerate, staging / "tokenizer")


def _accelerate(folder: Path) -> tuple[Tokenizer, str | None]:
    return accelerate(open_tokenizer(folder.parent))


def reject_encoder(staging: Path, reason: str) -> Tokenizer:
    """Record for all workers that fastokens gave another id; returns the tokenizer that encodes instead."""
    write_atomically(staging / MISMATCH, reason)
    return open_tokenizer(staging)


def must_tokenize_again(staging: Path) -> bool:
    """True, with a message, if fastokens gave another id since the last call: no unit counts as done then."""
    if not (staging / MISMATCH).is_file():
        return False
    echo((staging / MISMATCH).read_text(encoding="utf-8"))
    for path in (*staging.glob("units/*.json"), *staging.glob("*-?????*.json")):  # also records of shards
        path.unlink()
    request_units(staging, target_units(staging))
    (staging / MISMATCH).replace(staging / REJECTED)
    return True


def read_once(read: Callable[[Path], Content], path: Path) -> Content:
    """`read(path)`, cached until the file or folder changes."""
    content: Content = _read_version(read, path, path.stat().st_mtime_ns)
    return content


@functools.lru_cache(maxsize=6)
def _read_version(read: Callable[[Path], Any], path: Path, _modified_ns: int) -> Any:
    return read(path)


def _parse_state(path: Path) -> PrepareState:
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    units = tuple(
        tuple(Part(TextFile(**part["file"]), part["groups"] and tuple(part["groups"])) for part in unit)
        for unit in values.pop("units")
    )
    config = values.pop("config")
    config["decontaminate"] = tuple(config["decontaminate"])
    for name in ("unit_bytes", "damaged_files"):
        values[name] = tuple(values[name])
    return PrepareState(config=PrepareConfig(**config), units=units, **values)


def is_complete(staging: Path) -> bool:
    """True if the manifest is written. Temporary files may be partly removed by then."""
    return (staging / MANIFEST).is_file()


def is_begun(staging: Path, state: PrepareState) -> bool:
    """True if the folder holds a part of this preparation, or all of it."""
    try:
        if is_complete(staging):
            return read_manifest(staging).request == state.request
        found = read_state(staging)
    except (OSError, ValueError, LookupError, TypeError):
        return False
    return (found.request, found.units) == (state.request, state.units)


def request_units(staging: Path, units: int) -> None:
    """Record that the first `units` units are to be tokenized, also if datatrove was done with fewer."""
    shutil.rmtree(staging / "logs", ignore_errors=True)
    write_atomically(staging / "wanted", f"{units}\n")


def target_units(staging: Path) -> int:
    """The number of units to tokenize."""
    return int((staging / "wanted").read_text(encoding="utf-8"))


def remove_traces(staging: Path, shards: Container[str]) -> None:
    """Remove everything but the named shards, the tokenizer and the manifest; the Slurm job last."""
    for path in sorted(staging.iterdir(), key=lambda path: path.name == SLURM_JOB):
        if path.name in {"tokenizer", MANIFEST} or path.name in shards:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
