"""Import the shards of other programs: checked, then linked or converted, and listed in a manifest.

    llm.c, modded-nanogpt   *.bin with the header that `overnight.data.shards` describes
    build-nanogpt           *.npy, an array of uint16
    nanoGPT                 train.bin and val.bin, uint16 or uint32 without a header

A file with val, valid or validation in its name is validation, every other file is training. Nothing that
can run code is opened: neither a pickle in a .npy file nor nanoGPT's meta.pkl.
"""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from overnight import __version__
from overnight.data import shards
from overnight.data.atomic_folder import publish_folder, require_disk_space, staging_folder
from overnight.data.shards import HEADER_BYTES, SPLITS, Manifest, Shard, Tokens
from overnight.data.text_files import TextFile, as_utf8, describe_missing, first_line, hash_files
from overnight.files import flush_folder, flush_to_disk
from overnight.preparation.prepare_config import PrepareConfig
from overnight.preparation.prepare_state import Request
from overnight.terminal import echo, progress, quote
from overnight.tokenizer.open_tokenizer import load_tokenizer
from overnight.tokenizer.tokenizer import Tokenizer

VALIDATION_NAME = re.compile(r"(?<![a-z])(val|valid|validation)(?![a-z])", re.IGNORECASE)
BEGINNING_TOKENS, BEGINNING_CHARACTERS = 24, 24  # printed, so that a wrong tokenizer is noticed
LOOKED_AT = 1 << 22  # ids of a file without a header, to find their width
MOST_UPPER_HALF = 3  # of an id below 262,144
MOST_ZEROS = 0.4  # share of the id 0 in a text; of uint32 read as uint16, half are 0
LLM_C, BUILD_NANOGPT, NANOGPT = "llm.c", "build-nanogpt", "nanoGPT"


@dataclass(frozen=True)
class ExternalShard:
    """A file that another program wrote."""

    path: Path
    program: str
    split: str
    ids: Tokens
    """Mapped into memory, not yet read."""


@dataclass(frozen=True)
class ShardImport:
    """The shards to import, found but not read yet."""

    name: str
    files: tuple[ExternalShard, ...]
    tokenizer: Tokenizer
    request: Request
    """The options that decide the content of the folder."""
    shard_tokens: int

    def fill(self, folder: Path) -> Manifest:
        """Link or convert every file, and publish the folder once it is complete. Needs `exclusive`.

        Raises ValueError, and leaves nothing, if an id is outside the tokenizer's vocabulary.
        """
        written: dict[str, list[Shard]] = {split: [] for split in SPLITS}
        methods: Counter[str] = Counter()
        whole: list[str] = []  # names of the files without an end-of-text id: each counts as one document
        with staging_folder(folder, lambda _: False) as staging:
            require_disk_space(staging, sum(self._needed_bytes(file, staging) for file in self.files))
            with progress("adopting", sum(file.ids.nbytes for file in self.files) / 1e6, "MB") as advance:
                for file in self.files:
                    method, imported = self._import_file(file, staging, len(written[file.split]))
                    if not any(shard.documents for shard in imported):
                        whole.append(file.path.name)
                        imported[0] = replace(imported[0], documents=1)
                    written[file.split] += imported
                    methods[method] += 1
                    advance(file.ids.nbytes / 1e6)
            self.tokenizer.save(staging / "tokenizer")
            manifest = self._manifest(written)
            shards.write_manifest(staging, manifest)
            flush_folder(staging)
        publish_folder(folder)
        for line in self._summary(methods, whole):
            echo(line)
        return manifest

    def _is_ours(self, file: ExternalShard) -> bool:
        """True if the file is, byte for byte, what would be written here."""
        dtype = shards.token_format(self.tokenizer.vocab_size).dtype
        return file.program == LLM_C and file.ids.dtype == dtype

    def _needed_bytes(self, file: ExternalShard, staging: Path) -> int:
        if self._is_ours(file) and file.path.stat().st_dev == staging.stat().st_dev:
            return 0
        return file.ids.size * shards.token_format(self.tokenizer.vocab_size).dtype.itemsize + HEADER_BYTES

    def _import_file(self, file: ExternalShard, staging: Path, number: int) -> tuple[str, list[Shard]]:
        """(linked, copied or converted; the shards of its split that it became, from shard `number` on).

        A linked or copied file is one shard.
        """
        lengths = shards.byte_lengths(self.tokenizer.token_bytes())
        is_ours, method = self._is_ours(file), "converted"
        written: list[Shard] = []
        for ids in [file.ids] if is_ours else shards.chunks(file.ids, self.shard_tokens):
            counts = self._count_ids(file, ids)
            path = staging / f"{file.split}-{number + len(written):05d}.bin"
            if is_ours:
                method = _link_or_copy(file.path, path)
                digest, _ = shards.hash_tokens(path)
            else:
                new = shards.TokenFile(path, self.tokenizer.vocab_size)
                for chunk in shards.chunks(ids):
                    new.append(chunk)
                digest = new.close()
            documents, text_bytes = int(counts[self.tokenizer.end_of_text]), int(counts @ lengths)
            sizes = {"tokens": ids.size, "documents": documents, "text_bytes": text_bytes}
            written.append(Shard(name=path.name, sha256=digest, **sizes))
        return method, written

    def _count_ids(self, file: ExternalShard, ids: Tokens) -> NDArray[np.int64]:
        """How often each id occurs. Raises ValueError for an id outside the vocabulary."""
        try:
            return shards.count_ids(ids, self.tokenizer.vocab_size)
        except ValueError as error:
            raise ValueError(
                f"{file.path} holds {error}, which the tokenizer {self.tokenizer.name} has: name the "
                "one that made these shards with --tokenizer, or, if this one did, fetch the file again"
            ) from None

    def _manifest(self, written: dict[str, list[Shard]]) -> Manifest:
        return Manifest(
            overnight_version=__version__,
            source=f"{self.name}, adopted from {self.files[0].program}'s shards",
            licence="not stated",
            request=self.request,
            split_rule="as the adopted shards have it",
            tokenizer=self.tokenizer.name,
            tokenizer_fingerprint=self.tokenizer.fingerprint,
            vocab_size=self.tokenizer.vocab_size,
            end_of_text=self.tokenizer.end_of_text,
            documents=sum(shard.documents for each in written.values() for shard in each),
            train=tuple(written["train"]),
            validation=tuple(written["validation"]),
        )

    def _summary(self, methods: Counter[str], whole: list[str]) -> Iterator[str]:
        for split in SPLITS:
            names = [file.path.name for file in self.files if file.split == split]
            more = f" ... {names[-1]} ({len(names)} files)" if len(names) > 1 else ""
            yield f"{split}: {names[0]}{more}"
        counts = ", ".join(f"{count} {method}" for method, count in methods.items())
        yield f"{self.files[0].program}'s files: {counts}"
        if whole:
            some = ", ".join(whole[:3]) + (" ..." if whole[3:] else "")
            yield f"no end-of-text id is in {some}: each counts as one document"
        if missing := describe_missing(file.path.name for file in self.files):
            yield missing
        if methods["linked"]:
            yield "linked files take no additional disk space; do not change the originals"
        beginning = self.tokenizer.decode(self.files[0].ids[:BEGINNING_TOKENS].tolist())
        yield f"if this does not read as text, --tokenizer is wrong: {beginning[:BEGINNING_CHARACTERS]!r}"


