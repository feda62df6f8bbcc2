"""The names of checkpoints and of their files; which are there, which are kept, how a file is known again."""

from __future__ import annotations

import hashlib
import json
import shutil
from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

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


def file_digest(path: Path) -> dict[str, Any]:
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


def retained_steps(
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


# ---------------------------------------------------------------- named tensors in one or several safetensors files, each of which may hold some rows of a t


METADATA = "first_rows"


class TensorShard(NamedTuple):
    """Some rows of a tensor."""

    rows: Tensor
    first: int
    """The number of the first of them."""


def write_tensors(path: Path, pieces: Mapping[str, TensorShard]) -> None:
    """Write the pieces, of the CPU's memory, into one file. Raises OSError if the disk does not take it."""
    firsts = {name: piece.first for name, piece in pieces.items() if piece.first}
    tensors = {name: piece.rows.contiguous() for name, piece in pieces.items()}
    try:
        save_file(tensors, path, metadata={METADATA: json.dumps(firsts)} if firsts else None)
    except SafetensorError as error:
        raise OSError(f"{path} can't be written: {error}") from None


class TensorFiles:
    """All tensors of some files, read a few rows at a time. The files must be sound."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._pieces: dict[str, list[tuple[int, int, Any]]] = {}
        for path in paths:
            file: Any = safe_open(path, framework="pt")
            firsts = json.loads((file.metadata() or {}).get(METADATA, "{}"))
            for name in file.keys():  # noqa: SIM118 - no mapping
                first = firsts.get(name, 0)
                end = first + file.get_slice(name).get_shape()[0]
                self._pieces.setdefault(name, []).append((first, end, file))
        for pieces in self._pieces.values():
            pieces.sort(key=lambda piece: piece[0])

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """The shape of every whole tensor. Raises ValueError if some of its rows are in no file."""
        found = {}
        for name, pieces in self._pieces.items():
            begins, ends = [0, *(end for _, end, _ in pieces)], [first for first, _, _ in pieces]
            if begins[:-1] != ends:
                raise ValueError(f"rows of {name} are missing")
            shape = pieces[0][2].get_slice(name).get_shape()
            found[name] = torch.Size([begins[-1], *shape[1:]])
        return found

    def read(self, name: str, into: Tensor, first: int = 0) -> None:
        """Fill `into` with the rows from `first` on; those behind the last one become zero."""
        pieces = self._pieces[name]
        row, end = first, first + len(into)
        while row < min(end, pieces[-1][1]):
            begin, stop, file = pieces[bisect_right(pieces, row, key=lambda piece: piece[0]) - 1]
            upto = min(stop, end)
            into[row - first : upto - first].copy_(file.get_slice(name)[row - begin : upto - begin])
            row = upto
        into[row - first :] = 0.0


BYTES_PER_SAVED_PARAMETER = 12  # a weight and AdamW's two moments, float32
