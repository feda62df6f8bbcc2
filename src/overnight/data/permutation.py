"""A keyed permutation of range(size), evaluated index by index, without a table.

A Feistel network over a grid of columns x rows >= size cells (Black and Rogaway, "Ciphers with Arbitrary
Finite Domains", 2002). An index is split into a column and a row; in each round one of them is shifted by a
keyed hash of the other, which is undone by the opposite shift, so the network is a permutation of the cells.
An index that leaves range(size) goes through the network again ("cycle walking"). The grid has fewer than
2 sqrt(size) + 1 spare cells, so this is rare. The hash is fast, not cryptographic.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

ROUNDS = 8  # even: columns and rows are shifted equally often

Indices = NDArray[np.uint64]


def derive_keys(seed: int, epoch: int, purpose: str, count: int) -> tuple[int, ...]:
    """`count` 64-bit numbers, a pure function of the other three arguments."""
    text = f"{purpose} {seed} {epoch}".encode()
    return struct.unpack(f"<{count}Q", blake2b(text, digest_size=8 * count).digest())


@dataclass(frozen=True)
class Permutation:
    """range(size) in an order determined by the keys; `size` is at most 2^62."""

    size: int
    keys: tuple[int, ...]
    columns: int
    rows: int

    def at(self, first: int, count: int) -> NDArray[np.int64]:
        """The values at indices first, first + 1, ... first + count - 1."""
        assert 0 <= first <= first + count <= self.size, (first, count)
        values = self._scramble(np.arange(first, first + count, dtype=np.uint64))
        # Terminates: following the permutation of the grid from an index below size leads back to that
        # index, so some step on the way leads to a value below size.
        while (outside := values >= self.size).any():
            values[outside] = self._scramble(values[outside])
        return values.astype(np.int64)

    def _scramble(self, indices: Indices) -> Indices:
        """The permutation of the whole grid."""
        columns, rows = np.uint64(self.columns), np.uint64(self.rows)
        row, column = np.divmod(indices, columns)
        keys = np.array(self.keys, dtype=np.uint64)
        for column_key, row_key in zip(keys[::2], keys[1::2], strict=True):
            # The hash is reduced before the addition, or the sum could exceed 64 bits.
            column = (column + _mix(row ^ column_key) % columns) % columns
            row = (row + _mix(column ^ row_key) % rows) % rows
        scrambled: Indices = row * columns + column
        return scrambled


def build_permutation(size: int, seed: int, epoch: int, purpose: str = "order") -> Permutation:
    """The order of `size` items in one epoch; each `purpose` has its own order."""
    columns = math.isqrt(size - 1) + 1
    rows = -(-size // columns)
    return Permutation(size, derive_keys(seed, epoch, purpose, ROUNDS), columns, rows)


def _mix(numbers: Indices) -> Indices:
    """splitmix64's finalizer (Steele, Lea and Flood, 2014): every input bit affects every output bit."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))
