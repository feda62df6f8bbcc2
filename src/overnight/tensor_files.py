"""Named tensors in one or several safetensors files, each of which may hold some rows of a tensor only.

What a file holds of a tensor begins with row 0, or with the row that its metadata `first_rows` says.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

METADATA = "first_rows"


class Piece(NamedTuple):
    """Some rows of a tensor."""

    rows: Tensor
    first: int
    """The number of the first of them."""


def write_tensors(path: Path, pieces: Mapping[str, Piece]) -> None:
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
