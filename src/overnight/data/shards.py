"""A prepared folder: shards of tokens, the tokenizer that made them, and a manifest that vouches for both.

    data/<name>/
      manifest.json        what is here, where it came from, and the sha256 of every shard
      train-00000.bin ...  see `overnight.data.token_file`
      validation-00000.bin ...
      tokenizer/

The manifest is written last. A folder is used only if it verifies, byte for byte.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from overnight.data.token_file import REMEDY, TokenFile, hash_tokens, open_tokens, token_format
from overnight.run_directory import write_atomically

if TYPE_CHECKING:
    from overnight.text.tokenizer import Tokenizer

FORMAT_VERSION = 2
SPLITS = ("train", "validation")
MANIFEST = "manifest.json"
SO_FAR = "so-far.json"  # the manifest of what is complete, while more is being prepared
SHARD_NAME = re.compile(r"(train|validation)-\d{5,}(-\d+)?\.bin")
ADDED_LATER = ("near_duplicate_documents", "contaminated_documents")


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of tokens. A document that spans shards is counted where it begins, with all its bytes."""

    name: str
    tokens: int
    documents: int
    text_bytes: int
    """UTF-8 bytes of the documents' text."""
    sha256: str
    """Of the whole file, its header included."""

    @property
    def is_growing(self) -> bool:
        """True of the beginning of a shard, shown while the rest is being prepared: train-00007-12345.bin."""
        return self.name.count("-") > 1


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a prepared folder holds. The same request gives the same manifest, to the byte, on any machine."""

    format_version: int = FORMAT_VERSION
    overnight_version: str
    source: str
    licence: str
    request: dict[str, str | int | float | None]
    """What decides the content: compared when the same folder is asked for again."""
    split_rule: str
    tokenizer: str
    tokenizer_fingerprint: str
    vocab_size: int
    end_of_text: int
    """The id that stands before each document."""
    documents: int
    """In the shards; what was left out is counted below."""
    duplicate_documents: int
    empty_documents: int
    skipped_documents: int
    """Not sound text, and left out as on_bad_text="skip" asks."""
    repaired_documents: int
    """Not sound text, and kept with U+FFFD in the bad places as on_bad_text="replace" asks."""
    damaged_files: int = 0
    """Cut short or damaged, and left out as on_bad_file="skip" asks."""
    near_duplicate_documents: int = 0
    """Left out as near_duplicates="drop" asks."""
    contaminated_documents: dict[str, int] = field(default_factory=dict)
    """By benchmark: how many share a passage with it; kept, or left out as on_contaminated="drop" asks."""
    train: tuple[Shard, ...]
    validation: tuple[Shard, ...]

    def shards(self, split: str) -> tuple[Shard, ...]:
        """The shards of "train" or "validation", in order."""
        if split not in SPLITS:
            raise ValueError(f"split={split!r} must be train or validation")
        return self.train if split == "train" else self.validation

    def tokens(self, split: str) -> int:
        """How many tokens one split has, the end-of-text ids among them."""
        return sum(shard.tokens for shard in self.shards(split))

    def text_bytes(self, split: str) -> int:
        """How many bytes of UTF-8 one split's documents have."""
        return sum(shard.text_bytes for shard in self.shards(split))

    def to_json(self) -> str:
        """The text of manifest.json; its last field is the sha256 of the others."""
        fields = dataclasses.asdict(self)
        for name in ADDED_LATER:  # left out where they say nothing: folders from before still verify
            if not fields[name]:
                del fields[name]
        checksum = hashlib.sha256(json.dumps(fields).encode()).hexdigest()
        return json.dumps(fields | {"sha256_of_the_above": checksum}, indent=2) + "\n"


class ShardWriter:
    """Writes one split, document by document, into shards of `shard_tokens` tokens, the last one shorter."""

    def __init__(self, folder: Path, split: str, vocab_size: int, shard_tokens: int) -> None:
        self.folder, self._split = folder, split
        self._vocab_size, self._shard_tokens = vocab_size, shard_tokens
        self._file: TokenFile | None = None
        self._documents, self._text_bytes = 0, 0
        self.shards: list[Shard] = []

    def add(self, ids: NDArray[np.uint32], text_bytes: int) -> None:
        """Append one document, its end-of-text id at the front of `ids`."""
        begun = False
        while ids.size:
            file = self._open_file()
            if not begun:
                begun = True
                self._documents += 1
                self._text_bytes += text_bytes
            room = self._shard_tokens - file.tokens
            file.append(ids[:room])
            ids = ids[room:]

    def finish(self) -> tuple[Shard, ...]:
        """Complete the last shard; all of them, in order."""
        if self._file is not None:
            name, tokens, digest = self._file.path.name, self._file.tokens, self._file.close()
            self.shards.append(
                Shard(
                    name=name,
                    tokens=tokens,
                    documents=self._documents,
                    text_bytes=self._text_bytes,
                    sha256=digest,
                )
            )
            self._file, self._documents, self._text_bytes = None, 0, 0
        return tuple(self.shards)

    def abandon(self) -> None:
        """Drop the shard being written, if one is."""
        if self._file is not None:
            self._file.abandon()

    def _open_file(self) -> TokenFile:
        if self._file is not None and self._file.tokens == self._shard_tokens:
            self.finish()
        if self._file is None:
            name = f"{self._split}-{len(self.shards):05d}.bin"
            self._file = TokenFile(self.folder / name, self._vocab_size)
        return self._file


