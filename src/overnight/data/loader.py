"""Shards to batches. A row's tokens are a pure function of its number: a run has no loader state to save.

The N tokens of a split form a ring. An epoch has ceil(N / T) rows of T tokens. They are laid end to end
around the ring from an offset drawn for the epoch, and read in the order of the epoch's permutation. So in
each epoch every token is a target at least once, fewer than T tokens are a target twice, and the tail of no
shard is dropped. Row g belongs to epoch g // rows_per_epoch; finding its tokens takes O(1) time and memory.

With `shuffle_window` S the split is divided into windows of S consecutive tokens; the last one also takes the
remainder, so it has S to 2 S - 1. Each window is a ring with an offset and an order of its own, and an epoch
reads one window after the other. A row then depends only on its window's tokens and on S more tokens existing
after them, so it can be read while the rest of the text is still being prepared.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from overnight.data.permutation import build_permutation, derive_keys
from overnight.data.shards import Tokens
from overnight.data.token_reader import ShardStore, TokenReader

BLOCK_ROWS = 1024  # locating rows together takes a twentieth of the time per row
BLOCKS_KEPT = 256  # cached blocks of all streams, the most recently used ones; 8 KB each


@dataclass(frozen=True)
class Batch:
    """ids (rows, T) and targets (rows, T), the ids that follow them; int64."""

    ids: Tensor
    targets: Tensor

    @classmethod
    def from_tokens(cls, tokens: Tokens) -> Batch:
        """Split (rows, T + 1) tokens: all but the last of each row are ids, all but the first are targets."""
        rows, length = tokens.shape
        arrays = np.empty((2, rows, length - 1), dtype=np.int64)
        arrays[0], arrays[1] = tokens[:, :-1], tokens[:, 1:]
        return cls(*torch.from_numpy(arrays))


class BatchSource(Protocol):
    """Anything that has rows: a stream, a mixture of streams, random ids."""

    def batch(self, first_row: int, rows: int) -> Batch:
        """Rows first_row, first_row + 1, ... first_row + rows - 1."""
        ...


class TokenStream:
    """One split of a prepared folder as an endless sequence of rows of `tokens_per_row` ids.

    Raises ValueError as TokenReader does, and if a row exceeds the shuffle window.
    """

    def __init__(
        self,
        folder: Path | str | ShardStore,
        split: str = "train",
        *,
        tokens_per_row: int,
        seed: int = 0,
        shuffle_window: int | None = None,
    ) -> None:
        self._reader = TokenReader(folder, split, tokens_per_row)
        self.manifest, self.tokens = self._reader.manifest, self._reader.tokens
        self.seed, self.tokens_per_row = seed, tokens_per_row
        if shuffle_window is not None and shuffle_window <= tokens_per_row:
            raise ValueError(
                f"shuffle_window={shuffle_window} must exceed a row of {tokens_per_row}; use about 1,000 rows"
            )
        self._window_tokens = min(shuffle_window or self.tokens, self.tokens)
        self._rows_per_window = -(-self._window_tokens // tokens_per_row)  # rounded up
        self._last_window = self.tokens // self._window_tokens - 1
        self.rows_before_last_window = self._last_window * self._rows_per_window
        last_window_tokens = self.tokens - self._last_window * self._window_tokens
        self.rows_per_epoch = self.rows_before_last_window + -(-last_window_tokens // tokens_per_row)

    def batch(self, first_row: int, rows: int) -> Batch:
        """Rows first_row, first_row + 1, ... of the endless sequence of epochs."""
        tokens = np.empty((rows, self.tokens_per_row + 1), dtype=self._reader.dtype)
        for number, row in enumerate(tokens, first_row):
            start, window_start, window_end = self._locate(number)
            before_end = window_end - start
            self._reader.read(start, row[:before_end])
            if before_end < row.size:  # a ring: what follows its end is its beginning
                self._reader.read(window_start, row[before_end:])
        return Batch.from_tokens(tokens)

    def row_start(self, row: int) -> int:
        """The index, among the tokens of the split, of a row's first token."""
        return self._locate(row)[0]

    def evaluation_batches(self, rows: int, tokens: int | None = None) -> Iterator[Batch]:
        """The split in its own order: the first `tokens` targets, or all of them, each exactly once.

        The first token of the split has no predecessor and is never a target. Batches have `rows` full rows,
        then come the remaining full rows, then a single shorter row.
        """
        targets = self.tokens - 1 if tokens is None else min(tokens, self.tokens - 1)
        full_rows, rest = divmod(targets, self.tokens_per_row)
        for first in range(0, full_rows, rows):
            yield self._in_order(first, min(rows, full_rows - first), self.tokens_per_row)
        if rest:
            yield self._in_order(full_rows, 1, rest)

    def _in_order(self, first_row: int, rows: int, length: int) -> Batch:
        tokens = np.empty((rows, length + 1), dtype=self._reader.dtype)
        for number, row in enumerate(tokens, first_row):
            self._reader.read(number * self.tokens_per_row, row)
        return Batch.from_tokens(tokens)

    def _locate(self, row: int) -> tuple[int, int, int]:
        """Where a row starts, and where its shuffle window starts and ends, as indices of the split."""
        epoch, index = divmod(row, self.rows_per_epoch)
        window = min(index // self._rows_per_window, self._last_window)
        start = window * self._window_tokens
        end = self.tokens if window == self._last_window else start + self._window_tokens
        block, index_in_block = divmod(index - window * self._rows_per_window, BLOCK_ROWS)
        positions = ring_positions(self.seed, epoch, window, end - start, self.tokens_per_row, block)
        return start + positions[index_in_block], start, end


@functools.lru_cache(BLOCKS_KEPT)
def ring_positions(
    seed: int, epoch: int, window: int, tokens: int, tokens_per_row: int, block: int
) -> list[int]:
    """Where in a window's ring of `tokens` tokens the rows of one block of its order start."""
    # The suffix is part of the keys: changing it would change the order of the rows of existing runs.
    suffix = f" of portion {window}" if window else ""
    (offset,) = derive_keys(seed, epoch, f"shift{suffix}", 1)
    order = build_permutation(-(-tokens // tokens_per_row), seed, epoch, f"order{suffix}")
    first = block * BLOCK_ROWS
    numbers = order.at(first, min(BLOCK_ROWS, order.size - first))
    positions: list[int] = ((offset % tokens + numbers * tokens_per_row) % tokens).tolist()
    return positions


class PrefetchLoader:
    """Batches on `device`. While the device computes on one, a thread reads, pins and copies the next one."""

    def __init__(
        self, source: BatchSource, device: str, next_row: Callable[[int], int] | None = None
    ) -> None:
        """`next_row` maps a batch's first row to that of the following batch; adjacent rows if left out."""
        self._source, self._device, self._next_row = source, device, next_row
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._prefetched: tuple[int, int, Future[Batch]] | None = None

    def batch(self, first_row: int, rows: int) -> Batch:
        """The batch of these rows; starts reading the next one."""
        batch = self._take(first_row, rows)
        following = first_row + rows if self._next_row is None else self._next_row(first_row)
        self._prefetched = (following, rows, self._thread.submit(self._read, following, rows))
        return batch

    def _take(self, first_row: int, rows: int) -> Batch:
        if self._prefetched is not None and self._prefetched[:2] == (first_row, rows):
            future = self._prefetched[2]
            if future.exception() is None:  # waits for the thread
                return future.result()
        return self._read(first_row, rows)  # not the expected rows, or rows that did not exist yet

    def _read(self, first_row: int, rows: int) -> Batch:
        batch = self._source.batch(first_row, rows)
        if self._device.startswith("cuda"):  # only copies from pinned memory run while the GPU computes
            batch = Batch(batch.ids.pin_memory(), batch.targets.pin_memory())
        ids, targets = (each.to(self._device, non_blocking=True) for each in (batch.ids, batch.targets))
        return Batch(ids, targets)


def prefetch(source: BatchSource, device: str, next_row: Callable[[int], int] | None = None) -> BatchSource:
    """A PrefetchLoader; on the CPU `source` itself, since a thread would slow down the computation."""
    return source if device == "cpu" else PrefetchLoader(source, device, next_row)
