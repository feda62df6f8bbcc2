"""Several streams as one, each with its share of the rows: a pure function of the row number, too.

The sources are the leaves of a balanced binary tree. Of the first c rows that come to a fork, the nearest
whole number to c times the left side's share go left, the others right. That number grows by one or not at
all when c does, so every row goes one way at every fork, to one source; and how many rows went there
before it is its number in that source. Rounding adds at most half a row at each fork on the way down, so
of 2^d sources none is ever further than d/2 rows from its exact share of the rows so far. (The least that is
possible is 1 - 1/(2n - 2) for n sources, by a rule that needs the past. R. Tijdeman, "The chairman
assignment problem", 1980.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import torch
from torch import Tensor

from overnight.data.loader import Batch, TokenStream


class Rows(Protocol):
    """The rows of one text, without an end: what a mixture is made of."""

    tokens: int
    tokens_per_row: int
    windows_per_epoch: int

    def batch(self, first_row: int, rows: int) -> Batch:
        """Rows first_row, first_row + 1, ... of the endless sequence of epochs."""
        ...


@dataclass(frozen=True)
class _Fork:
    """Where the rows part. A side is a fork or the number of a source."""

    share: Fraction
    """Of the rows that come here, those that go left."""
    left: _Fork | int
    right: _Fork | int

    def count_left(self, rows: int) -> int:
        """How many of the first `rows` rows that come here go left: the nearest to their share."""
        above, below = self.share.numerator, self.share.denominator
        return (2 * rows * above + below) // (2 * below)


class Interleaving:
    """Which source each row comes from. A source's share is its weight by the sum of all weights."""

    def __init__(self, weights: Sequence[float]) -> None:
        if not weights or not all(0 < weight < float("inf") for weight in weights):
            raise ValueError(f"the weights {list(weights)} must be finite numbers above 0")
        # As they are written: 0.7 is 7/10 here, not the nearest binary fraction.
        exact = [Fraction(str(weight)) for weight in weights]
        self.shares = [weight / sum(exact) for weight in exact]
        self._top = self._build(0, len(weights))

    def _build(self, first: int, last: int) -> _Fork | int:
        if last - first == 1:
            return first
        middle = (first + last + 1) // 2
        share = sum(self.shares[first:middle]) / sum(self.shares[first:last])
        return _Fork(Fraction(share), self._build(first, middle), self._build(middle, last))

    def locate(self, row: int) -> tuple[int, int]:
        """(the source that a row comes from, its number among that source's rows)."""
        side, number = self._top, row
        while isinstance(side, _Fork):
            before = side.count_left(number)
            if side.count_left(number + 1) > before:
                side, number = side.left, before
            else:
                side, number = side.right, number - before
        return side, number

    def counts(self, rows: int) -> list[int]:
        """How many of the first `rows` rows come from each source."""
        counts = [0] * len(self.shares)
        open_sides = [(self._top, rows)]
        while open_sides:
            side, number = open_sides.pop()
            if isinstance(side, _Fork):
                left = side.count_left(number)
                open_sides += [(side.left, left), (side.right, number - left)]
            else:
                counts[side] = number
        return counts


class Mixture:
    """Streams by name, each with its share of the rows, in the same order however the rows are fetched."""

    def __init__(self, streams: Mapping[str, Rows], weights: Sequence[float]) -> None:
        assert len(streams) == len(weights)
        self.names, self.streams = tuple(streams), tuple(streams.values())
        self.tokens = sum(stream.tokens for stream in self.streams)
        (self.tokens_per_row,) = {stream.tokens_per_row for stream in self.streams}
        self._interleaving = Interleaving(weights)

    def batch(self, first_row: int, rows: int) -> Batch:
        """Rows first_row, first_row + 1, ... of the mixture; a source's own rows come in its own order."""
        places: dict[int, list[int]] = {}
        firsts: dict[int, int] = {}
        for place in range(rows):
            source, number = self._interleaving.locate(first_row + place)
            firsts.setdefault(source, number)
            places.setdefault(source, []).append(place)
        parts = [self.streams[source].batch(first, len(places[source])) for source, first in firsts.items()]
        if len(parts) == 1:
            return parts[0]
        order = torch.tensor([place for source in firsts for place in places[source]])
        ids, targets = (_put([getattr(part, name) for part in parts], order) for name in ("ids", "targets"))
        return Batch(ids, targets)

    def describe_shares(self) -> str:
        """Each stream's share of the rows, in words."""
        shares = zip(self._interleaving.shares, self.names, strict=True)
        return ", ".join(f"{float(share):.1%} {name}" for share, name in shares)

    def rows_of_each(self, rows: int) -> list[int]:
        """How many of the first `rows` rows come from each stream."""
        return self._interleaving.counts(rows)

    def epochs_of_each(self, rows: int) -> list[float]:
        """How often each stream has been gone through after so many rows."""
        counts = self.rows_of_each(rows)
        return [count / stream.windows_per_epoch for count, stream in zip(counts, self.streams, strict=True)]


class Concatenation:
    """Streams by name, one after the other, each in its own order: what a mixture is judged on.

    Weights have no say in it.
    """

    def __init__(self, streams: Mapping[str, TokenStream]) -> None:
        self.names, self.streams = tuple(streams), tuple(streams.values())
        self.tokens = sum(stream.tokens for stream in self.streams)

    def evaluation_batches(self, rows: int, tokens: int | None = None) -> Iterator[Batch]:
        """Every target of all streams, or `tokens` of them; see `TokenStream.evaluation_batches`."""
        for stream, count in zip(self.streams, self.evaluation_tokens(tokens), strict=True):
            yield from stream.evaluation_batches(rows, count)

    def evaluation_tokens(self, tokens: int | None) -> list[int | None]:
        """Of `tokens` to be judged, those of each stream: in proportion to its length, and at least one."""
        if tokens is None:
            return [None] * len(self.streams)
        ends = [0]
        for stream in self.streams:
            ends.append(ends[-1] + stream.tokens)
        marks = [min(tokens, self.tokens) * end // self.tokens for end in ends]
        return [max(1, mark - before) for before, mark in zip(marks, marks[1:], strict=False)]


def _put(parts: Sequence[Tensor], order: Tensor) -> Tensor:
    """Row order[i] of the result is row i of the parts, end to end."""
    together = torch.cat(list(parts))
    return torch.empty_like(together).index_copy_(0, order, together)