def write_manifest(folder: Path, manifest: Manifest, name: str = MANIFEST) -> None:
    """Vouch for the shards in `folder`: all of them are complete and on the disk."""
    write_atomically(folder / name, manifest.to_json())


def read_manifest(folder: Path, name: str = MANIFEST) -> Manifest:
    """The manifest of a prepared folder. Raises ValueError if it is missing or not as it was written."""
    path = folder / name
    if not path.is_file():
        raise ValueError(f"{folder} has no {name}: it is not a folder that `overnight prepare` finished")
    content = path.read_bytes()
    try:
        fields = json.loads(content)
        version = fields["format_version"]
        del fields["sha256_of_the_above"]  # `to_json` works it out again
        if version == FORMAT_VERSION:
            for split in SPLITS:
                fields[split] = tuple(Shard(**shard) for shard in fields[split])
            manifest = Manifest(**fields)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise ValueError(
            f"{folder} is no folder that `overnight prepare` wrote, or its {name} is damaged: "
            "prepare the text into another folder"
        ) from None
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format version {version!r}, and this is {FORMAT_VERSION}; {REMEDY}")
    if manifest.to_json().encode() != content:  # to the byte, the checksum in it included
        raise ValueError(f"{path} was changed since it was written; {REMEDY}")
    _check_names(manifest, path)
    return manifest


def verify(folder: Path, split: str | None = None) -> Manifest:
    """The manifest, once every shard it names (of one split, if given) was read and found as it was written.

    Raises ValueError, naming the file, for a shard that is missing, surplus, cut short or changed in a
    single bit, and for an id outside the vocabulary. Reads about a gigabyte per second and core.
    """
    manifest = read_manifest(folder)
    known = {shard.name for each in SPLITS for shard in manifest.shards(each)}
    surplus = sorted(path.name for path in folder.glob("*.bin") if path.name not in known)
    if surplus:
        raise ValueError(f"{folder / surplus[0]} is not in the manifest; remove it, or {REMEDY}")
    wanted = [shard for each in SPLITS if split in {None, each} for shard in manifest.shards(each)]
    with ThreadPoolExecutor() as threads:
        for _ in threads.map(lambda shard: verify_shard(folder, shard, manifest.vocab_size), wanted):
            pass
    return manifest


def load_prepared_tokenizer(folder: Path, manifest: Manifest | None = None) -> Tokenizer:
    """The tokenizer that made a folder's shards. Raises ValueError if what lies there is another."""
    from overnight.text.load import load_tokenizer

    manifest = manifest or read_manifest(folder)
    if not (folder / "tokenizer").is_dir():
        raise ValueError(f"{folder / 'tokenizer'} is missing; {REMEDY}")
    try:
        tokenizer = load_tokenizer(folder / "tokenizer")
    except ValueError as error:
        raise ValueError(f"{error}; {REMEDY}") from None
    if tokenizer.fingerprint != manifest.tokenizer_fingerprint:
        raise ValueError(f"{folder / 'tokenizer'} is not the tokenizer that made the shards; {REMEDY}")
    return tokenizer


def verify_shard(folder: Path, shard: Shard, vocab_size: int) -> None:
    """Read one shard. Raises ValueError, naming the file, if it is not as it was written."""
    path = folder / shard.name
    tokens = open_tokens(path)
    if tokens.size != shard.tokens or tokens.dtype != token_format(vocab_size).dtype:
        raise ValueError(
            f"{path} holds {tokens.size:,} tokens as {tokens.dtype}, and its manifest says {shard.tokens:,} "
            f"for a vocabulary of {vocab_size:,}; {REMEDY}"
        )
    summary = hash_tokens(path)
    if summary.sha256 != shard.sha256:
        raise ValueError(
            f"{path} was changed since it was written (sha256 {summary.sha256[:12]}...); {REMEDY}"
        )
    if summary.highest_id >= vocab_size:
        raise ValueError(
            f"{path} holds the id {summary.highest_id}, outside the vocabulary of {vocab_size:,}; {REMEDY}"
        )


def _check_names(manifest: Manifest, path: Path) -> None:
    """A shard's name is a plain file name of its own split: no manifest leads out of its folder."""
    for split in SPLITS:
        for shard in manifest.shards(split):
            if not SHARD_NAME.fullmatch(shard.name) or not shard.name.startswith(split):
                raise ValueError(f"{path} names {shard.name!r}, which is no shard of {split}; {REMEDY}")
