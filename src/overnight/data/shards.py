"""A prepared folder: shards of tokens, the tokenizer that made them, and a manifest with their checksums.

    data/<name>/
      manifest.json        contents, source, and the sha256 of every shard
      train-00000.bin ...  the ids, in the binary format of llm.c and modded-nanogpt
      validation-00000.bin ...
      tokenizer/

A shard is a header of 256 little-endian int32 (magic number, version, number of tokens, zeros) and the ids as
uint16 or uint32. The manifest is written last. A folder is used only if it verifies, byte for byte.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from overnight.data.atomic_folder import staging_path
from overnight.files import flush_folder, flush_to_disk, write_atomically
from overnight.tokenizer.open_tokenizer import load_tokenizer
from overnight.tokenizer.tokenizer import Tokenizer

FORMAT_VERSION = 2
SPLITS = ("train", "validation")
MANIFEST = "manifest.json"
SO_FAR = "so-far.json"  # manifest of the shards that are complete so far
SHARD_NAME = re.compile(r"(train|validation)-\d{5,}(-\d+)?\.bin")
FILE_COUNTS = ("files_read", "files_left_alone")
OPTIONAL_FIELDS = ("near_duplicate_documents", "contaminated_documents", *FILE_COUNTS)
REMEDY = "delete the folder and prepare it again"

HEADER_BYTES = 256 * 4
READ_BYTES = 1 << 20
COUNTED_TOKENS = 1 << 20  # at a time, so that bincount's int64 copy stays within the processor's cache

Tokens = NDArray[np.unsignedinteger[Any]]  # uint16 or uint32


# Files of tokens


@dataclass(frozen=True)
class TokenFormat:
    """The header's first two words, and the type of the ids."""

    magic: int
    version: int
    dtype: np.dtype[Any]


SMALL = TokenFormat(20240520, 1, np.dtype("<u2"))
LARGE = TokenFormat(20240801, 7, np.dtype("<u4"))


def token_format(vocab_size: int) -> TokenFormat:
    """The smaller format that holds every id below `vocab_size`."""
    return SMALL if vocab_size <= 65_536 else LARGE


def check_ids(ids: Tokens, vocab_size: int) -> None:
    """Raise ValueError if an id is outside the vocabulary."""
    if ids.size and (highest := int(ids.max())) >= vocab_size:
        raise ValueError(
            f"the tokenizer gave the id {highest}, outside its vocabulary of {vocab_size:,}; "
            "its files do not belong together"
        )


class TokenFile:
    """A shard being written. It is renamed to its final name when it is complete and on the disk."""

    def __init__(self, path: Path, vocab_size: int) -> None:
        self.path = path
        self.tokens = 0
        self.vocab_size = vocab_size
        self.format = token_format(vocab_size)
        self._partial = path.with_name(path.name + ".partial")
        self._file = self._partial.open("wb")
        self._file.write(bytes(HEADER_BYTES))

    def append(self, ids: Tokens) -> None:
        """Add ids at the end. Raises ValueError if one is outside the vocabulary."""
        check_ids(ids, self.vocab_size)
        self._file.write(np.ascontiguousarray(ids, dtype=self.format.dtype).data)
        self.tokens += ids.size

    def close(self) -> str:
        """Complete and rename the shard; returns the sha256 of the file as read back from the disk."""
        header = np.zeros(256, dtype="<i4")
        header[:3] = self.format.magic, self.format.version, self.tokens
        self._file.seek(0)
        self._file.write(header.tobytes())
        self._file.flush()
        flush_to_disk(self._file.fileno())
        self._file.close()
        self._partial.replace(self.path)
        flush_folder(self.path.parent)
        return hash_tokens(self.path)[0]

    def abandon(self) -> None:
        """Delete a shard that will not be completed."""
        self._file.close()
        self._partial.unlink(missing_ok=True)


