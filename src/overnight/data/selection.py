"""What becomes of each document, and on which side of the split it is: both decided by its text alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Literal

from overnight.data.documents import Document

Fate = Literal["kept", "repaired", "duplicate", "empty", "skipped"]
KEPT: frozenset[Fate] = frozenset({"kept", "repaired"})


def judge(documents: Iterable[Document], on_bad_text: str) -> Iterator[tuple[Document, Fate]]:
    """Each document and what becomes of it.

    Raises ValueError at the first unsound text if on_bad_text is "fail".
    """
    seen: set[bytes] = set()
    for document in documents:
        if document.damage is not None and on_bad_text == "fail":
            raise ValueError(f"{document.damage}; mend it, or give --on-bad-text replace or skip")
        if document.damage is not None and on_bad_text == "skip":
            yield document, "skipped"
            continue
        digest = document_hash(document.text)
        if not document.text:
            yield document, "empty"
        elif digest in seen:
            yield document, "duplicate"
        else:
            yield document, "kept" if document.damage is None else "repaired"
        seen.add(digest)


def document_hash(text: str) -> bytes:
    """16 bytes that stand for a text."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def split_of(text: str, validation_fraction: float) -> str:
    """The side a text is on, "train" or "validation".

    A pure function of the text: no document changes sides when others are added, lost or reordered.
    """
    place = int.from_bytes(document_hash(text)[:8]) / 2**64
    return "validation" if place < validation_fraction else "train"
