"""Reads the tokens of a split from its shards, wherever they are stored."""

from __future__ import annotations

import functools
import hashlib
import os
import resource
import weakref
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from overnight.data.shards import (
    HEADER_BYTES,
    Manifest,
    Shard,
    Tokens,
    open_tokens,
    places_of,
    token_format,
    verify,
)

DOCUMENT_HASH_BYTES = 16  # of a hash of a document


class ShardStore(Protocol):
    """A prepared folder, local or remote."""

    manifest: Manifest

    def read(self, shard: Shard, first: int, into: Tokens) -> None:
        """Fill `into` with the tokens of a shard from index `first` on, verified against the manifest."""
        ...


class ShardFile:
    """A local shard. The file is closed when the last reference to this object is dropped.

    It is read with pread rather than mapped: every page of a map that was ever touched counts as this
    process's memory, and each page fault waits for the kernel's read-ahead of megabytes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tokens = open_tokens(path).size
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, first: int, into: Tokens) -> None:
        """Fill `into`, a contiguous array of the shard's dtype, with the tokens from index `first` on.

        Raises ValueError if the file ends before them.
        """
        offset = HEADER_BYTES + first * into.itemsize
        if os.preadv(self._descriptor, [into.data], offset) != into.nbytes:
            raise ValueError(f"{self.path} was truncated while it was read: prepare the data again")


class LocalStore:
    """A split of a prepared folder on this machine, every shard of which is verified on opening."""

    def __init__(self, folder: Path, split: str) -> None:
        self.manifest = verify(folder, split)
        self._open = functools.lru_cache(files_at_once())(lambda name: ShardFile(folder / name))

    def read(self, shard: Shard, first: int, into: Tokens) -> None:
        """Fill `into` with the tokens of a shard from index `first` on."""
        self._open(shard.name).read(first, into)


class TokenReader:
    """The tokens of a split as one array that spans all of its shards.

    Given a path, opening reads every shard of the split, and raises ValueError if one was changed; another
    ShardStore verifies in its own way. Raises ValueError if a row exceeds the data.
    """

    def __init__(self, folder: Path | str | ShardStore, split: str, tokens_per_row: int) -> None:
        self._store = LocalStore(Path(folder), split) if isinstance(folder, Path | str) else folder
        self.manifest = self._store.manifest
        self.dtype = token_format(self.manifest.vocab_size).dtype
        self._shards = self.manifest.shards(split)
        self._starts = [0, *accumulate(shard.tokens for shard in self._shards)]
        self.tokens = self._starts[-1]
        if not 1 <= tokens_per_row < self.tokens:
            raise ValueError(
                f"a row of {tokens_per_row:,} tokens and its targets do not fit in the {self.tokens:,} of "
                f"the {split} split of {folder}: shorten the context, or prepare more text"
            )

    def read(self, start: int, into: Tokens) -> None:
        """Fill `into`, a contiguous array of `dtype`, with the tokens from index `start` on."""
        while into.size:
            number = bisect_right(self._starts, start) - 1
            part = into[: self._starts[number + 1] - start]
            self._store.read(self._shards[number], start - self._starts[number], part)
            start, into = start + part.size, into[part.size :]


def files_at_once() -> int:
    """How many shards to keep open: an eighth of the files that this process may have open, at least 16."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(16, limit // 8) if limit != resource.RLIM_INFINITY else 1 << 16


# Documents in shards


class ShardSpan(NamedTuple):
    """The inspected part of a shard, and where documents begin in it."""

    shard: str
    ids: Tokens
    starts: NDArray[np.int64]


def shard_spans(folder: Path, manifest: Manifest, split: str, documents: int | None) -> Iterator[ShardSpan]:
    """The shards of a split, up to the end of its first `documents` if that is given.

    Text before the first end-of-text id is a document as well.
    """
    left = documents
    for number, shard in enumerate(manifest.shards(split)):
        ids = open_tokens(folder / shard.name)
        starts = places_of(manifest.end_of_text, ids)
        if number == 0 and (not starts.size or starts[0] != 0):
            starts = np.insert(starts, 0, 0)
        if left is not None and starts.size > left:
            yield ShardSpan(shard.name, ids[: starts[left]], starts[:left])
            return
        left = None if left is None else left - starts.size
        yield ShardSpan(shard.name, ids, starts)


def documents_of(parts: Iterable[ShardSpan]) -> Iterator[list[Tokens]]:
    """Each document, its end-of-text id included, as its pieces in consecutive shards."""
    pieces: list[Tokens] = []
    for part in parts:
        rest, *documents = np.split(part.ids, part.starts)
        pieces += [rest] if rest.size else []
        for document in documents:
            if pieces:
                yield pieces
            pieces = [document]
    if pieces:
        yield pieces


def content_of(pieces: list[Tokens], end_of_text: int) -> list[Tokens]:
    """The pieces of a document without its end-of-text id."""
    first, *others = pieces
    return [first[1:] if first[0] == end_of_text else first, *others]


def hash_document(content: list[Tokens]) -> hashlib.blake2b:
    """A hash of a document's ids, of `DOCUMENT_HASH_BYTES` bytes."""
    digest = hashlib.blake2b(digest_size=DOCUMENT_HASH_BYTES)
    for piece in content:
        digest.update(piece.data)
    return digest
