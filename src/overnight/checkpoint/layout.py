"""The names of checkpoints and of their files; which are there, which are kept, how a file is known again."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

FORMAT = 4
READABLE = (2, 3, 4)  # 3 knew no guard; 2 had a single file of each kind, and did not name them
KINDS = ("model", "optimizer")
MOMENTS = ("exp_avg", "exp_avg_sq")
READ_AT_ONCE = 16_000_000  # bytes: of small pieces each would have to wait for the interpreter


def checkpoint_name(step: int) -> str:
    """step-00001000 for 1000: names sort as their steps do."""
    return f"step-{step:08d}"


def read_step(checkpoint: Path) -> int:
    """1000 for step-00001000."""
    return int(checkpoint.name.removeprefix("step-"))


def list_checkpoints(folder: Path) -> list[Path]:
    """The published checkpoints of a run, oldest first, verified or not."""
    return sorted(folder.glob("step-" + "[0-9]" * 8))


def file_names(kind: str, count: int) -> list[str]:
    """The files of one kind, one of each process."""
    if count == 1:
        return [f"{kind}.safetensors"]
    return [f"{kind}-{rank:05d}-of-{count:05d}.safetensors" for rank in range(count)]


def identify(path: Path) -> dict[str, Any]:
    """A file's length and sha256, as the disk has them."""
    size = path.stat().st_size
    digest, piece = hashlib.sha256(), memoryview(bytearray(min(size, READ_AT_ONCE)))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(piece):
            digest.update(piece[:count])
    return {"bytes": size, "sha256": digest.hexdigest()}


def manifest(files: dict[str, Any], format_: int) -> str:
    """What MANIFEST.json says of files with these identities; always the same bytes for the same files."""
    return json.dumps({"format": format_, "files": files}, indent=2, sort_keys=True) + "\n"


def choose_kept(
    steps: Sequence[int], last: int | None, every: int | None = None, best: int | None = None
) -> set[int]:
    """Of the steps with a checkpoint, in order, those to be kept.

    The newest `last` of them, all if None; multiples of `every`; `best`, if it is one of them. The newest is
    always kept: it is the one whose bytes have just been brought to the disk.
    """
    if last is None:
        return {*steps}
    kept = {*steps[-max(1, last) :]}
    return kept | {step for step in steps if (every and step % every == 0) or step == best}


def keep_only(kept: Collection[int], folder: Path) -> None:
    """Delete the checkpoints of all other steps."""
    for checkpoint in list_checkpoints(folder):
        if read_step(checkpoint) not in kept:
            shutil.rmtree(checkpoint)


def discard_checkpoints_after(step: int, folder: Path) -> None:
    """Delete the checkpoints of later steps: damaged, since they were passed over; they are made again."""
    for checkpoint in list_checkpoints(folder):
        if checkpoint.name > checkpoint_name(step):
            shutil.rmtree(checkpoint)
