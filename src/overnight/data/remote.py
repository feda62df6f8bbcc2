"""A prepared folder that lies elsewhere (s3://, hf://, any place fsspec reaches), kept here as far as needed.

    <cache>/shards/<digest of the manifest>/
      manifest.json  tokenizer/     read when the folder is opened
      train-00000.bin ...           each fetched when a row first needs it
      train-00000.pieces            digests of its pieces, kept when it is deleted
      .arriving/                    shards that are being fetched
      .train-00000.bin.lock         held while one is fetched, opened or deleted

No token is used before its shard was read here, whole, and found as the manifest says. Where the cache has a
limit, a shard that was deleted for another's sake is not fetched again as a whole: its rows are read where it
lies, in pieces of 64 KiB, each compared with its digest. So rows may come from everywhere in a text that is
larger than the disk. All processes of a user share the cache.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
from filelock import FileLock

from overnight.data.shards import (
    HEADER_BYTES,
    Shard,
    ShardFile,
    ShardReader,
    Tokens,
    files_at_once,
    read_manifest,
    token_format,
    verify_shard,
)
from overnight.data.text_files import first_line, is_remote, open_store
from overnight.run_directory import cache_folder, write_atomically
from overnight.terminal import echo

PIECE_BYTES = 1 << 16
DIGEST_BYTES = 16


class RemoteFolder:
    """A prepared folder at a URL. `folder / name` is a shard's place on this machine, once it was fetched.

    `cache_bytes` limits the shards kept on this machine, of all such folders together: the least recently
    used are deleted. None keeps them all. Opening reads the manifest and the tokenizer; it raises
    ValueError if they are not there or not as they were written, or if the limit is less than a shard.
    """

    def __init__(self, address: str, cache_bytes: int | None = None) -> None:
        self.address = address.rstrip("/")
        self.cache_bytes = cache_bytes
        self._store = open_store(self.address)
        content = self._read("manifest.json")
        self.folder = _cache() / hashlib.sha256(content).hexdigest()[:16]
        write_atomically(self.folder / "manifest.json", content)
        try:
            self.manifest = read_manifest(self.folder)
        except ValueError as error:
            raise ValueError(f"{self.address}: {error}") from None
        self._read_tokenizer()
        self._opened: dict[str, ShardFile] = {}
        self._verified: set[str] = set()
        self._one_at_a_time = threading.Lock()  # the thread that reads ahead and an evaluation may meet
        self._check_limit()

    def __str__(self) -> str:
        return self.address

    def __truediv__(self, name: str) -> Path:
        """Where a shard, or the tokenizer's folder, lies on this machine."""
        shards = (*self.manifest.train, *self.manifest.validation)
        shard = next((each for each in shards if each.name == name), None)
        return self.path(shard) if shard else self.folder / name

    def path(self, shard: Shard) -> Path:
        """Where a shard lies on this machine: fetched and verified if it was not yet in this process.

        Raises ValueError if it can't be fetched, or is not as the manifest says.
        """
        with self._one_at_a_time:
            self._open_here(shard)
        return self.folder / shard.name

    def open(self, shard: Shard) -> ShardReader:
        """A shard, to be read anywhere. Raises ValueError as `path` does."""
        with self._one_at_a_time:
            file = self._opened.get(shard.name)
            if file is None:
                return RemoteShard(self, shard) if self._is_distant(shard) else self._open_here(shard)
            if self.cache_bytes is not None:
                _touch(self.folder / shard.name)
            return file

    def read_piece_by_piece(self, shard: Shard, pieces: range) -> bytes:
        """The bytes of some pieces of a shard that is not here.

        Where they are not as they were when the shard was verified, it is fetched as a whole, and verified.
        """
        first, last = pieces[0] * PIECE_BYTES, min((pieces[-1] + 1) * PIECE_BYTES, self._bytes(shard))
        content = self._read(shard.name, first, last)
        with self._pieces(shard).open("rb") as digests:
            digests.seek(pieces[0] * DIGEST_BYTES)
            if digests.read(len(pieces) * DIGEST_BYTES) == _digest_pieces(io.BytesIO(content)):
                return content
        self._pieces(shard).unlink(missing_ok=True)
        with self.path(shard).open("rb") as file:
            file.seek(first)
            return file.read(last - first)

    def _open_here(self, shard: Shard) -> ShardFile:
        """A shard that lies on this machine, or will in a moment."""
        self._make_room(shard)
        with _held(self.folder / shard.name):
            file = self._opened[shard.name] = self._open_sound(shard)
        if len(self._opened) > files_at_once():
            self._opened.pop(next(iter(self._opened)))
        return file

    def _is_distant(self, shard: Shard) -> bool:
        """True if a shard was verified here before, had to go, and there still is no room for it."""
        if self.cache_bytes is None or (self.folder / shard.name).is_file():
            return False
        kept = sum(size for _, size, _ in _kept())
        return self._pieces(shard).is_file() and kept + self._bytes(shard) > self.cache_bytes

    def _pieces(self, shard: Shard) -> Path:
        return (self.folder / shard.name).with_suffix(".pieces")

    def _open_sound(self, shard: Shard) -> ShardFile:
        path = self.folder / shard.name
        if not self._is_sound(shard):
            self._fetch(shard)
        self._verified.add(shard.name)
        _touch(path)
        return ShardFile(path)

    def _is_sound(self, shard: Shard) -> bool:
        if shard.name in self._verified and (self.folder / shard.name).is_file():
            return True
        try:
            verify_shard(self.folder, shard, self.manifest.vocab_size)
        except ValueError:  # it is missing, or the disk has changed it since
            return False
        return True

    def _fetch(self, shard: Shard) -> None:
        """Bring a shard here; it has its place once it is complete and verified."""
        arriving = self.folder / ".arriving" / shard.name
        arriving.parent.mkdir(exist_ok=True)
        echo(f"fetching {self.address}/{shard.name} ({self._bytes(shard) / 1e6:,.1f} MB)")
        try:
            self._store.system.get_file(f"{self._store.root}/{shard.name}", str(arriving))
            verify_shard(arriving.parent, shard, self.manifest.vocab_size)
            if self.cache_bytes is not None:
                with arriving.open("rb") as file:
                    write_atomically(self._pieces(shard), _digest_pieces(file))
            arriving.replace(self.folder / shard.name)
        except ValueError:
            raise ValueError(
                f"{self.address}/{shard.name} is not as its manifest says: upload the folder again"
            ) from None
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise ValueError(
                    f"the disk of {self.folder} is full: free some, or limit what is kept there with "
                    "--cache-bytes"
                ) from None
            raise ValueError(f"{self.address}/{shard.name} can't be fetched: {first_line(error)}") from None
        except Exception as error:  # every store has errors of its own
            raise ValueError(f"{self.address}/{shard.name} can't be fetched: {first_line(error)}") from None
        finally:
            arriving.unlink(missing_ok=True)

    def _make_room(self, needed: Shard) -> None:
        """Delete the least recently used shards until the one that is needed now fits into the limit."""
        if self.cache_bytes is None:
            return
        found = sorted(each for each in _kept() if each[2] != self.folder / needed.name)
        total = sum(size for _, size, _ in found) + self._bytes(needed)
        for _, size, path in found:
            if total <= self.cache_bytes:
                return
            with _held(path):
                path.unlink(missing_ok=True)
            if path.parent == self.folder:
                self._opened.pop(path.name, None)  # an open file keeps its place on the disk
            total -= size

    def _check_limit(self) -> None:
        if self.cache_bytes is None:
            return
        largest = max(map(self._bytes, (*self.manifest.train, *self.manifest.validation)))
        if self.cache_bytes < largest:
            raise ValueError(
                f"cache_bytes={self.cache_bytes} is less than the largest shard of {self.address}, which has "
                f"{largest}: give at least that, or leave it out"
            )
        whole = sum(map(self._bytes, self.manifest.train))
        if self.cache_bytes < whole:
            echo(
                f"{self.address} has {whole / 1e9:,.2f} GB of training shards and the cache keeps "
                f"{self.cache_bytes / 1e9:,.2f}: rows are drawn from all of them, so about "
                f"{1 - self.cache_bytes / whole:.0%} of the rows will be read from there one by one"
            )

    def _bytes(self, shard: Shard) -> int:
        return HEADER_BYTES + shard.tokens * token_format(self.manifest.vocab_size).dtype.itemsize

    def _read_tokenizer(self) -> None:
        """Bring the tokenizer's files here, those that are not here yet."""
        root = f"{self._store.root}/tokenizer"
        try:
            paths = self._store.system.find(root)
        except Exception as error:  # every store has errors of its own
            raise ValueError(f"{self.address}/tokenizer can't be read: {first_line(error)}") from None
        for path in map(PurePosixPath, paths):
            place = self.folder / "tokenizer" / path.name
            if not place.is_file():
                write_atomically(place, self._read(f"tokenizer/{path.name}"))

    def _read(self, name: str, first: int | None = None, last: int | None = None) -> bytes:
        try:
            content: bytes = self._store.system.cat_file(f"{self._store.root}/{name}", first, last)
        except FileNotFoundError:
            raise ValueError(
                f"{self.address} has no {name}: it is not a folder that `overnight prepare` finished"
            ) from None
        except Exception as error:  # every store has errors of its own
            raise ValueError(f"{self.address}/{name} can't be read: {first_line(error)}") from None
        return content


