"""Documents that are equal to one another, within a split and across both, by 16 bytes each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from overnight.data.selection import HASHES_AT_ONCE

HALVES = np.dtype([("high", "<u8"), ("low", "<u8")])


@dataclass(frozen=True, kw_only=True)
class Duplicates:
    """How many documents are equal to another one."""

    train: int
    """Training documents that are equal to an earlier training document."""
    validation: int
    """Validation documents that are equal to an earlier validation document."""
    validation_in_train: int
    """Validation documents that are equal to a training document."""
    first_in_both: int | None
    """The first validation document of that kind, counted from 0."""


def count_duplicates(train: bytes | bytearray, validation: bytes | bytearray) -> Duplicates:
    """Count equal digests; each split is its documents' 16-byte digests, end to end.

    Memory holds what sorting the digests of one range takes, so any number will do.
    """
    splits = [np.frombuffer(digests, dtype=HALVES) for digests in (train, validation)]
    ranges = -(-max(1, sum(map(len, splits))) // HASHES_AT_ONCE)
    repeated = np.zeros(2, dtype=np.int64)
    in_both: list[NDArray[np.int64]] = []
    for number in range(ranges):
        places = [np.flatnonzero(split["high"] % ranges == number) for split in splits]
        again, shared = _compare([split[place] for split, place in zip(splits, places, strict=True)])
        repeated += again
        in_both.append(places[1][shared])
    shared_places = np.concatenate(in_both)
    return Duplicates(
        train=int(repeated[0]),
        validation=int(repeated[1]),
        validation_in_train=shared_places.size,
        first_in_both=int(shared_places.min()) if shared_places.size else None,
    )


def _compare(splits: Sequence[NDArray[np.void]]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """(2,) how many are there again in each split; which of validation are also in training."""
    digests = np.concatenate(splits)
    order = np.lexsort((digests["low"], digests["high"]))
    ordered = digests[order]
    group = np.zeros(len(digests), dtype=np.int64)
    group[order[1:]] = np.cumsum(ordered[1:] != ordered[:-1])
    trained, validated = group[: len(splits[0])], group[len(splits[0]) :]
    groups = int(group.max()) + 1 if group.size else 0
    counts = [np.bincount(each, minlength=groups) for each in (trained, validated)]
    again = np.array([np.maximum(count - 1, 0).sum() for count in counts], dtype=np.int64)
    return again, counts[0][validated] > 0
