"""Shards to batches, as a pure function of the row number: there is no position to save or to lose.

The tokens of a split form a circle of N. An epoch has W = ceil(N / T) rows of T tokens that lie end to end
around the circle from a starting point of its own, so in each epoch every token is a target at least once,
fewer than T of them twice, and no shard's tail is lost. Row g belongs to epoch g // W and is the window
that the epoch's permutation puts at place g % W.
"""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from overnight.data.permutation import Permutation, build_permutation, derive_keys
from overnight.data.shard_file import LocalFolder, Shelf
from overnight.data.token_file import Tokens, token_format

PLACES_AT_ONCE = 1024  # worked out together, a row's place takes a twentieth of what it takes alone


@dataclass(frozen=True)
class Batch:
    """ids (rows, T) and the ids that follow them, int64."""

    ids: Tensor
    targets: Tensor


class TokenStream:
    """One split of a prepared folder, as rows of `tokens_per_row` ids. Holds open files and nothing else.

    Opening a path reads every shard of the split once and raises ValueError if one is not as it was
    written; another shelf verifies each shard in its own time. Raises ValueError, too, if a row is longer
    than the data.
    """

    def __init__(
        self,
        folder: Path | str | Shelf,
        split: str = "train",
        *,
        tokens_per_row: int,
        seed: int = 0,
    ) -> None:
        self._shelf = LocalFolder(Path(folder), split) if isinstance(folder, Path | str) else folder
        self.manifest = self._shelf.manifest
        self._shards = self.manifest.shards(split)
        self._begins = [0, *accumulate(shard.tokens for shard in self._shards)]
        self._dtype = token_format(self.manifest.vocab_size).dtype
        self.split = split
        self.seed = seed
        self.tokens = self._begins[-1]
        self.tokens_per_row = tokens_per_row
        if not 1 <= tokens_per_row < self.tokens:
            raise ValueError(
                f"a row of {tokens_per_row:,} tokens and its targets do not fit in the {self.tokens:,} of "
                f"the {split} split of {folder}: shorten the context, or prepare more text"
            )
        self.windows_per_epoch = -(-self.tokens // tokens_per_row)

    def batch(self, first_row: int, rows: int) -> Batch:
        """Rows first_row, first_row + 1, ... of the endless sequence of epochs."""
        stretches = np.empty((rows, self.tokens_per_row + 1), dtype=self._dtype)
        for row, stretch in enumerate(stretches, first_row):
            self._read(self.window_start(row), stretch)
        # Two passes over what lies in the processor's cache now, instead of two calls for each row.
        arrays = np.empty((2, rows, self.tokens_per_row), dtype=np.int64)
        arrays[0] = stretches[:, :-1]
        arrays[1] = stretches[:, 1:]
        ids, targets = torch.from_numpy(arrays)
        return Batch(ids, targets)

    def window_start(self, row: int) -> int:
        """Where on the circle of tokens a row begins."""
        epoch, place = divmod(row, self.windows_per_epoch)
        block, within = divmod(place, PLACES_AT_ONCE)
        return _window_starts(self.seed, epoch, block, self.tokens, self.tokens_per_row)[within]

    def evaluation_batches(self, rows: int, tokens: int | None = None) -> Iterator[Batch]:
        """The split in its own order: the first `tokens` targets, or all of them, each exactly once.

        The first token of the split is never a target: nothing stands before it. Batches have `rows` full
        rows, then come the remaining full rows, then a single shorter row.
        """
        targets = self.tokens - 1 if tokens is None else min(tokens, self.tokens - 1)
        full_rows, rest = divmod(targets, self.tokens_per_row)
        for first in range(0, full_rows, rows):
            yield self._in_order(
                first * self.tokens_per_row, (min(rows, full_rows - first), self.tokens_per_row)
            )
        if rest:
            yield self._in_order(full_rows * self.tokens_per_row, (1, rest))

    def _in_order(self, start: int, shape: tuple[int, int]) -> Batch:
        stretch = np.empty(shape[0] * shape[1] + 1, dtype=self._dtype)
        self._read(start, stretch)
        ids, targets = (
            torch.from_numpy(each.reshape(shape).astype(np.int64)) for each in (stretch[:-1], stretch[1:])
        )
        return Batch(ids, targets)

    def _read(self, start: int, stretch: Tokens) -> None:
        """Fill `stretch` with the tokens from `start` on, across shards and past the end to the beginning."""
        while True:
            index = bisect_right(self._begins, start) - 1
            file = self._shelf.open(self._shards[index])
            left = self._begins[index + 1] - start
            if stretch.size <= left:
                return file.read(start - self._begins[index], stretch)
            file.read(start - self._begins[index], stretch[:left])
            start, stretch = (start + left) % self.tokens, stretch[left:]


@functools.lru_cache(maxsize=16)
def _window_starts(seed: int, epoch: int, block: int, tokens: int, tokens_per_row: int) -> list[int]:
    """Where on the circle the windows at PLACES_AT_ONCE neighbouring places of an epoch begin."""
    shift, order = _epoch(seed, epoch, tokens, -(-tokens // tokens_per_row))
    first = block * PLACES_AT_ONCE
    windows = order.at(first, min(PLACES_AT_ONCE, order.size - first))
    starts: list[int] = ((shift + windows * tokens_per_row) % tokens).tolist()
    return starts


@functools.lru_cache(maxsize=4)
def _epoch(seed: int, epoch: int, tokens: int, windows: int) -> tuple[int, Permutation]:
    """Where on the circle the epoch's first window begins, and the order of its windows."""
    (draw,) = derive_keys(seed, epoch, "shift", 1)
    return draw % tokens, build_permutation(windows, seed, epoch)
