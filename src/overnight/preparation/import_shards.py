"""Other programs' shards taken over: checked, then linked or converted, and vouched for by a manifest.

    llm.c, modded-nanogpt   *.bin with the header of `overnight.data.token_file`
    build-nanogpt           *.npy, an array of uint16
    nanoGPT                 train.bin and val.bin, uint16 and nothing else

A file with val, valid or validation in its name is validation, every other one is training. Nothing that
could hold code is opened: no pickle inside a .npy, and not nanoGPT's meta.pkl.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from overnight import __version__
from overnight.data.atomic_folder import publish_folder, require_disk_space, staging_folder
from overnight.data.shards import (
    HEADER_BYTES,
    LARGE,
    SMALL,
    SPLITS,
    Manifest,
    Shard,
    TokenFile,
    Tokens,
    byte_lengths,
    chunks,
    count_ids,
    hash_tokens,
    open_tokens,
    token_format,
    write_manifest,
)
from overnight.data.text_files import TextFile, as_utf8, first_line, hash_files
from overnight.preparation.prepare_config import PrepareConfig
from overnight.preparation.prepare_state import Request
from overnight.run_directory import flush_folder, flush_to_disk
from overnight.terminal import echo, progress
from overnight.tokenizer.open_tokenizer import load_tokenizer
from overnight.tokenizer.tokenizer import Tokenizer

SPLIT_RULE = "as the adopted shards have it"
VALIDATION_NAME = re.compile(r"(?<![a-z])(val|valid|validation)(?![a-z])", re.IGNORECASE)
BEGINNING_TOKENS, BEGINNING_CHARACTERS = 24, 24  # shown, so that a wrong tokenizer is seen at once
LLM_C, BUILD_NANOGPT, NANOGPT = "llm.c", "build-nanogpt", "nanoGPT"
UNPACKED = "<u2"  # nanoGPT's files are nothing but these


@dataclass(frozen=True)
class ExternalShard:
    """One file of another program's."""

    path: Path
    program: str
    """Whose way of writing it is."""
    split: str
    ids: Tokens
    """Mapped into memory, not yet read."""


@dataclass(frozen=True)
class ShardImport:
    """What is to be taken over, looked at but not read yet."""

    name: str
    files: tuple[ExternalShard, ...]
    tokenizer: Tokenizer
    request: Request
    shard_tokens: int

    @property
    def program(self) -> str:
        """Whose files they are."""
        return self.files[0].program


def plan_import(config: PrepareConfig) -> tuple[Request, Callable[[Path], Manifest]]:
    """What decides the content, and the function that fills a folder with it.

    Raises ValueError for a folder that holds no such shards, or for one of them that can't be read.
    """
    assert config.from_shards is not None
    folder = Path(config.from_shards)
    files = find_external_shards(folder)
    _mind_pickle(folder, config.tokenizer_name)
    tokenizer = load_tokenizer(config.tokenizer_name)
    request: Request = {
        "from_shards": as_utf8(folder.resolve().name),
        "source_sha256": hash_files(
            TextFile(str(file.path), as_utf8(file.path.name), file.path.stat().st_size) for file in files
        ),
        "tokenizer": f"{tokenizer.name} {tokenizer.fingerprint}",
        "shard_tokens": config.shard_tokens,
    }
    adoption = ShardImport(as_utf8(folder.resolve().name), files, tokenizer, request, config.shard_tokens)
    return request, lambda shown: run_import(shown, adoption)


def find_external_shards(folder: Path) -> tuple[ExternalShard, ...]:
    """The shards in a folder: training, then validation, each in the order of the numbers in their names.

    Raises ValueError if there are none, if they are of several programs, or if a split has none.
    """
    if (folder / "manifest.json").is_file():
        raise ValueError(
            f"{folder} has a manifest.json, as what `overnight prepare` wrote has: use it as it is, "
            f"with --data {folder}"
        )
    paths = sorted(
        (path for path in folder.iterdir() if path.suffix in {".bin", ".npy"} and path.is_file()),
        key=_natural_order,
    )
    if not paths:
        raise ValueError(f"{folder} holds no shards: neither .bin nor .npy files lie in it")
    files = [open_external_shard(path) for path in paths]
    if len({file.program for file in files}) > 1:
        other = next(file for file in files if file.program != files[0].program)
        raise ValueError(
            f"{folder} holds files of several programs ({files[0].path.name} is {files[0].program}'s, "
            f"{other.path.name} is {other.program}'s): give each a folder of its own"
        )
    splits = {split: [file for file in files if file.split == split] for split in SPLITS}
    for split, found in splits.items():
        if not found:
            raise ValueError(_one_sided(folder, split, files))
    return (*splits["train"], *splits["validation"])