@dataclass(frozen=True)
class RemoteShard:
    """A shard that is read where it lies: each call is a request for the pieces that hold the tokens."""

    folder: RemoteFolder
    shard: Shard

    def read(self, first: int, into: Tokens) -> None:
        """Fill `into` with the tokens from `first` on. Raises ValueError if they can't be fetched."""
        begin = HEADER_BYTES + first * into.itemsize
        pieces = range(begin // PIECE_BYTES, (begin + into.nbytes - 1) // PIECE_BYTES + 1)
        content = self.folder.read_piece_by_piece(self.shard, pieces)
        into[:] = np.frombuffer(content, into.dtype, into.size, begin - pieces[0] * PIECE_BYTES)


def _digest_pieces(file: BinaryIO) -> bytes:
    """The digests of a file's pieces, end to end."""
    digests = []
    while piece := file.read(PIECE_BYTES):
        digests.append(hashlib.blake2b(piece, digest_size=DIGEST_BYTES).digest())
    return b"".join(digests)


def is_prepared_elsewhere(address: str) -> bool:
    """True for a URL at which a manifest lies: shards, not text that is still to be prepared."""
    if not is_remote(address):
        return False
    store = open_store(address)
    return bool(store.system.exists(f"{store.root}/manifest.json"))


def _cache() -> Path:
    """Where the shards of all folders elsewhere are kept."""
    return cache_folder() / "shards"


@contextmanager
def _held(path: Path) -> Iterator[None]:
    """Hold one shard's place in the cache for this process; wait while another has it."""
    with FileLock(path.with_name(f".{path.name}.lock")):
        yield


def _touch(path: Path) -> None:
    """Note that a shard is being used. It may have been deleted meanwhile: what is open stays readable."""
    now = time.time_ns()  # finer than the kernel's own idea of now
    with contextlib.suppress(FileNotFoundError):
        os.utime(path, ns=(now, now))


def _kept() -> Iterator[tuple[int, int, Path]]:
    """(when it was last used, its bytes, its place) of every shard in the cache, of any folder."""
    for path in _cache().glob("*/*.bin"):
        with contextlib.suppress(FileNotFoundError):  # another process may have deleted it just now
            status = path.stat()
            yield status.st_mtime_ns, status.st_size, path