def open_tokens(path: Path, remedy: str = REMEDY) -> Tokens:
    """The tokens of a shard, memory-mapped.

    Raises ValueError, naming the file, if its header or its length is wrong.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing; {remedy}")
    size = path.stat().st_size
    with path.open("rb") as file:
        header = np.frombuffer(file.read(HEADER_BYTES).ljust(HEADER_BYTES, b"\0"), dtype="<i4")
    magic, version, count = header[:3].tolist()
    dtype = {(each.magic, each.version): each.dtype for each in (SMALL, LARGE)}.get((magic, version))
    if size < HEADER_BYTES:
        problem = f"it ends after {size:,} bytes, within its header"
    elif dtype is None:
        problem = f"its magic number is {magic}, its version {version}, which no shard has"
    elif count < 1 or header[3:].any():
        problem = "its header is not valid"
    elif size != (expected := HEADER_BYTES + count * dtype.itemsize):
        problem = f"{count:,} tokens make {expected:,} bytes, and it has {size:,}"
    else:  # a plain array over the map: np.memmap's own slicing is several times slower
        return np.asarray(np.memmap(path, dtype=dtype, mode="r", offset=HEADER_BYTES, shape=(count,)))
    raise ValueError(f"{path} is damaged: {problem}; {remedy}")


def hash_tokens(path: Path) -> tuple[str, int]:
    """(sha256 of a whole shard's file, highest id in it); reads the file once."""
    dtype = open_tokens(path).dtype
    digest, highest = hashlib.sha256(), 0
    with path.open("rb") as file:
        digest.update(file.read(HEADER_BYTES))
        while content := file.read(READ_BYTES):
            digest.update(content)
            highest = max(highest, int(np.frombuffer(content, dtype).max()))
    return digest.hexdigest(), highest


# The manifest


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of tokens. A document that spans shards is counted where it begins, with all its bytes."""

    name: str
    tokens: int
    documents: int
    text_bytes: int
    """UTF-8 bytes of the documents' text."""
    sha256: str
    """Hash of the whole file, including its header."""

    @property
    def is_growing(self) -> bool:
        """True if this is the beginning of a shard whose rest is being prepared: train-00007-12345.bin."""
        return self.name.count("-") > 1


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of a prepared folder. The same request gives the same bytes on any machine."""

    format_version: int = FORMAT_VERSION
    overnight_version: str
    source: str
    licence: str
    request: dict[str, str | int | float | None]
    """The options that decide the content: compared when the folder is prepared again."""
    split_rule: str
    tokenizer: str
    tokenizer_fingerprint: str
    vocab_size: int
    end_of_text: int
    """The id before each document."""
    documents: int
    """Documents in the shards. The counts below are of documents that were left out or changed."""
    duplicate_documents: int = 0
    empty_documents: int = 0
    skipped_documents: int = 0
    """Not valid text; left out (on_bad_text="skip")."""
    repaired_documents: int = 0
    """Not valid text; kept with U+FFFD for invalid bytes (on_bad_text="replace")."""
    damaged_files: int = 0
    """Truncated or damaged; left out (on_bad_file="skip")."""
    near_duplicate_documents: int = 0
    """Left out (near_duplicates="drop")."""
    contaminated_documents: dict[str, int] = field(default_factory=dict)
    """Benchmark -> number of documents that share a passage with it (left out if on_contaminated="drop")."""
    files_read: dict[str, list[int]] = field(default_factory=dict)
    """Kind of file -> [number, bytes as stored]."""
    files_left_alone: dict[str, list[int]] = field(default_factory=dict)
    """The same, of the files of the source that are not of a kind that is read."""
    train: tuple[Shard, ...]
    validation: tuple[Shard, ...]

    def shards(self, split: str | None = None) -> tuple[Shard, ...]:
        """The shards of "train" or "validation", in order; of both if left out."""
        match split:
            case "train":
                return self.train
            case "validation":
                return self.validation
            case None:
                return (*self.train, *self.validation)
        raise ValueError(f"split={split!r} must be train or validation")

    def tokens(self, split: str) -> int:
        """How many tokens one split has, end-of-text ids included."""
        return sum(shard.tokens for shard in self.shards(split))

    def text_bytes(self, split: str) -> int:
        """How many bytes of UTF-8 one split's documents have."""
        return sum(shard.text_bytes for shard in self.shards(split))

    def to_json(self) -> str:
        """The text of manifest.json; its last field is the sha256 of the others."""
        fields = dataclasses.asdict(self)
        for name in OPTIONAL_FIELDS:  # older folders lack them and must still verify
            if not fields[name]:
                del fields[name]
        checksum = hashlib.sha256(json.dumps(fields).encode()).hexdigest()
        return json.dumps(fields | {"sha256_of_the_above": checksum}, indent=2) + "\n"


def write_split(
    folder: Path, split: str, documents: Sequence[tuple[Tokens, int]], vocab_size: int, shard_tokens: int
) -> tuple[Shard, ...]:
    """Write documents, each its ids and its bytes of text, as shards; only the last one may be shorter."""
    ids = np.concatenate([ids for ids, _ in documents])
    text_bytes = np.array([size for _, size in documents])
    begins = np.cumsum([0, *(each.size for each, _ in documents[:-1])])
    shards = []
    for number, start in enumerate(range(0, ids.size, shard_tokens)):
        file = TokenFile(folder / f"{split}-{number:05d}.bin", vocab_size)
        file.append(ids[start : start + shard_tokens])
        here = (begins >= start) & (begins < start + shard_tokens)
        counts = {"documents": int(here.sum()), "text_bytes": int(text_bytes[here].sum())}
        shards.append(Shard(name=file.path.name, tokens=file.tokens, sha256=file.close(), **counts))
    return tuple(shards)


def write_manifest(folder: Path, manifest: Manifest, name: str = MANIFEST) -> None:
    """Write the manifest of `folder`, all of whose shards are complete and on the disk."""
    write_atomically(folder / name, manifest.to_json())


def is_being_prepared(folder: Path) -> bool:
    """True if a folder is partly prepared, whether or not a process is working on it."""
    return not (folder / MANIFEST).is_file() and staging_path(folder).is_dir()


def read_manifest(folder: Path, name: str = MANIFEST) -> Manifest:
    """The manifest of a prepared folder. Raises ValueError if it is missing or changed."""
    path = folder / name
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):  # or renamed just now
        raise ValueError(
            f"{folder} has no {name}: it is not a folder that `overnight prepare` finished"
        ) from None
    try:
        fields = json.loads(content)
        version = fields["format_version"]
        del fields["sha256_of_the_above"]  # `to_json` computes it again
        if version == FORMAT_VERSION:
            for split in SPLITS:
                fields[split] = tuple(Shard(**shard) for shard in fields[split])
            manifest = Manifest(**fields)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise ValueError(
            f"{folder} was not written by `overnight prepare`, or its {name} is damaged: "
            "prepare the text into another folder"
        ) from None
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format version {version!r}, and this is {FORMAT_VERSION}; {REMEDY}")
    if manifest.to_json().encode() != content:  # every byte, the checksum included
        raise ValueError(f"{path} was changed since it was written; {REMEDY}")
    for split in SPLITS:
        for shard in manifest.shards(split):  # plain file names: no manifest points out of its folder
            if not SHARD_NAME.fullmatch(shard.name) or not shard.name.startswith(split):
                raise ValueError(f"{path} names {shard.name!r}, which is not a shard of {split}; {REMEDY}")
    return manifest


