"""A shard opened for reading anywhere in it, and where a stream gets its shards from."""

from __future__ import annotations

import functools
import os
import resource
import weakref
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Protocol

from overnight.data.shards import Manifest, Shard, verify
from overnight.data.token_file import HEADER_BYTES, Tokens, open_tokens, token_format


class ShardFile:
    """Reads a shard's tokens from any place; the file is closed when nothing refers to this any more.

    It is read, not mapped: a map counts every page that was ever touched as this process's memory, and
    where the pages are not in memory yet, each touch waits for the megabytes the kernel reads around it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tokens = open_tokens(path).size
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    def read(self, first: int, into: Tokens) -> None:
        """Fill `into`, a contiguous array of the shard's own type, with the tokens from `first` on.

        Raises ValueError if the file ends before them.
        """
        if os.preadv(self._file, [into.data], HEADER_BYTES + first * into.itemsize) != into.nbytes:
            raise ValueError(f"{self.path} was cut short while it was read: prepare the data again")


class Reader(Protocol):
    """A shard, wherever it lies."""

    def read(self, first: int, into: Tokens) -> None:
        """Fill `into` with the tokens from `first` on, which are as they were written."""
        ...


class Shelf(Protocol):
    """A prepared folder, wherever it lies."""

    manifest: Manifest

    def open(self, shard: Shard) -> Reader:
        """One of its shards, to be read anywhere."""
        ...

    def path(self, shard: Shard) -> Path:
        """Where one of its shards lies on this machine, whole and verified."""
        ...


class LocalFolder:
    """A split of a prepared folder on this machine, every shard of it read here and found as it was written.

    Raises ValueError, naming the file, if one is not.
    """

    def __init__(self, folder: Path, split: str) -> None:
        self.folder = folder
        self.manifest = verify(folder, split)
        self._open = functools.lru_cache(files_at_once())(lambda name: ShardFile(folder / name))

    def open(self, shard: Shard) -> ShardFile:
        """One of its shards."""
        return self._open(shard.name)

    def path(self, shard: Shard) -> Path:
        """Where it lies."""
        return self.folder / shard.name

    def __str__(self) -> str:
        return str(self.folder)


class Line:
    """The tokens of a split, end to end from shard to shard."""

    def __init__(self, shelf: Shelf, split: str) -> None:
        self._shelf = shelf
        self._shards = shelf.manifest.shards(split)
        self._begins = [0, *accumulate(shard.tokens for shard in self._shards)]
        self.tokens = self._begins[-1]
        self.dtype = token_format(shelf.manifest.vocab_size).dtype

    def read(self, start: int, into: Tokens) -> None:
        """Fill `into`, a contiguous array of `dtype`, with the tokens from `start` on."""
        while True:
            index = bisect_right(self._begins, start) - 1
            file = self._shelf.open(self._shards[index])
            left = self._begins[index + 1] - start
            if into.size <= left:
                return file.read(start - self._begins[index], into)
            file.read(start - self._begins[index], into[:left])
            start, into = start + left, into[left:]


def files_at_once() -> int:
    """How many shards are kept open at once: an eighth of the files that this process may have open."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(16, limit // 8) if limit != resource.RLIM_INFINITY else 1 << 16