def _one_sided(folder: Path, split: str, files: list[ExternalShard]) -> str:
    """What to do where a split has no file."""
    name = files[-1].path.name
    if files[0].program == NANOGPT:
        return f"{folder} holds {name} alone: nanoGPT's prepare.py writes train.bin and val.bin, run it again"
    if len(files) == 1:
        return (
            f"{folder} holds {name} alone, which is one split: put a file for the other beside it, the "
            "validation file with `val` in its name"
        )
    other = f"val_{name}" if split == "validation" else VALIDATION_NAME.sub("train", name)
    return (
        f"none of the {len(files)} files in {folder} is {split}, which goes by `val` in a file's name: "
        f"rename one, for example {name} to {other}"
    )


def open_external_shard(path: Path) -> ExternalShard:
    """One file, mapped and not yet read. Raises ValueError, naming it, if it is none of the formats."""
    split = "validation" if VALIDATION_NAME.search(path.stem) else "train"
    if path.suffix == ".npy":
        return ExternalShard(path, BUILD_NANOGPT, split, _open_array(path))
    with path.open("rb") as file:
        head = np.frombuffer(file.read(HEADER_BYTES)[:HEADER_BYTES], dtype="u1")
    magic = int.from_bytes(head[:4].tobytes(), "little")
    if magic in {SMALL.magic, LARGE.magic}:
        return ExternalShard(path, LLM_C, split, open_tokens(path, "fetch or write that file again"))
    if path.name not in {"train.bin", "val.bin"}:
        raise ValueError(
            f"{path} does not begin with the header of llm.c's shards, and only nanoGPT's train.bin and "
            "val.bin may do without: move it elsewhere if it is no shard, else it is damaged"
        )
    if head.size == HEADER_BYTES and not head[12:].any():
        raise ValueError(
            f"{path} is damaged: it begins like a shard with a header, and {magic} is no mark of one"
        )
    return ExternalShard(path, NANOGPT, split, _open_unpacked(path))


def run_import(folder: Path, adoption: ShardImport) -> Manifest:
    """Link or convert every file, and show the folder once it is complete. Needs `alone`.

    Raises ValueError, and leaves nothing, if an id lies outside the tokenizer's vocabulary.
    """
    with staging_folder(folder, lambda _: False) as place:
        require_disk_space(place, sum(_needed_bytes(file, place, adoption) for file in adoption.files))
        shards: dict[str, list[Shard]] = {split: [] for split in SPLITS}
        taken: list[ImportResult] = []
        total = sum(file.ids.nbytes for file in adoption.files) / 1e6
        with progress("adopting", total, "MB") as advance:
            for file in adoption.files:
                taken.append(_take_over(file, place, len(shards[file.split]), adoption))
                shards[file.split] += taken[-1].shards
                advance(file.ids.nbytes / 1e6)
        adoption.tokenizer.save(place / "tokenizer")
        manifest = _manifest(adoption, tuple(shards["train"]), tuple(shards["validation"]))
        write_manifest(place, manifest)
        flush_folder(place)
    publish_folder(folder)
    for line in _told(adoption, taken):
        echo(line)
    return manifest


# ---------------------------------------------------------------- one file


@dataclass(frozen=True)
class ImportResult:
    """What became of one file."""

    way: str
    """linked, copied or converted."""
    shards: tuple[Shard, ...]
    has_separator: bool
    """False if no end-of-text id is in it, so that it counts as one document."""


def _take_over(file: ExternalShard, place: Path, number: int, adoption: ShardImport) -> ImportResult:
    """Make the file the `number`-th shard of its split, or, converted, that and those after it."""
    tokenizer = adoption.tokenizer
    lengths = byte_lengths(tokenizer.token_bytes())
    is_alike = _is_alike(file, tokenizer)
    shards: list[Shard] = []
    separators, way = 0, "converted"
    for ids in [file.ids] if is_alike else chunks(file.ids, adoption.shard_tokens):
        counts = _count(file, ids, tokenizer)
        path = place / f"{file.split}-{number + len(shards):05d}.bin"
        if is_alike:
            way = _link_or_copy(file.path, path)
            digest = hash_tokens(path).sha256
        else:
            digest = _write(path, ids, tokenizer.vocab_size)
        documents = int(counts[tokenizer.end_of_text])
        separators += documents
        text_bytes = int(counts @ lengths)
        shards.append(
            Shard(name=path.name, tokens=ids.size, documents=documents, text_bytes=text_bytes, sha256=digest)
        )
    if not separators:
        shards[0] = dataclasses.replace(shards[0], documents=1)
    return ImportResult(way, tuple(shards), bool(separators))


def _count(file: ExternalShard, ids: Tokens, tokenizer: Tokenizer) -> NDArray[np.int64]:
    """How often each id occurs. Raises ValueError if one is none of the tokenizer's."""
    try:
        return count_ids(ids, tokenizer.vocab_size)
    except ValueError as error:
        raise ValueError(
            f"{file.path} holds {error}, which the tokenizer {tokenizer.name} has: name the one that made "
            "these shards with --tokenizer, or, if this one did, fetch the file again"
        ) from None


def _is_alike(file: ExternalShard, tokenizer: Tokenizer) -> bool:
    """True if the file is, byte for byte, what we would write."""
    return file.program == LLM_C and file.ids.dtype == token_format(tokenizer.vocab_size).dtype


