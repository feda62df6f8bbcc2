"""Several streams as one, each with its share of the rows. A row's source is a function of its number.

The sources are the leaves of a balanced binary tree. Of the first c rows that reach a node, round(c * share)
go left and the others right, where `share` is the left side's part of the weights. That number grows by 0 or
1 when c grows by 1, so every row goes one way at every node, and the count of earlier rows that went the same
way is its number there. Rounding adds at most half a row at each node, so of 2^d sources none is ever more
than d/2 rows from its exact share. (The smallest possible bound is 1 - 1/(2n - 2) for n sources, by a rule
that needs all earlier rows: R. Tijdeman, "The chairman assignment problem", 1980.)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Protocol

import torch

from overnight.data.loader import Batch, BatchSource, TokenStream


class SourceRows(BatchSource, Protocol):
    """The endless rows of one source of a mixture."""

    tokens: int
    tokens_per_row: int
    rows_per_epoch: int


class Interleaving:
    """Which source each row comes from. A source's share is its weight divided by the sum of all weights."""

    def __init__(self, weights: Sequence[float]) -> None:
        # Read from the decimal notation: 0.7 is 7/10 here, not the nearest binary fraction.
        exact = [Fraction(str(weight)) for weight in weights]
        self.shares = [weight / sum(exact) for weight in exact]
        denominator = math.lcm(*(share.denominator for share in self.shares))
        self._ends = [0, *itertools.accumulate(int(share * denominator) for share in self.shares)]

    def locate(self, row: int) -> tuple[int, int]:
        """(the source of a row, the row's number within that source)."""
        first, last = 0, len(self.shares)
        while last - first > 1:
            middle, before = self._count_left(first, last, row)
            if self._count_left(first, last, row + 1)[1] > before:
                last, row = middle, before
            else:
                first, row = middle, row - before
        return first, row

    def counts(self, rows: int) -> list[int]:
        """The number of rows from each source among the first `rows` rows."""
        return self._counts(0, len(self.shares), rows)

    def _counts(self, first: int, last: int, rows: int) -> list[int]:
        """The number of rows from each source of a node among the first `rows` rows that reach it."""
        if last - first == 1:
            return [rows]
        middle, left = self._count_left(first, last, rows)
        return [*self._counts(first, middle, left), *self._counts(middle, last, rows - left)]

    def _count_left(self, first: int, last: int, rows: int) -> tuple[int, int]:
        """(where the left side of a node ends, how many of the first `rows` rows that reach it go left).

        The node holds the sources from `first` to before `last`. Rounded half up, in exact arithmetic.
        """
        middle = (first + last + 1) // 2
        left, both = self._ends[middle] - self._ends[first], self._ends[last] - self._ends[first]
        return middle, (2 * rows * left + both) // (2 * both)


class Mixture:
    """Streams by name, each with its share of the rows; the order does not depend on how rows are fetched."""

    def __init__(self, streams: Mapping[str, SourceRows], weights: Sequence[float]) -> None:
        assert len(streams) == len(weights)
        self.names, self.streams = tuple(streams), tuple(streams.values())
        self.tokens = sum(stream.tokens for stream in self.streams)
        (self.tokens_per_row,) = {stream.tokens_per_row for stream in self.streams}
        self._interleaving = Interleaving(weights)

    def batch(self, first_row: int, rows: int) -> Batch:
        """Rows first_row, first_row + 1, ... of the mixture; each source's rows come in their own order."""
        first_of_source: dict[int, int] = {}
        indices_of_source: dict[int, list[int]] = {}
        for index in range(rows):
            source, number = self._interleaving.locate(first_row + index)
            first_of_source.setdefault(source, number)
            indices_of_source.setdefault(source, []).append(index)
        ids, targets = torch.empty((2, rows, self.tokens_per_row), dtype=torch.int64)
        for source, indices in indices_of_source.items():
            part = self.streams[source].batch(first_of_source[source], len(indices))
            ids[indices], targets[indices] = part.ids, part.targets
        return Batch(ids, targets)

    def describe_shares(self) -> str:
        """Each stream's share of the rows, as text."""
        shares = zip(self._interleaving.shares, self.names, strict=True)
        return ", ".join(f"{float(share):.1%} {name}" for share, name in shares)

    def rows_of_each(self, rows: int) -> list[int]:
        """The number of rows from each stream among the first `rows` rows."""
        return self._interleaving.counts(rows)

    def epochs_of_each(self, rows: int) -> list[float]:
        """The number of epochs of each stream in the first `rows` rows."""
        counts = self.rows_of_each(rows)
        return [count / stream.rows_per_epoch for count, stream in zip(counts, self.streams, strict=True)]


class Concatenation:
    """The validation splits of a mixture, one after the other, each in its own order, without weights."""

    def __init__(self, streams: Mapping[str, TokenStream]) -> None:
        self.names, self.streams = tuple(streams), tuple(streams.values())
        self.tokens = sum(stream.tokens for stream in self.streams)

    def evaluation_batches(self, rows: int, tokens: int | None = None) -> Iterator[Batch]:
        """Every target of all streams, or `tokens` of them; see `TokenStream.evaluation_batches`."""
        for stream, count in zip(self.streams, self.evaluation_tokens(tokens), strict=True):
            yield from stream.evaluation_batches(rows, count)

    def evaluation_tokens(self, tokens: int | None) -> list[int | None]:
        """How many of `tokens` targets each stream gets: in proportion to its length, at least one."""
        if tokens is None:
            return [None] * len(self.streams)
        limit, done, counts = min(tokens, self.tokens), 0, []
        for stream in self.streams:
            # Differences of rounded running totals: the counts add up to the limit.
            before, done = done, done + stream.tokens
            counts.append(max(1, limit * done // self.tokens - limit * before // self.tokens))
        return [*counts]
