"""The binary format of token shards, as llm.c and modded-nanogpt read it.

256 little-endian int32: a magic number, a version, how many tokens follow; the rest zero. Then the
tokens, little-endian: uint16 behind 20240520, 1 (llm.c's GPT-2 files), or uint32 behind 20240801, 7
(its Llama 3 files) for a vocabulary of more than 65,536.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from overnight.run_directory import flush_folder, flush_to_disk

HEADER_BYTES = 256 * 4
CHUNK_BYTES = 1 << 20
REMEDY = "delete the folder and prepare it again"

Tokens = NDArray[np.unsignedinteger[Any]]  # uint16 or uint32


@dataclass(frozen=True)
class TokenFormat:
    """One of the two variants."""

    magic: int
    version: int
    dtype: np.dtype[Any]


SMALL = TokenFormat(20240520, 1, np.dtype("<u2"))
LARGE = TokenFormat(20240801, 7, np.dtype("<u4"))


def token_format(vocab_size: int) -> TokenFormat:
    """The smaller variant that holds every id below `vocab_size`."""
    return SMALL if vocab_size <= 65_536 else LARGE


def check_ids(ids: Tokens, vocab_size: int) -> None:
    """Raise ValueError if an id lies outside the vocabulary."""
    if ids.size and (highest := int(ids.max())) >= vocab_size:
        raise ValueError(
            f"the tokenizer gave the id {highest}, outside its vocabulary of {vocab_size:,}; "
            "its files do not belong together"
        )


class TokenFile:
    """A shard being written: nothing has its name until it is complete and on the disk."""

    def __init__(self, path: Path, vocab_size: int) -> None:
        self.path = path
        self.tokens = 0
        self.vocab_size = vocab_size
        self.format = token_format(vocab_size)
        self._partial = path.with_name(path.name + ".partial")
        self._file = self._partial.open("wb")
        self._file.write(bytes(HEADER_BYTES))

    def append(self, ids: Tokens) -> None:
        """Add ids at the end. Raises ValueError if one lies outside the vocabulary."""
        check_ids(ids, self.vocab_size)
        self._file.write(np.ascontiguousarray(ids, dtype=self.format.dtype).data)
        self.tokens += ids.size

    def close(self) -> str:
        """Complete the shard, give it its name, and return the sha256 of the file as it is on the disk."""
        header = np.zeros(256, dtype="<i4")
        header[:3] = self.format.magic, self.format.version, self.tokens
        self._file.seek(0)
        self._file.write(header.tobytes())
        self._file.flush()
        flush_to_disk(self._file.fileno())
        self._file.close()
        self._partial.replace(self.path)
        flush_folder(self.path.parent)
        return hash_tokens(self.path).sha256

    def abandon(self) -> None:
        """Drop a shard that is not to be completed."""
        self._file.close()
        self._partial.unlink(missing_ok=True)


def open_tokens(path: Path, remedy: str = REMEDY) -> Tokens:
    """The tokens of a shard, mapped into memory and not yet read.

    Raises ValueError, naming the file, if its header or its length is not as it must be.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing; {remedy}")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(HEADER_BYTES)
    if len(head) < HEADER_BYTES:
        raise ValueError(f"{path} is damaged: it ends after {size:,} bytes, within its header; {remedy}")
    header = np.frombuffer(head, dtype="<i4")
    magic, version, count = (int(word) for word in header[:3])
    known = {(each.magic, each.version): each for each in (SMALL, LARGE)}
    if (magic, version) not in known:
        raise ValueError(
            f"{path} is damaged, or no shard: it begins with {magic}, version {version}; {remedy}"
        )
    dtype = known[magic, version].dtype
    if count < 1 or header[3:].any():
        raise ValueError(f"{path} is damaged: its header is not one that is ever written; {remedy}")
    expected = HEADER_BYTES + count * dtype.itemsize
    if size != expected:
        raise ValueError(
            f"{path} is damaged: {count:,} tokens make {expected:,} bytes, and it has {size:,}; {remedy}"
        )
    # A plain array over the map: np.memmap's own slicing is several times slower.
    return np.asarray(np.memmap(path, dtype=dtype, mode="r", offset=HEADER_BYTES, shape=(count,)))


@dataclass(frozen=True)
class TokenSummary:
    """What reading a shard to its end tells."""

    sha256: str
    highest_id: int


def hash_tokens(path: Path) -> TokenSummary:
    """Read a shard once: the sha256 of the whole file, and the highest id in it."""
    tokens = open_tokens(path)
    digest, highest = hashlib.sha256(), 0
    with path.open("rb") as file:
        digest.update(file.read(HEADER_BYTES))
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            highest = max(highest, int(np.frombuffer(chunk, dtype=tokens.dtype).max()))
    return TokenSummary(digest.hexdigest(), highest)
