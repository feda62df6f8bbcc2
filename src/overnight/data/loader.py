"""Shards to batches, as a pure function of the row number: there is no position to save or to lose.

The tokens of a split form a circle of N. An epoch has W = ceil(N / T) rows of T tokens that lie end to end
around the circle from a starting point of its own, so in each epoch every token is a target at least once,
fewer than T of them twice, and no shard's tail is lost. Row g belongs to epoch g // W and is the window
that the epoch's permutation puts at place g % W.

With `shuffle_window` S the split is gone through in portions, each a circle with an order of its own: the
first S tokens, the next S, and so on, the last portion with what is left over, so with less than 2 S. Where
a row lies depends only on the tokens up to the end of its portion, and on there being S more behind it: rows
can be read while the text is still being prepared, and stay what they are.
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

from overnight.data.permutation import Permutation, build_permutation, derive_keys
from overnight.data.shards import LocalStore, ShardStore, TokenReader, Tokens

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
    than the data, or than what is shuffled at a time.
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
        shelf = LocalStore(Path(folder), split) if isinstance(folder, Path | str) else folder
        self.manifest = shelf.manifest
        self._line = TokenReader(shelf, split)
        self.split = split
        self.seed = seed
        self.tokens = self._line.tokens
        self.tokens_per_row = tokens_per_row
        if not 1 <= tokens_per_row < self.tokens:
            raise ValueError(
                f"a row of {tokens_per_row:,} tokens and its targets do not fit in the {self.tokens:,} of "
                f"the {split} split of {folder}: shorten the context, or prepare more text"
            )
        if shuffle_window is not None and shuffle_window <= tokens_per_row:
            raise ValueError(
                f"shuffle_window={shuffle_window} is no more than a row of {tokens_per_row:,}: give a "
                "thousand times as many, or more"
            )
        self._portion_tokens = min(shuffle_window or self.tokens, self.tokens)
        self._portion_rows = -(-self._portion_tokens // tokens_per_row)
        self._last_portion = self.tokens // self._portion_tokens - 1
        self.rows_before_last_portion = self._last_portion * self._portion_rows
        last_tokens = self.tokens - self._last_portion * self._portion_tokens
        self.windows_per_epoch = self.rows_before_last_portion + -(-last_tokens // tokens_per_row)

    def batch(self, first_row: int, rows: int) -> Batch:
        """Rows first_row, first_row + 1, ... of the endless sequence of epochs."""
        stretches = np.empty((rows, self.tokens_per_row + 1), dtype=self._line.dtype)
        for row, stretch in enumerate(stretches, first_row):
            self._read_window(row, stretch)
        # Two passes over what lies in the processor's cache now, instead of two calls for each row.
        arrays = np.empty((2, rows, self.tokens_per_row), dtype=np.int64)
        arrays[0] = stretches[:, :-1]
        arrays[1] = stretches[:, 1:]
        ids, targets = torch.from_numpy(arrays)
        return Batch(ids, targets)

    def window_start(self, row: int) -> int:
        """Where among the tokens of the split a row begins."""
        return self._locate(row)[0]

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
        stretch = np.empty(shape[0] * shape[1] + 1, dtype=self._line.dtype)
        self._line.read(start, stretch)
        ids, targets = (
            torch.from_numpy(each.reshape(shape).astype(np.int64)) for each in (stretch[:-1], stretch[1:])
        )
        return Batch(ids, targets)

    def _read_window(self, row: int, stretch: Tokens) -> None:
        """Fill `stretch` with a row and its last target, past the end of its portion to the beginning."""
        start, begin, end = self._locate(row)
        ahead = end - start
        self._line.read(start, stretch[:ahead])
        if stretch.size > ahead:
            self._line.read(begin, stretch[ahead:])

    def _locate(self, row: int) -> tuple[int, int, int]:
        """Where a row begins, and where its portion begins and ends."""
        epoch, place = divmod(row, self.windows_per_epoch)
        portion = min(place // self._portion_rows, self._last_portion)
        begin = portion * self._portion_tokens
        end = self.tokens if portion == self._last_portion else begin + self._portion_tokens
        block, within = divmod(place - portion * self._portion_rows, PLACES_AT_ONCE)
        starts = _window_starts(self.seed, epoch, portion, end - begin, self.tokens_per_row, block)
        return begin + starts[within], begin, end


@functools.lru_cache(maxsize=16)
def _window_starts(
    seed: int, epoch: int, portion: int, tokens: int, tokens_per_row: int, block: int
) -> list[int]:
    """Where on a portion's circle the windows at PLACES_AT_ONCE neighbouring places of an epoch begin."""
    shift, order = _order(seed, epoch, portion, tokens, -(-tokens // tokens_per_row))
    first = block * PLACES_AT_ONCE
    windows = order.at(first, min(PLACES_AT_ONCE, order.size - first))
    starts: list[int] = ((shift + windows * tokens_per_row) % tokens).tolist()
    return starts


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, portion: int, tokens: int, windows: int) -> tuple[int, Permutation]:
    """Where on a portion's circle the epoch's first window begins, and the order of its windows."""
    which = f" of portion {portion}" if portion else ""
    (draw,) = derive_keys(seed, epoch, f"shift{which}", 1)
    return draw % tokens, build_permutation(windows, seed, epoch, f"order{which}")


class BatchSource(Protocol):
    """Anything that has rows: a stream, a mixture of streams, random ids."""

    def batch(self, first_row: int, rows: int) -> Batch:
        """Rows first_row, first_row + 1, ... first_row + rows - 1."""
        ...


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
        """The batch of these rows; starts to read the one that follows."""
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
        return Batch(self._send(batch.ids), self._send(batch.targets))

    def _send(self, ids: Tensor) -> Tensor:
        # Only from pinned memory does a copy run while the GPU computes.
        pinned = ids.pin_memory() if self._device.startswith("cuda") else ids
        return pinned.to(self._device, non_blocking=True)


def prefetch(source: BatchSource, device: str, next_row: Callable[[int], int] | None = None) -> BatchSource:
    """A PrefetchLoader; on the CPU `source` itself, since a thread would slow the computation down."""
    return source if device == "cpu" else PrefetchLoader(source, device, next_row)
