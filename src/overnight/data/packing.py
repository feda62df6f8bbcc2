"""Whole documents to rows (best-fit packing): each row begins with a document, and few documents are cut.

An epoch shuffles the documents. A row is filled from a buffer of the next `BUFFER_DOCUMENTS`: it takes the
largest that fits into its remaining room, repeatedly. If none fits, the smallest one fills the row and
its rest is dropped, so that each row begins with a document. A document longer than a row
counts as one row long, since its rest is dropped in any case. The packed rows are then read in random order.
All of this is a pure function of the seed and the epoch.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from overnight.data.loader import Batch
from overnight.data.permutation import Permutation, build_permutation
from overnight.data.shards import Tokens
from overnight.data.token_reader import ShardStore, TokenReader

BUFFER_DOCUMENTS = 1024
ORDERED_DOCUMENTS = 1 << 14  # documents ordered at a time
SCANNED_TOKENS = 1 << 22  # tokens scanned at a time: 8 or 16 MB
EPOCHS_KEPT = 2  # a batch may span two epochs


@dataclass(frozen=True)
class PackedEpoch:
    """The rows of one epoch, as lists of documents."""

    documents: NDArray[np.uint32]
    """The documents' numbers, row after row. The last document of a row is cut where the row ends."""
    rows: NDArray[np.int64]
    """(rows, 2): where the documents of each row start and end in `documents`."""
    cut_tokens: int
    """Number of tokens of documents that are in no row."""


class BestFitStream:
    """One split of a prepared folder as an endless sequence of rows of whole documents.

    Memory: 8 bytes a document, and for each of two epochs 4 bytes a document and 16 a row. Opening reads all
    shards once more than TokenStream and packs the first epoch, at a few microseconds a document. Before a
    row is read, all earlier epochs are packed, since their numbers of rows differ. Raises ValueError as
    TokenReader does, and if the split does not begin with an end-of-text id.
    """

    def __init__(
        self, folder: Path | str | ShardStore, split: str = "train", *, tokens_per_row: int, seed: int = 0
    ) -> None:
        self._reader = TokenReader(folder, split, tokens_per_row)
        self.tokens, self.tokens_per_row, self.seed = self._reader.tokens, tokens_per_row, seed
        end_of_text = self._reader.manifest.end_of_text
        starts = self._find(end_of_text)
        if not starts.size or starts[0]:
            raise ValueError(
                f"the {split} split of {folder} does not begin with its end-of-text id, {end_of_text}, and "
                "packing=best-fit needs documents: choose packing=stream, or prepare the text again"
            )
        self._starts = np.append(starts, self.tokens)
        self._packed: dict[int, PackedEpoch] = {}
        self._epoch_ends: list[int] = []
        self.rows_per_epoch = len(self.epoch(0).rows)

    def batch(self, first_row: int, rows: int) -> Batch:
        """Rows first_row, first_row + 1, ... of the endless sequence of epochs."""
        tokens = np.empty((rows, self.tokens_per_row + 1), dtype=self._reader.dtype)
        for number, row in enumerate(tokens, first_row):
            self._fill(row, number)
        return Batch.from_tokens(tokens)

    def epoch(self, epoch: int) -> PackedEpoch:
        """The rows of one epoch, in the order in which they are read."""
        if epoch not in self._packed:
            if len(self._packed) == EPOCHS_KEPT:
                del self._packed[min(self._packed)]
            lengths = np.diff(self._starts)
            packed = pack(lengths, build_permutation(lengths.size, self.seed, epoch), self.tokens_per_row + 1)
            rows = len(packed.rows)
            order = build_permutation(rows, self.seed, epoch).at(0, rows)
            self._packed[epoch] = PackedEpoch(packed.documents, packed.rows[order], packed.cut_tokens)
        return self._packed[epoch]

    def describe_loss(self) -> str:
        """The tokens that are cut off in the first epoch, as text; other epochs differ by little."""
        cut = self.epoch(0).cut_tokens
        beyond = int(np.maximum(np.diff(self._starts) - (self.tokens_per_row + 1), 0).sum())
        return (
            f"{cut:,} of {self.tokens:,} tokens ({cut / self.tokens:.2%}) cut off in an epoch, {beyond:,} of "
            "them from documents longer than a row"
        )

    def _fill(self, row: Tokens, number: int) -> None:
        """Fill `row` with its documents; the last one is cut where the row ends."""
        epoch, index = self._locate(number)
        packed = self.epoch(epoch)
        first, last = packed.rows[index]
        for document in packed.documents[first:last]:
            start, end = self._starts[document : document + 2].tolist()
            self._reader.read(start, row[: end - start])
            row = row[end - start :]
        assert not row.size

    def _locate(self, row: int) -> tuple[int, int]:
        """(the epoch of a row, its index there): epochs differ in their number of rows."""
        ends = self._epoch_ends
        while not ends or row >= ends[-1]:
            ends.append((ends[-1] if ends else 0) + len(self.epoch(len(ends)).rows))
        epoch = bisect_right(ends, row)
        return epoch, row - (ends[epoch - 1] if epoch else 0)

    def _find(self, wanted: int) -> NDArray[np.int64]:
        """Every index at which one id occurs."""
        found = []
        tokens = np.empty(min(SCANNED_TOKENS, self.tokens), dtype=self._reader.dtype)
        for start in range(0, self.tokens, SCANNED_TOKENS):
            part = tokens[: self.tokens - start]
            self._reader.read(start, part)
            found.append(np.flatnonzero(part == wanted) + start)
        return np.concatenate(found)


def pack(lengths: NDArray[np.int64], order: Permutation, tokens_per_row: int) -> PackedEpoch:
    """Pack documents that come in `order` into rows of `tokens_per_row` tokens, targets included.

    Of documents of one size the last is taken if it fits, and the first is cut if none fits. What remains at
    the end is shorter than a row and is dropped as well.
    """
    blocks = range(0, order.size, ORDERED_DOCUMENTS)
    numbers = np.concatenate(
        [order.at(first, min(ORDERED_DOCUMENTS, order.size - first)).astype(np.uint32) for first in blocks]
    )
    sizes = np.minimum(lengths, tokens_per_row)
    indices, row_ends = array("I"), array("q", [0])
    room, cut = tokens_per_row, int((lengths - sizes).sum())
    upcoming = _sortable(sizes, numbers)
    buffer = sorted(islice(upcoming, BUFFER_DOCUMENTS))
    while buffer:
        fitting = bisect_left(buffer, (room + 1) * numbers.size)
        size, index = divmod(buffer.pop(max(0, fitting - 1)), numbers.size)
        indices.append(index)
        room -= size
        if room <= 0:
            cut -= room
            room = tokens_per_row
            row_ends.append(len(indices))
        for document in islice(upcoming, 1):
            insort(buffer, document)
    cut += tokens_per_row - room
    documents = numbers[np.frombuffer(indices, dtype=np.uint32)[: row_ends[-1]]]
    edges = np.array(row_ends, np.int64)
    return PackedEpoch(documents, np.stack([edges[:-1], edges[1:]], axis=1), cut)


def _sortable(sizes: NDArray[np.int64], numbers: NDArray[np.uint32]) -> Iterator[int]:
    """Each document's size and index in the order as one integer, size * documents + index.

    Arrays become Python integers block by block, to save memory.
    """
    for first in range(0, numbers.size, ORDERED_DOCUMENTS):
        chosen = numbers[first : first + ORDERED_DOCUMENTS]
        yield from (sizes[chosen] * numbers.size + np.arange(first, first + chosen.size)).tolist()