def plan_import(config: PrepareConfig) -> ShardImport:
    """Find the shards that `config.from_shards` names.

    Raises ValueError for a folder that holds no such shards, and for a shard that can't be read.
    """
    folder = Path(config.from_shards or "")
    files = find_external_shards(folder)
    _check_pickle(folder, config.tokenizer_name)
    tokenizer, name = load_tokenizer(config.tokenizer_name), as_utf8(folder.resolve().name)
    files = tuple(_with_width(file, tokenizer.vocab_size) for file in files)
    text_files = (TextFile(str(f.path), as_utf8(f.path.name), f.path.stat().st_size) for f in files)
    request: Request = {
        "from_shards": name,
        "source_sha256": hash_files(text_files),
        "tokenizer": f"{tokenizer.name} {tokenizer.fingerprint}",
        "shard_tokens": config.shard_tokens,
    }
    return ShardImport(name, files, tokenizer, request, config.shard_tokens)


def find_external_shards(folder: Path) -> tuple[ExternalShard, ...]:
    """The shards in a folder: training, then validation, each in the order of the numbers in their names.

    Raises ValueError if there are none, if they are of several programs, or if a split has none.
    """
    if (folder / "manifest.json").is_file():
        raise ValueError(
            f"{folder} is a prepared folder already (it has a manifest.json): use --data {quote(str(folder))}"
        )
    paths = [path for path in folder.iterdir() if path.suffix in {".bin", ".npy"} and path.is_file()]
    if not paths:
        raise ValueError(f"{folder} holds no shards: there is no .bin or .npy file in it")
    files = [open_external_shard(path) for path in sorted(paths, key=_natural_order)]
    by_program = {file.program: file.path.name for file in files}
    if len(by_program) > 1:
        names = ", ".join(f"{name} is {program}'s" for program, name in by_program.items())
        raise ValueError(f"{folder} holds files of several programs ({names}): give each a folder of its own")
    if missing := {*SPLITS} - {file.split for file in files}:
        raise ValueError(
            f"{folder} has no {missing.pop()} shard (there is {files[-1].path.name}): a file with `val` in "
            "its name is validation, every other one is training; rename one, or add one"
        )
    return tuple(sorted(files, key=lambda file: SPLITS.index(file.split)))


