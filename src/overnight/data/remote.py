"""A prepared folder at a URL (s3://, hf://, anything fsspec reads), with a local cache of its shards.

    <cache>/shards/<digest of the manifest>/
      manifest.json  tokenizer/     read when the folder is opened
      train-00000.bin ...           each downloaded when a row first needs it
      train-00000.pieces            digests of its pieces, kept when the shard is deleted
      .arriving/                    downloads in progress
      .train-00000.bin.lock         held while the shard is downloaded, opened or deleted

A token is used only after its shard was downloaded and verified. If the cache has a limit, a shard that was
deleted to make room is not downloaded again: its rows are read at the URL in pieces of 64 KiB, each compared
with its digest. So rows can come from all of a text that is larger than the disk. All processes of a
user share the cache.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import io
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np

from overnight.data.atomic_folder import lock_of
from overnight.data.shards import (
    HEADER_BYTES,
    MANIFEST,
    Shard,
    Tokens,
    read_manifest,
    token_format,
    verify_shard,
)
from overnight.data.text_files import first_line, is_remote, open_store
from overnight.data.token_reader import ShardFile, files_at_once
from overnight.files import cache_path, write_atomically
from overnight.terminal import byte_size, echo

PIECE_BYTES = 1 << 16
DIGEST_BYTES = 16


class RemoteFolder:
    """A prepared folder at a URL. `folder / name` is the local path of a downloaded shard.

    `cache_bytes` limits the local shards of all remote folders together: the least recently used ones are
    deleted. None keeps all. Opening reads the manifest and the tokenizer. Raises ValueError if they are
    missing or changed, or if the limit is less than one shard.
    """

    def __init__(self, address: str, cache_bytes: int | None = None) -> None:
        self.address = address.rstrip("/")
        self.cache_bytes = cache_bytes
        self._system, self._root = open_store(self.address)
        content = self._read(MANIFEST)
        self.folder = cache_path("shards", hashlib.sha256(content).hexdigest()[:16])
        write_atomically(self.folder / MANIFEST, content)
        try:
            self.manifest = read_manifest(self.folder)
        except ValueError as error:
            raise ValueError(f"{self.address}: {error}") from None
        self._read_tokenizer()
        self._opened: dict[str, ShardFile] = {}
        self._verified: set[str] = set()
        self._lock = threading.Lock()  # the prefetching thread and an evaluation may open shards at once
        self._check_limit()

    def __str__(self) -> str:
        return self.address

    def __truediv__(self, name: str) -> Path:
        """The local path of a shard, which is downloaded first, or of the tokenizer's folder.

        Raises ValueError if a shard cannot be fetched or does not match the manifest.
        """
        for shard in self.manifest.shards():
            if shard.name == name:
                with self._lock:
                    self._open_local(shard)
        return self.folder / name

    def read(self, shard: Shard, first: int, into: Tokens) -> None:
        """Fill `into` with the tokens of a shard from index `first` on. Raises ValueError as `/` does."""
        with self._lock:
            file = self._opened.get(shard.name)
            if file is None and not self._stays_remote(shard):
                file = self._open_local(shard)
            elif file is not None and self.cache_bytes is not None:
                _touch(self._local(shard))
        if file is None:
            self._read_remote(shard, first, into)
        else:
            file.read(first, into)

    def _read_remote(self, shard: Shard, first: int, into: Tokens) -> None:
        """Read tokens of a remote shard: one request for the pieces that hold them.

        If they differ from what was verified before, the whole shard is downloaded and verified again.
        """
        begin = HEADER_BYTES + first * into.itemsize
        pieces = range(begin // PIECE_BYTES, (begin + into.nbytes - 1) // PIECE_BYTES + 1)
        start, end = pieces[0] * PIECE_BYTES, min(pieces.stop * PIECE_BYTES, self._bytes(shard))
        content = self._read(shard.name, start, end)
        with self._pieces(shard).open("rb") as digests:
            digests.seek(pieces[0] * DIGEST_BYTES)
            is_verified = digests.read(len(pieces) * DIGEST_BYTES) == _digest_pieces(io.BytesIO(content))
        if is_verified:
            into[:] = np.frombuffer(content, into.dtype, into.size, begin - start)
            return
        self._pieces(shard).unlink(missing_ok=True)
        with self._lock:
            file = self._open_local(shard)
        file.read(first, into)

    def _local(self, shard: Shard) -> Path:
        return self.folder / shard.name

    def _pieces(self, shard: Shard) -> Path:
        return self._local(shard).with_suffix(".pieces")

    def _bytes(self, shard: Shard) -> int:
        return HEADER_BYTES + shard.tokens * token_format(self.manifest.vocab_size).dtype.itemsize

    def _open_local(self, shard: Shard) -> ShardFile:
        """A shard on this machine, downloaded if it is missing or damaged."""
        self._make_room(shard)
        local = self._local(shard)
        with lock_of(local):
            if shard.name not in self._verified or not local.is_file():
                try:
                    verify_shard(self.folder, shard, self.manifest.vocab_size)
                except ValueError:  # missing, or changed on the disk
                    self._download(shard)
            self._verified.add(shard.name)
            _touch(local)
            file = self._opened[shard.name] = ShardFile(local)
        if len(self._opened) > files_at_once():
            self._opened.pop(next(iter(self._opened)))
        return file

    def _stays_remote(self, shard: Shard) -> bool:
        """True if a shard was verified and deleted before, and there is still no room for it."""
        if self.cache_bytes is None or self._local(shard).is_file():
            return False
        needed = self._bytes(shard) + sum(size for _, size, _ in self._cached_shards())
        return self._pieces(shard).is_file() and needed > self.cache_bytes

    def _download(self, shard: Shard) -> None:
        """Download a shard; it is renamed to its final name once it is complete and verified."""
        arriving = self.folder / ".arriving" / shard.name
        arriving.parent.mkdir(exist_ok=True)
        url = f"{self.address}/{shard.name}"
        echo(f"fetching {url} ({byte_size(self._bytes(shard))})")
        try:
            self._system.get_file(f"{self._root}/{shard.name}", str(arriving))
            verify_shard(arriving.parent, shard, self.manifest.vocab_size)
            if self.cache_bytes is not None:
                with arriving.open("rb") as file:
                    write_atomically(self._pieces(shard), _digest_pieces(file))
            arriving.replace(self._local(shard))
        except ValueError:
            raise ValueError(f"{url} does not match its manifest: upload the folder again") from None
        except Exception as error:  # each store has its own error classes
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise ValueError(
                    f"the disk of {self.folder} is full: free some, or limit the cache with --cache-bytes"
                ) from None
            raise ValueError(f"{url} can't be fetched: {first_line(error)}") from None
        finally:
            arriving.unlink(missing_ok=True)

    def _make_room(self, needed: Shard) -> None:
        """Delete the least recently used shards until `needed` fits into the limit."""
        if self.cache_bytes is None:
            return
        cached = sorted(each for each in self._cached_shards() if each[2] != self._local(needed))
        total = sum(size for _, size, _ in cached) + self._bytes(needed)
        for _, size, path in cached:
            if total <= self.cache_bytes:
                return
            with lock_of(path):
                path.unlink(missing_ok=True)
            if path.parent == self.folder:
                self._opened.pop(path.name, None)  # an open file would keep its space on the disk
            total -= size

    def _cached_shards(self) -> Iterator[tuple[int, int, Path]]:
        """(time of last use, bytes, path) of every shard in the cache, of any folder."""
        for path in self.folder.parent.glob("*/*.bin"):
            with contextlib.suppress(FileNotFoundError):  # another process may have deleted it just now
                status = path.stat()
                yield status.st_mtime_ns, status.st_size, path

    def _check_limit(self) -> None:
        if self.cache_bytes is None:
            return
        largest = max(map(self._bytes, self.manifest.shards()))
        if self.cache_bytes < largest:
            raise ValueError(
                f"cache_bytes={self.cache_bytes} is less than the largest shard of {self.address}, which has "
                f"{largest} bytes: give at least that, or leave it out"
            )
        whole = sum(map(self._bytes, self.manifest.train))
        if self.cache_bytes < whole:
            echo(
                f"{self.address} has {byte_size(whole)} of training shards and the cache keeps "
                f"{byte_size(self.cache_bytes)}: rows are drawn from all of them, so about "
                f"{1 - self.cache_bytes / whole:.0%} of the rows will be read from the URL one by one"
            )

    def _read_tokenizer(self) -> None:
        """Download the tokenizer's files that are not in the cache."""
        try:
            paths = self._system.find(f"{self._root}/tokenizer")
        except Exception as error:  # each store has its own error classes
            raise ValueError(f"{self.address}/tokenizer can't be read: {first_line(error)}") from None
        for name in (PurePosixPath(path).name for path in paths):
            local = self.folder / "tokenizer" / name
            if not local.is_file():
                write_atomically(local, self._read(f"tokenizer/{name}"))

    def _read(self, name: str, first: int | None = None, last: int | None = None) -> bytes:
        try:
            content: bytes = self._system.cat_file(f"{self._root}/{name}", first, last)
        except FileNotFoundError:
            raise ValueError(
                f"{self.address} has no {name}: it is not a folder that `overnight prepare` finished"
            ) from None
        except Exception as error:  # each store has its own error classes
            raise ValueError(f"{self.address}/{name} can't be read: {first_line(error)}") from None
        return content


def is_prepared_elsewhere(address: str) -> bool:
    """True for a URL of prepared data; False for a URL of text that is still to be prepared."""
    if not is_remote(address):
        return False
    system, root = open_store(address)
    return bool(system.exists(f"{root}/{MANIFEST}"))


def _digest_pieces(file: BinaryIO) -> bytes:
    """The digests of a file's pieces, end to end."""
    pieces = iter(functools.partial(file.read, PIECE_BYTES), b"")
    return b"".join(hashlib.blake2b(piece, digest_size=DIGEST_BYTES).digest() for piece in pieces)


def _touch(path: Path) -> None:
    """Record that a shard is used. Another process may have deleted it; an open file stays readable."""
    now = time.time_ns()  # finer than the kernel's clock for file times
    with contextlib.suppress(FileNotFoundError):
        os.utime(path, ns=(now, now))
