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
from overnight.data.shards import verify
from overnight.data.token_file import Tokens, open_tokens


@dataclass(frozen=True)
class Batch:
    """ids (rows, T) and the ids that follow them, int64."""

    ids: Tensor
    targets: Tensor


class TokenStream:
    """One split of a prepared folder, as rows of `tokens_per_row` ids. Holds file maps and nothing else.

    Opening reads every shard of the split once and raises ValueError if one is not as it was written, or
    if a row is longer than the data.
    """

    def __init__(
        self,
        folder: Path | str,
        split: str = "train",
        *,
        tokens_per_row: int,
        seed: int = 0,
    ) -> None:
        folder = Path(folder)
        self.manifest = verify(folder, split)
        self._shards = [open_tokens(folder / shard.name) for shard in self.manifest.shards(split)]
        self._ends = list(accumulate(shard.size for shard in self._shards))
        self.split = split
        self.seed = seed
        self.tokens = self._ends[-1]
        self.tokens_per_row = tokens_per_row
        if not 1 <= tokens_per_row < self.tokens:
            raise ValueError(
                f"a row of {tokens_per_row:,} tokens and its targets do not fit in the {self.tokens:,} of "
                f"the {split} split of {folder}: shorten the context, or prepare more text"
            )
        self.windows_per_epoch = -(-self.tokens // tokens_per_row)

    def batch(self, first_row: int, rows: int) -> Batch:
        """Rows first_row, first_row + 1, ... of the endless sequence of epochs."""
        arrays = np.empty((2, rows, self.tokens_per_row), dtype=np.int64)
        for row in range(rows):
            stretch = self._stretch(self.window_start(first_row + row), self.tokens_per_row + 1)
            arrays[0, row] = stretch[:-1]
            arrays[1, row] = stretch[1:]
        ids, targets = torch.from_numpy(arrays)
        return Batch(ids, targets)

    def window_start(self, row: int) -> int:
        """Where on the circle of tokens a row begins."""
        epoch, place = divmod(row, self.windows_per_epoch)
        shift, order = _epoch(self.seed, epoch, self.tokens, self.windows_per_epoch)
        return (shift + order(place) * self.tokens_per_row) % self.tokens

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
        stretch = self._stretch(start, shape[0] * shape[1] + 1).astype(np.int64)
        ids, targets = (torch.from_numpy(each.reshape(shape).copy()) for each in (stretch[:-1], stretch[1:]))
        return Batch(ids, targets)

    def _stretch(self, start: int, length: int) -> Tokens:
        """`length` tokens from `start` on, across shards and past the end to the beginning."""
        pieces = []
        while length:
            index = bisect_right(self._ends, start)
            shard = self._shards[index]
            offset = start - (self._ends[index] - shard.size)
            piece = shard[offset : offset + length]
            pieces.append(piece)
            length -= piece.size
            start = (start + piece.size) % self.tokens
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


@functools.lru_cache(maxsize=4)
def _epoch(seed: int, epoch: int, tokens: int, windows: int) -> tuple[int, Permutation]:
    """Where on the circle the epoch's first window begins, and the order of its windows."""
    (draw,) = derive_keys(seed, epoch, "shift", 1)
    return draw % tokens, build_permutation(windows, seed, epoch)
