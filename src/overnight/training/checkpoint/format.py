"""Names of checkpoints and their files, retention, digests; named tensors in safetensors files."""

from __future__ import annotations

import hashlib
import json
import shutil
from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from overnight.files import apply_umask
from overnight.training.state import TensorShard

FORMAT = 4
READABLE = (2, 3, 4)  # 3 has no guard; 2 has one file of each kind, and does not list them
KINDS = ("model", "optimizer")
READ_BYTES = 16_000_000  # small reads would each wait for the interpreter lock


def checkpoint_name(step: int) -> str:
    """step-00001000 for 1000: names sort like their steps."""
    return f"step-{step:08d}"


def read_step(checkpoint: Path) -> int:
    """The step of a checkpoint's name: 1000 for step-00001000."""
    return int(checkpoint.name.removeprefix("step-"))


def list_checkpoints(folder: Path) -> list[Path]:
    """The published checkpoints of a run, oldest first, verified or not."""
    found = folder.iterdir() if folder.is_dir() else ()  # glob finds nothing in one without permission
    return sorted(path for path in found if path.match("step-" + "[0-9]" * 8))


def file_names(kind: str, count: int) -> list[str]:
    """The files of one kind, one for each process."""
    if count == 1:
        return [f"{kind}.safetensors"]
    return [f"{kind}-{rank:05d}-of-{count:05d}.safetensors" for rank in range(count)]


def file_digest(path: Path) -> dict[str, Any]:
    """A file's length and sha256, read from the disk."""
    size = path.stat().st_size
    digest, piece = hashlib.sha256(), memoryview(bytearray(min(size, READ_BYTES)))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(piece):
            digest.update(piece[:count])
    return {"bytes": size, "sha256": digest.hexdigest()}


def manifest(files: dict[str, Any], format_: int) -> str:
    """The text of MANIFEST.json for files with these digests; the same bytes for the same files."""
    return json.dumps({"format": format_, "files": files}, indent=2, sort_keys=True) + "\n"


def retained_steps(
    steps: Sequence[int], last: int | None, every: int | None = None, best: int | None = None
) -> set[int]:
    """The steps whose checkpoints are kept, of `steps` in order.

    The newest `last`, all if None; multiples of `every`; `best`, if it is one of them. The newest one is
    always kept.
    """
    if last is None:
        return {*steps}
    kept = {*steps[-max(1, last) :]}
    return kept | {step for step in steps if (every and step % every == 0) or step == best}


def keep_only(kept: Collection[int], folder: Path) -> None:
    """Delete all checkpoints whose step is not in `kept`."""
    for checkpoint in list_checkpoints(folder):
        if read_step(checkpoint) not in kept:
            shutil.rmtree(checkpoint)


def discard_checkpoints_after(step: int, folder: Path) -> None:
    """Delete the checkpoints of later steps, which were found damaged; they are written again."""
    for checkpoint in list_checkpoints(folder):
        if checkpoint.name > checkpoint_name(step):
            shutil.rmtree(checkpoint)


# ---------------------------------------------------------------- tensors in several files

METADATA = "first_rows"


def write_tensors(path: Path, pieces: Mapping[str, TensorShard]) -> None:
    """Write CPU tensors into one file. Raises OSError if that fails."""
    firsts = {name: piece.first for name, piece in pieces.items() if piece.first}
    tensors = {name: piece.rows.contiguous() for name, piece in pieces.items()}
    try:
        save_file(tensors, path, metadata={METADATA: json.dumps(firsts)} if firsts else None)
    except SafetensorError as error:
        raise OSError(f"{path} can't be written: {error}") from None
    apply_umask(path)


class TensorFiles:
    """All tensors of several files, read a few rows at a time. The files must be verified."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._pieces: dict[str, list[tuple[int, int, Any]]] = {}
        for path in paths:
            file: Any = safe_open(path, framework="pt")
            firsts = json.loads((file.metadata() or {}).get(METADATA, "{}"))
            for name in file.keys():  # noqa: SIM118 - not a mapping
                first = firsts.get(name, 0)
                end = first + file.get_slice(name).get_shape()[0]
                self._pieces.setdefault(name, []).append((first, end, file))
        for pieces in self._pieces.values():
            pieces.sort(key=lambda piece: piece[0])

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """The shape of every whole tensor. Raises ValueError if rows are missing."""
        found = {}
        for name, pieces in self._pieces.items():
            begins, ends = [0, *(end for _, end, _ in pieces)], [first for first, _, _ in pieces]
            if begins[:-1] != ends:
                raise ValueError(f"rows of {name} are missing")
            shape = pieces[0][2].get_slice(name).get_shape()
            found[name] = torch.Size([begins[-1], *shape[1:]])
        return found

    def read(self, name: str, into: Tensor, first: int = 0) -> None:
        """Fill `into` with the rows from `first` on; rows beyond the last become zero."""
        pieces = self._pieces[name]
        row, end = first, first + len(into)
        while row < min(end, pieces[-1][1]):
            begin, stop, file = pieces[bisect_right(pieces, row, key=lambda piece: piece[0]) - 1]
            until = min(stop, end)
            into[row - first : until - first].copy_(file.get_slice(name)[row - begin : until - begin])
            row = until
        into[row - first :] = 0.0