def _write(path: Path, ids: Tokens, vocab_size: int) -> str:
    """The sha256 of the shard written."""
    written = TokenFile(path, vocab_size)
    for chunk in chunks(ids):
        written.append(chunk)
    return written.close()


def _link_or_copy(source: Path, target: Path) -> str:
    """Give the file a second name, or, where that can't be (another disk), copy it; which of the two."""
    way = "linked"
    try:
        os.link(source.resolve(), target)
    except OSError:
        way = "copied"
        shutil.copyfile(source, target)
    with target.open("rb") as file:
        flush_to_disk(file.fileno())
    return way


def _needed_bytes(file: ExternalShard, place: Path, adoption: ShardImport) -> int:
    """How much disk it takes to have the file here."""
    if _is_alike(file, adoption.tokenizer) and file.path.stat().st_dev == place.stat().st_dev:
        return 0
    return file.ids.size * token_format(adoption.tokenizer.vocab_size).dtype.itemsize + HEADER_BYTES


# ---------------------------------------------------------------- reading the formats without a header


def _open_array(path: Path) -> Tokens:
    """The ids in a .npy. Raises ValueError if it is cut short, or holds anything but a row of ids."""
    try:
        ids = np.lib.format.open_memmap(path, mode="r")  # refuses pickles
    except OSError:
        raise
    except Exception as error:  # numpy has no one class for a damaged header
        raise ValueError(f"{path} is damaged, or no array of ids: {first_line(error)}") from None
    if ids.ndim != 1 or ids.dtype.newbyteorder("=") not in (np.uint16, np.uint32):
        raise ValueError(
            f"{path} holds {ids.dtype} in the shape {ids.shape}, and ids are one row of uint16 (or uint32): "
            "save it so with numpy.save"
        )
    if (surplus := path.stat().st_size - ids.offset - ids.nbytes) != 0:
        raise ValueError(f"{path} is damaged: {surplus:,} bytes follow the {ids.size:,} ids it announces")
    return np.asarray(ids)


def _open_unpacked(path: Path) -> Tokens:
    """The ids in a file that is uint16 from its first byte to its last."""
    size = path.stat().st_size
    if size == 0 or size % 2:
        raise ValueError(
            f"{path} is damaged, or none of nanoGPT's: it has {size:,} bytes, and each id takes 2"
        )
    return np.asarray(np.memmap(path, dtype=UNPACKED, mode="r"))


def _mind_pickle(folder: Path, tokenizer: str) -> None:
    """Say what is not done with nanoGPT's meta.pkl. Raises ValueError if the tokenizer is not named then."""
    path = folder / "meta.pkl"
    if not path.exists():
        return
    if tokenizer == "gpt2":
        raise ValueError(
            f"{path} says that the ids are not GPT-2's; it is a pickle, which could run code, and is never "
            "opened: name the tokenizer that made them with --tokenizer FOLDER (for nanoGPT's characters "
            "the tokenizer/ of the same text prepared with --tokenizer characters), or move meta.pkl away"
        )
    echo(f"{path} is ignored: it is a pickle, and the ids are {tokenizer}'s, as you say")


# ---------------------------------------------------------------- what is said of it


def _manifest(adoption: ShardImport, train: tuple[Shard, ...], validation: tuple[Shard, ...]) -> Manifest:
    tokenizer = adoption.tokenizer
    return Manifest(
        overnight_version=__version__,
        source=f"{adoption.name}, adopted from {adoption.program}'s shards",
        licence="not stated",
        request=adoption.request,
        split_rule=SPLIT_RULE,
        tokenizer=tokenizer.name,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        end_of_text=tokenizer.end_of_text,
        documents=sum(shard.documents for shard in (*train, *validation)),
        duplicate_documents=0,
        empty_documents=0,
        skipped_documents=0,
        repaired_documents=0,
        train=train,
        validation=validation,
    )


def _told(adoption: ShardImport, taken: list[ImportResult]) -> Iterator[str]:
    """What was done, in plain lines."""
    ways = Counter(one.way for one in taken)
    for split in SPLITS:
        names = [file.path.name for file in adoption.files if file.split == split]
        more = f" ... {names[-1]} ({len(names)} files)" if len(names) > 1 else ""
        yield f"{split}: {names[0]}{more}"
    yield f"{adoption.program}'s files: " + ", ".join(f"{count} {way}" for way, count in ways.items())
    without = [
        file.path.name for file, one in zip(adoption.files, taken, strict=True) if not one.has_separator
    ]
    if without:
        some = ", ".join(without[:3]) + (" ..." if without[3:] else "")
        yield f"no end-of-text id is in {some}: one document each"
    if ways["linked"]:
        yield "a linked file takes no more disk; do not change it in either place"
    beginning = adoption.tokenizer.decode(adoption.files[0].ids[:BEGINNING_TOKENS].tolist())
    yield f"if this does not read as text, --tokenizer is wrong: {beginning[:BEGINNING_CHARACTERS]!r}"


def _natural_order(path: Path) -> list[tuple[int, str]]:
    """Numbers in a name compared as numbers."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"([0-9]+)", path.name)]