# Verification


def verify(folder: Path, split: str | None = None) -> Manifest:
    """The manifest of a folder whose shards (of one split, if given) were all read and match it.

    Raises ValueError, naming the file, for a shard that is missing, not in the manifest, truncated or changed
    in a single bit, and for an id outside the vocabulary. Reads about a gigabyte per second and core.
    """
    manifest = read_manifest(folder)
    known = {shard.name for shard in manifest.shards()}
    if unknown := sorted(path.name for path in folder.glob("*.bin") if path.name not in known):
        raise ValueError(f"{folder / unknown[0]} is not in the manifest; remove it, or {REMEDY}")
    with ThreadPoolExecutor() as threads:
        list(
            threads.map(
                lambda shard: verify_shard(folder, shard, manifest.vocab_size), manifest.shards(split)
            )
        )
    return manifest


def verify_shard(folder: Path, shard: Shard, vocab_size: int) -> None:
    """Read one shard. Raises ValueError, naming the file, if it does not match its manifest."""
    path = folder / shard.name
    tokens = open_tokens(path)
    if tokens.size != shard.tokens or tokens.dtype != token_format(vocab_size).dtype:
        raise ValueError(
            f"{path} holds {tokens.size:,} tokens as {tokens.dtype}, and its manifest says {shard.tokens:,} "
            f"for a vocabulary of {vocab_size:,}; {REMEDY}"
        )
    sha256, highest_id = hash_tokens(path)
    if sha256 != shard.sha256:
        raise ValueError(f"{path} was changed since it was written (sha256 {sha256[:12]}...); {REMEDY}")
    if highest_id >= vocab_size:
        raise ValueError(
            f"{path} holds the id {highest_id}, outside the vocabulary of {vocab_size:,}; {REMEDY}"
        )


def load_prepared_tokenizer(folder: Path, manifest: Manifest | None = None) -> Tokenizer:
    """The tokenizer that made a folder's shards. Raises ValueError if the one in the folder is another."""
    manifest = manifest or read_manifest(folder)
    path = folder / "tokenizer"
    if not path.is_dir():
        raise ValueError(f"{path} is missing; {REMEDY}")
    try:
        tokenizer = load_tokenizer(path)
    except ValueError as error:
        raise ValueError(f"{error}; {REMEDY}") from None
    if tokenizer.fingerprint != manifest.tokenizer_fingerprint:
        raise ValueError(f"{path} is not the tokenizer that made the shards; {REMEDY}")
    return tokenizer


# Counting, in passes over memory-mapped tokens


def chunks(ids: Tokens, size: int = COUNTED_TOKENS) -> Iterator[Tokens]:
    """The ids in order, at most `size` at a time."""
    for start in range(0, ids.size, size):
        yield ids[start : start + size]


def count_ids(ids: Tokens, vocab_size: int) -> NDArray[np.int64]:
    """(vocab_size,): how often each id occurs. Raises ValueError, giving the id, for one outside."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for chunk in chunks(ids):
        if (highest := int(chunk.max())) >= vocab_size:
            raise ValueError(f"the id {highest}, outside the vocabulary of {vocab_size:,}")
        counts += np.bincount(chunk, minlength=vocab_size)
    return counts


def places_of(id: int, ids: Tokens) -> NDArray[np.int64]:
    """Indices at which one id occurs, in order."""
    found = [np.flatnonzero(chunk == id) + n * COUNTED_TOKENS for n, chunk in enumerate(chunks(ids))]
    return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)


def byte_lengths(token_bytes: list[bytes]) -> NDArray[np.int64]:
    """(vocab_size,): how many bytes of text each id stands for."""
    return np.array([len(each) for each in token_bytes], dtype=np.int64)