def open_external_shard(path: Path) -> ExternalShard:
    """One file, mapped and not yet read. Raises ValueError, naming it, if it has none of the formats."""
    split = "validation" if VALIDATION_NAME.search(path.stem) else "train"
    if path.suffix == ".npy":
        return ExternalShard(path, BUILD_NANOGPT, split, _open_npy(path))
    with path.open("rb") as file:
        head = file.read(HEADER_BYTES)
    magic = int.from_bytes(head[:4], "little")
    if magic in {shards.SMALL.magic, shards.LARGE.magic}:
        return ExternalShard(path, LLM_C, split, shards.open_tokens(path, "fetch or write that file again"))
    if path.name not in {"train.bin", "val.bin"}:
        raise ValueError(
            f"{path} does not begin with the header of llm.c's shards, and only nanoGPT's train.bin and "
            "val.bin have none: it is damaged, or not a shard (then move it elsewhere)"
        )
    if len(head) == HEADER_BYTES and not any(head[12:]):
        raise ValueError(f"{path} is damaged: it begins like a shard with a header, but with {magic}")
    size = path.stat().st_size
    if size == 0 or size % 2:
        raise ValueError(f"{path} is damaged, or not nanoGPT's: it has {size:,} bytes, and an id takes 2")
    return ExternalShard(path, NANOGPT, split, _open_plain(path))


def _open_plain(path: Path) -> Tokens:
    """The ids in a file without a header: uint16, or uint32 if the upper halves of all ids are nearly 0.

    Raises ValueError for int64, numpy's default, and for uint32 that is not whole.
    """
    ids = np.asarray(np.memmap(path, dtype="<u2", mode="r"))
    if ids.size % 4 == 0 and not ids[2:LOOKED_AT:4].any() and not ids[3:LOOKED_AT:4].any():
        raise ValueError(
            f"{path} holds ids of 8 bytes: write them as uint16, or as uint32 if one is above 65,535"
        )
    upper = ids[1:LOOKED_AT:2]
    is_wide = upper.size > 0 and int(upper.max()) <= MOST_UPPER_HALF
    if is_wide and ids.size % 2 == 0:
        return np.asarray(np.memmap(path, dtype="<u4", mode="r"))
    if is_wide or np.count_nonzero(ids[:LOOKED_AT] == 0) > MOST_ZEROS * min(ids.size, LOOKED_AT):
        raise ValueError(
            f"{path} is damaged: it holds ids of 4 bytes, and bytes are missing, or others were added"
        )
    return ids


def _with_width(file: ExternalShard, vocab_size: int) -> ExternalShard:
    """The file with ids of 4 bytes if 2 can't hold all of the vocabulary, whatever its ids look like.

    Raises ValueError if its length does not allow that.
    """
    if file.program != NANOGPT or file.ids.itemsize >= shards.token_format(vocab_size).dtype.itemsize:
        return file
    if file.ids.nbytes % 4:
        raise ValueError(
            f"{file.path} has {file.ids.nbytes:,} bytes, and an id of a vocabulary of {vocab_size:,} "
            "takes 4: fetch the file again, or name the tokenizer that made it with --tokenizer"
        )
    return replace(file, ids=np.asarray(np.memmap(file.path, dtype="<u4", mode="r")))


def _open_npy(path: Path) -> Tokens:
    """The ids in a .npy file. Raises ValueError if it is truncated, or holds anything but a row of ids."""
    try:
        ids = np.lib.format.open_memmap(path, mode="r")  # refuses pickles
    except OSError:
        raise
    except Exception as error:  # numpy has no single class for a damaged header
        raise ValueError(f"{path} is damaged, or not an array of ids: {first_line(error)}") from None
    if ids.ndim != 1 or ids.dtype.newbyteorder("=") not in (np.uint16, np.uint32):
        raise ValueError(
            f"{path} holds {ids.dtype} in the shape {ids.shape}, not one row of uint16 or uint32: "
            "save the ids in that form with numpy.save"
        )
    if (surplus := path.stat().st_size - ids.offset - ids.nbytes) != 0:
        raise ValueError(f"{path} is damaged: {surplus:,} bytes follow its {ids.size:,} ids")
    return np.asarray(ids)


def _check_pickle(folder: Path, tokenizer: str) -> None:
    """Say that nanoGPT's meta.pkl is ignored. Raises ValueError if the tokenizer is not named then."""
    path = folder / "meta.pkl"
    if not path.exists():
        return
    if tokenizer == "gpt2":
        raise ValueError(
            f"{path} says that the ids are not GPT-2's, and is never opened, since a pickle can run code: "
            "name the tokenizer that made them with --tokenizer FOLDER (for nanoGPT's characters the "
            "tokenizer/ of the same text prepared with --tokenizer characters), or move meta.pkl away"
        )
    echo(f"{path} is ignored: it is a pickle, and --tokenizer {tokenizer} is used")


def _link_or_copy(source: Path, target: Path) -> str:
    """Hard-link the file, or copy it to another disk; returns "linked" or "copied"."""
    method = "linked"
    try:
        os.link(source.resolve(), target)
    except OSError:
        method = "copied"
        shutil.copyfile(source, target)
    with target.open("rb") as file:
        flush_to_disk(file.fileno())
    return method


def _natural_order(path: Path) -> list[tuple[int, str]]:
    """A sort key that compares the numbers in a name as numbers."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"([0-9]+)", path.name)]
