"""What becomes of each document, and on which side of the split it is: both decided by its text alone.

A document is known by 16 bytes, a hash of its text. So duplicates are found, and sides chosen, without
the texts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from overnight.data.documents import Document

Fate = Literal["kept", "repaired", "duplicate", "empty", "skipped", "near-duplicate", "contaminated"]
FATES: tuple[Fate, ...] = get_args(Fate)
KEPT: frozenset[Fate] = frozenset({"kept", "repaired"})

RECORD = np.dtype(
    [("hash_high", "<u8"), ("hash_low", "<u8"), ("tokens", "<u4"), ("bytes", "<u4"), ("fate", "u1")]
)
"""What is remembered of a document: its hash's halves, what it is long, and its place in FATES."""

HASHES_AT_ONCE = 16_000_000  # in which duplicates are looked for: about a gigabyte with what sorting takes

Records = NDArray[Any]


def judge(documents: Iterable[Document], on_bad_text: str) -> Iterator[tuple[Document, Fate]]:
    """Each document and what becomes of it, looked at alone: kept, repaired, empty or skipped.

    Raises ValueError at the first unsound text if on_bad_text is "fail".
    """
    for document in documents:
        if document.damage is not None and on_bad_text == "fail":
            raise ValueError(f"{document.damage}; mend it, or give --on-bad-text replace or skip")
        if document.damage is not None and on_bad_text == "skip":
            yield document, "skipped"
        elif not document.text:
            yield document, "empty"
        else:
            yield document, "kept" if document.damage is None else "repaired"


def document_hash(text: str) -> bytes:
    """16 bytes that stand for a text."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def split_of(text: str, validation_fraction: float) -> str:
    """The side a text is on, "train" or "validation".

    A pure function of the text: no document changes sides when others are added, lost or reordered.
    """
    place = int.from_bytes(document_hash(text)[:8]) / 2**64
    return "validation" if place < validation_fraction else "train"


def is_validation(records: Records, validation_fraction: float) -> NDArray[np.bool_]:
    """`split_of` for many documents at once, by their hashes."""
    falls_below: NDArray[np.bool_] = records["hash_high"] / 2.0**64 < validation_fraction
    return falls_below


def are_kept(fates: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which of the documents go into the shards."""
    return np.isin(fates, [FATES.index(fate) for fate in KEPT])


def find_duplicates(groups: Sequence[Records]) -> list[NDArray[np.bool_]]:
    """For each group of records which documents are equal to one before, in this group or an earlier one.

    Only documents to be kept count. Memory holds the hashes of a range at a time, so any number will do.
    """
    found = [np.zeros(len(records), dtype=bool) for records in groups]
    ranges = -(-max(1, sum(map(len, groups))) // HASHES_AT_ONCE)
    edges = [2**64 * number // ranges for number in range(ranges + 1)]
    for begin, end in zip(edges, edges[1:], strict=False):
        places = [_in_range(records, begin, end) for records in groups]
        high, low = (
            np.concatenate([records[half][place] for records, place in zip(groups, places, strict=True)])
            for half in ("hash_high", "hash_low")
        )
        order = np.lexsort((low, high))  # stable: equal ones stay in their order
        equal = (high[order][1:] == high[order][:-1]) & (low[order][1:] == low[order][:-1])
        again = np.zeros(len(order), dtype=bool)
        again[order[1:][equal]] = True
        sizes = np.cumsum([len(place) for place in places])[:-1]
        for duplicate, place, part in zip(found, places, np.split(again, sizes), strict=True):
            duplicate[place] = part
    return found


def _in_range(records: Records, begin: int, end: int) -> NDArray[np.intp]:
    """Where the documents to be kept stand whose hash begins so."""
    high = records["hash_high"]
    inside = (high >= np.uint64(begin)) & (high <= np.uint64(end - 1)) & are_kept(records["fate"])
    return np.flatnonzero(inside)
