"""How often each id occurs, in passes over mapped tokens that leave nothing behind in memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from overnight.data.token_file import Tokens

AT_ONCE = 1 << 20  # tokens: what bincount needs for them stays within a processor's cache


def chunks(ids: Tokens, size: int = AT_ONCE) -> Iterator[Tokens]:
    """The ids in their order, at most `size` at a time."""
    for start in range(0, ids.size, size):
        yield ids[start : start + size]


def count_ids(ids: Tokens, vocab_size: int) -> NDArray[np.int64]:
    """(vocab_size,): how often each id occurs. Raises ValueError, giving the id, for one outside."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for chunk in chunks(ids):
        if (highest := int(chunk.max())) >= vocab_size:
            raise ValueError(f"the id {highest}, outside a vocabulary of {vocab_size:,}")
        counts += np.bincount(chunk, minlength=vocab_size)
    return counts


def places_of(id: int, ids: Tokens) -> NDArray[np.int64]:
    """Where one id stands, in order."""
    found = [np.flatnonzero(chunk == id) + number * AT_ONCE for number, chunk in enumerate(chunks(ids))]
    return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)


def byte_lengths(token_bytes: list[bytes]) -> NDArray[np.int64]:
    """(vocab_size,): how many bytes of text each id stands for."""
    return np.array([len(each) for each in token_bytes], dtype=np.int64)
