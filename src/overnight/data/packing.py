"""Whole documents to rows: each row begins where a document does, and holds as few cut ones as may be.

The documents of an epoch come in an order of their own, and a row takes, again and again, the largest of
the next `BUFFER_DOCUMENTS` that fits into what is left of it. Where none fits, the smallest of them fills the
row, and its rest is cut off: so much is lost for that row beginning with a document. A document longer than
a row counts as one that fills a row, since its rest is lost in any case. The rows so made come in random
order; everything is a pure function of the seed and the epoch.
"""

from __future__ import annotations

import functools
from array import array
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from overnight.data.loader import Batch, TokenStream
from overnight.data.permutation import Permutation, build_permutation
from overnight.data.shards import LocalStore, ShardStore, TokenReader, Tokens

BUFFER_DOCUMENTS = 1024
ORDERED_DOCUMENTS = 1 << 14  # at a time: as arrays of 8 bytes each, and as Python's numbers
SCANNED_TOKENS = 1 << 22  # at a time, in 8 or 16 MB
EPOCHS_KEPT = 2  # a batch may have rows of two


@dataclass(frozen=True)
class PackedEpoch:
    """The rows of one epoch, as lists of documents."""

    documents: NDArray[np.uint32]
    """Of all rows, one row after the other; what does not fit at the end of a row is cut off."""
    row_starts: NDArray[np.int64]
    """Where each row's documents begin in these, and where the last row's end."""
    cut_tokens: int
    """Of all documents together, tokens that stand in no row."""

    @property
    def rows(self) -> int:
        """How many there are."""
        return self.row_starts.size - 1


class BestFitStream:
    """One split of a prepared folder, as rows that begin with a document: what TokenStream is to windows.

    Holds open files, 8 bytes for each document, and for each of two epochs 4 more and 16 for a row. Opening
    reads every shard once more than TokenStream, and packs the first epoch at a few microseconds a document;
    each epoch before a row that is asked for is packed first. Raises ValueError as TokenStream does, or if
    the split does not consist of documents.
    """

    def __init__(
        self, folder: Path | str | ShardStore, split: str = "train", *, tokens_per_row: int, seed: int = 0
    ) -> None:
        self._shelf = LocalStore(Path(folder), split) if isinstance(folder, Path | str) else folder
        self._windows = TokenStream(self._shelf, split, tokens_per_row=tokens_per_row, seed=seed)
        self.manifest, self.split, self.seed = self._shelf.manifest, split, seed
        self.tokens, self.tokens_per_row = self._windows.tokens, tokens_per_row
        self._line = TokenReader(self._shelf, split)
        end_of_text = self.manifest.end_of_text
        starts = self._find(end_of_text)
        if not starts.size or starts[0]:
            raise ValueError(
                f"the {split} split of {folder} does not begin with its end-of-text id, {end_of_text}, and "
                "packing=best-fit needs documents: choose packing=stream, or prepare the text again"
            )
        self._starts = np.append(starts, self.tokens)
        self._packed: dict[int, PackedEpoch] = {}
        self._epoch_ends: list[int] = []
        self.windows_per_epoch = self.epoch(0).rows

    def batch(self, first_row: int, rows: int) -> Batch:
        """Rows first_row, first_row + 1, ... of the endless sequence of epochs."""
        stretches = np.empty((rows, self.tokens_per_row + 1), dtype=self._line.dtype)
        for row, stretch in enumerate(stretches, first_row):
            self._fill(stretch, row)
        arrays = np.empty((2, rows, self.tokens_per_row), dtype=np.int64)
        arrays[0] = stretches[:, :-1]
        arrays[1] = stretches[:, 1:]
        ids, targets = torch.from_numpy(arrays)
        return Batch(ids, targets)

    def evaluation_batches(self, rows: int, tokens: int | None = None) -> Iterator[Batch]:
        """The split in its own order, unpacked, as TokenStream has it: losses can be compared."""
        return self._windows.evaluation_batches(rows, tokens)

    def epoch(self, epoch: int) -> PackedEpoch:
        """The rows of one epoch, in the order in which they were made."""
        if epoch not in self._packed:
            if len(self._packed) == EPOCHS_KEPT:
                del self._packed[min(self._packed)]
            lengths = np.diff(self._starts)
            order = build_permutation(lengths.size, self.seed, epoch)
            self._packed[epoch] = pack(lengths, order, self.tokens_per_row + 1)
        return self._packed[epoch]

    def describe_loss(self) -> str:
        """What is cut off in the first epoch, in words; other epochs differ by little."""
        cut = self.epoch(0).cut_tokens
        beyond = int(np.maximum(np.diff(self._starts) - (self.tokens_per_row + 1), 0).sum())
        return (
            f"{cut:,} of {self.tokens:,} tokens ({cut / self.tokens:.2%}) cut off in an epoch, {beyond:,} of "
            "them from documents longer than a row"
        )

    def _fill(self, stretch: Tokens, row: int) -> None:
        """Fill `stretch` with the documents of a row, the last one cut off where the row ends."""
        epoch, place = self._locate(row)
        packed = self.epoch(epoch)
        index = _row_order(packed.rows, self.seed, epoch)[place]
        for document in packed.documents[packed.row_starts[index] : packed.row_starts[index + 1]]:
            start, end = self._starts[document : document + 2].tolist()
            part, stretch = stretch[: end - start], stretch[end - start :]
            self._line.read(start, part)
        assert not stretch.size

    def _locate(self, row: int) -> tuple[int, int]:
        """(the epoch of a row, its place there): epochs differ in their number of rows."""
        ends = self._epoch_ends
        while not ends or row >= ends[-1]:
            ends.append((ends[-1] if ends else 0) + self.epoch(len(ends)).rows)
        epoch = bisect_right(ends, row)
        return epoch, row - (ends[epoch - 1] if epoch else 0)

    def _find(self, wanted: int) -> NDArray[np.int64]:
        """Every place of one id."""
        found = [np.empty(0, dtype=np.int64)]
        stretch = np.empty(min(SCANNED_TOKENS, self.tokens), dtype=self._line.dtype)
        for start in range(0, self.tokens, SCANNED_TOKENS):
            part = stretch[: self.tokens - start]
            self._line.read(start, part)
            found.append(np.flatnonzero(part == wanted) + start)
        return np.concatenate(found)


