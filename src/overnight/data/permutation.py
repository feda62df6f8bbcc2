"""A keyed permutation of range(n), evaluated one index at a time: no table, whatever n is.

A Feistel network over a grid of a x b >= n cells (Black and Rogaway, "Ciphers with Arbitrary Finite
Domains", 2002): the index is split into a column and a row, each in turn is moved by a keyed hash of the
other, and an index that lands beyond n is sent through again. The grid has under 2 sqrt(n) + 1 spare
cells, so that hardly ever happens.

It orders training data and hides nothing: the hash is fast, not secret.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

ROUNDS = 8  # an even number: columns and rows are moved equally often
MASK = 2**64 - 1

Indices = NDArray[np.uint64]


def derive_keys(seed: int, epoch: int, purpose: str, count: int) -> tuple[int, ...]:
    """`count` 64-bit numbers, a pure function of the other three."""
    text = f"{purpose} {seed} {epoch}".encode()
    return struct.unpack(f"<{count}Q", blake2b(text, digest_size=8 * count).digest())


@dataclass(frozen=True)
class Permutation:
    """range(size) in an order decided by the keys; `permutation(i)` is what stands at place i.

    `size` is at most 2^62.
    """

    size: int
    keys: tuple[int, ...]
    columns: int
    rows: int

    def __call__(self, index: int) -> int:
        """What stands at place `index`."""
        assert 0 <= index < self.size, index
        index = self._scramble(index)
        # Ends: scrambling permutes the grid, so this walk comes round to where it began, which is below size.
        while index >= self.size:
            index = self._scramble(index)
        return index

    def at(self, first: int, count: int) -> NDArray[np.int64]:
        """What stands at `count` places from `first` on: the same, a thousand at a time and faster for it."""
        assert 0 <= first <= first + count <= self.size, (first, count)
        found = self._scramble_all(np.arange(first, first + count, dtype=np.uint64))
        while (beyond := found >= self.size).any():
            found[beyond] = self._scramble_all(found[beyond])
        return found.astype(np.int64)

    def _scramble(self, index: int) -> int:
        row, column = divmod(index, self.columns)
        keys = iter(self.keys)
        for key in keys:
            column = (column + _mix(row ^ key)) % self.columns
            row = (row + _mix(column ^ next(keys))) % self.rows
        return row * self.columns + column

    def _scramble_all(self, indices: Indices) -> Indices:
        """`_scramble` of each. Sums are taken below 2^63, so that none is cut off at 2^64."""
        columns, rows = np.uint64(self.columns), np.uint64(self.rows)
        row, column = np.divmod(indices, columns)
        keys = iter(np.array(self.keys, dtype=np.uint64))
        for key in keys:
            column = (column + _mix_all(row ^ key) % columns) % columns
            row = (row + _mix_all(column ^ next(keys)) % rows) % rows
        found: Indices = row * columns + column
        return found


def build_permutation(size: int, seed: int, epoch: int, purpose: str = "order") -> Permutation:
    """The order of `size` things in one epoch; another one for another purpose."""
    columns = math.isqrt(size - 1) + 1
    rows = -(-size // columns)
    return Permutation(size, derive_keys(seed, epoch, purpose, ROUNDS), columns, rows)


def _mix(number: int) -> int:
    """splitmix64's finalizer (Steele, Lea and Flood, 2014): every input bit reaches every output bit."""
    number = (number ^ (number >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    number = (number ^ (number >> 27)) * 0x94D049BB133111EB & MASK
    return number ^ (number >> 31)


def _mix_all(numbers: Indices) -> Indices:
    """`_mix` of each: a product of uint64 is cut off at 2^64 by itself."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))