def pack(lengths: NDArray[np.int64], order: Permutation, tokens_per_row: int) -> PackedEpoch:
    """Best fit of documents that come in `order` into rows of `tokens_per_row`, targets included.

    Of documents of one size the last is taken where it fits, and the first is cut where none does. What is
    left in the end fills no row and is cut off, too: less than a row.
    """
    blocks = range(0, order.size, ORDERED_DOCUMENTS)
    numbers = np.concatenate(
        [order.at(first, min(ORDERED_DOCUMENTS, order.size - first)).astype(np.uint32) for first in blocks]
    )
    sizes = np.minimum(lengths, tokens_per_row)
    places, row_starts = array("I"), array("q", [0])
    room, cut = tokens_per_row, int((lengths - sizes).sum())
    upcoming = _sortable(sizes, numbers)
    buffer = sorted(islice(upcoming, BUFFER_DOCUMENTS))
    while buffer:
        fitting = bisect_left(buffer, (room + 1) * numbers.size)
        size, place = divmod(buffer.pop(max(0, fitting - 1)), numbers.size)
        places.append(place)
        room -= size
        if room <= 0:
            cut -= room
            room = tokens_per_row
            row_starts.append(len(places))
        for next_one in islice(upcoming, 1):
            insort(buffer, next_one)
    cut += tokens_per_row - room
    packed = numbers[np.frombuffer(places, dtype=np.uint32)[: row_starts[-1]]]
    return PackedEpoch(packed, np.array(row_starts, np.int64), cut)


@functools.lru_cache(maxsize=64)  # two epochs of each source of a mixture
def _row_order(rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order in which an epoch's rows are read."""
    return build_permutation(rows, seed, epoch).at(0, rows)


def _sortable(sizes: NDArray[np.int64], numbers: NDArray[np.uint32]) -> Iterator[int]:
    """Each document's size and its place in the order as one number; some at a time become Python's."""
    for first in range(0, numbers.size, ORDERED_DOCUMENTS):
        chosen = numbers[first : first + ORDERED_DOCUMENTS]
        yield from (sizes[chosen] * numbers.size + np.arange(first, first + chosen.size)).tolist()
