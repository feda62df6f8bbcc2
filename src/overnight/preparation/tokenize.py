"""Documents to ids: the part of the work that takes the time, done unit by unit, by anyone, in any order."""

from __future__ import annotations

import itertools
import json
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from overnight.data.shards import check_ids, token_format
from overnight.data.text_files import DamagedFileError
from overnight.preparation.decontaminate import BenchmarkSearch, open_search
from overnight.preparation.documents import (
    FATES,
    KEPT,
    RECORD,
    Document,
    Fate,
    Part,
    Records,
    document_hash,
    filter_documents,
)
from overnight.preparation.prepare_state import PrepareState, Unit, open_tokenizer, read_state
from overnight.preparation.sources import read_parts
from overnight.run_directory import flush_to_disk, write_atomically
from overnight.tokenizer.tokenizer import Tokenizer

BATCH_CHARACTERS = 200_000  # what one thread encodes at a time
BYTES_PER_TOKEN = 4.5  # of English in GPT-2's: for the bar of a unit that is not done
BATCHES_AHEAD = 32  # the same for any number of threads, so that they all read equally far
Judged = tuple[Document, Fate]
Encoded = tuple[Document, Fate, NDArray[np.uint32]]


@dataclass(frozen=True)
class TokenizedUnit:
    """What a unit became."""

    records: Records
    """One a document, in order; see `selection.RECORD`."""
    ids: Path
    """The ids of all documents that were encoded, end to end, each with its end-of-text id before it."""
    damaged_files: list[str]
    """Left out as on_bad_file="skip" asks."""
    shared: NDArray[np.uint64]
    """(documents,): the sum of the bits of the benchmarks that it shares a passage with."""


def tokenize_unit(place: Path, number: int, threads: int = 1) -> None:
    """Write what unit `number` becomes into the folder; nothing if it is there already.

    Raises ValueError for text that on_bad_text, and DamagedFileError for a file that on_bad_file refuses.
    """
    path = place / "units" / f"{number:05d}"
    if path.with_suffix(".json").is_file():
        return
    work, tokenizer = read_state(place), open_tokenizer(place)
    parts, damaged = sound_parts(work.units[number], work)
    judged = filter_documents(read_parts(parts, work.text_column), work.on_bad_text)
    shared: dict[int, int] = {}
    if work.benchmarks:
        judged = _searched(judged, open_search(place), shared)
    partial = path.with_suffix(".ids.partial")
    with partial.open("wb", buffering=1 << 20) as file:
        rows = list(_write_ids(file, tokenize_documents(judged, tokenizer, threads), tokenizer))
        file.flush()
        flush_to_disk(file.fileno())
    partial.replace(path.with_suffix(".ids"))
    records = np.array(rows, dtype=RECORD)
    write_atomically(path.with_suffix(".documents"), records.tobytes())
    text_bytes = int(records["bytes"].sum())
    tokens = int(records["tokens"].sum())
    about = {"damaged_files": damaged, "text_bytes": text_bytes, "tokens": tokens, "shared": shared}
    write_atomically(path.with_suffix(".json"), json.dumps(about) + "\n")


def read_unit(place: Path, number: int) -> TokenizedUnit:
    """What `tokenize_unit` wrote."""
    path = place / "units" / f"{number:05d}"
    about = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    records = np.fromfile(path.with_suffix(".documents"), dtype=RECORD)
    shared = np.zeros(len(records), dtype=np.uint64)
    for document, bits in about["shared"].items():
        shared[int(document)] = bits
    return TokenizedUnit(records, path.with_suffix(".ids"), about["damaged_files"], shared)


def documents_in_order(work: PrepareState) -> Iterator[Document]:
    """Every document of all units, damaged files left out where they are to be skipped.

    Python's documentation is parsed at once, since it shows a bar of its own.
    """
    first, *others = work.units
    documents = read_parts(sound_parts(first, work)[0], work.text_column)
    later = (read_parts(sound_parts(unit, work)[0], work.text_column) for unit in others)
    return itertools.chain(documents, itertools.chain.from_iterable(later))


def count_documents(place: Path, number: int) -> int:
    """How many documents an encoded unit has."""
    return (place / "units" / f"{number:05d}.documents").stat().st_size // RECORD.itemsize


def count_encoded(place: Path, unit_bytes: Sequence[int]) -> tuple[int, int]:
    """About (bytes of text that were read, tokens they became) so far: for a progress bar."""
    itemsize = token_format(open_tokenizer(place).vocab_size).dtype.itemsize
    read_bytes = tokens = 0
    for entry in os.scandir(place / "units"):
        number, _, kind = entry.name.partition(".")
        if kind == "ids":
            read_bytes += unit_bytes[int(number)]
        elif kind == "ids.partial":
            read_bytes += min(
                unit_bytes[int(number)], round(entry.stat().st_size / itemsize * BYTES_PER_TOKEN)
            )
        tokens += entry.stat().st_size // itemsize if kind.startswith("ids") else 0
    return read_bytes, tokens


def tokenize_documents(judged: Iterable[Judged], tokenizer: Tokenizer, threads: int = 1) -> Iterator[Encoded]:
    """The documents in their order, each with its end-of-text id and its own; one left out has no ids.

    Threads, not processes: the tokenizers release the interpreter while they work.
    """
    before = np.array([tokenizer.end_of_text], dtype=np.uint32)
    waiting: deque[tuple[list[Judged], Future[list[NDArray[np.uint32]]]]] = deque()

    def finished() -> Iterator[Encoded]:
        batch, future = waiting.popleft()
        for (document, fate), ids in zip(batch, future.result(), strict=True):
            yield document, fate, np.concatenate([before, ids]) if fate in KEPT else ids

    with ThreadPoolExecutor(threads) as pool:
        for batch in _in_batches(judged):
            texts = [document.text if fate in KEPT else "" for document, fate in batch]
            waiting.append((batch, pool.submit(tokenizer.encode_batch, texts)))
            if len(waiting) > BATCHES_AHEAD:
                yield from finished()
        while waiting:
            yield from finished()


def _write_ids(
    file: BinaryIO, encoded: Iterable[Encoded], tokenizer: Tokenizer
) -> Iterator[tuple[int, int, int, int, int]]:
    """Append every document's ids to the file; yields its record."""
    dtype = token_format(tokenizer.vocab_size).dtype
    for document, fate, ids in encoded:
        check_ids(ids, tokenizer.vocab_size)
        file.write(ids.astype(dtype).tobytes())
        digest = document_hash(document.text)
        high, low = (int.from_bytes(half) for half in (digest[:8], digest[8:]))
        yield high, low, ids.size, len(document.text.encode()), FATES.index(fate)


def _searched(judged: Iterable[Judged], search: BenchmarkSearch, shared: dict[int, int]) -> Iterator[Judged]:
    """The same documents; `shared` receives the bits of those that share a passage with a benchmark."""
    before = 0
    for batch in _in_batches(judged):
        bits = search.find([document.text if fate in KEPT else "" for document, fate in batch])
        shared |= {before + int(place): int(bits[place]) for place in np.flatnonzero(bits)}
        before += len(batch)
        yield from batch


def sound_parts(unit: Unit, work: PrepareState) -> tuple[list[Part], list[str]]:
    """The parts that can be read to their end, and the names of the files of the others.

    Only where damaged files are to be skipped; they are read twice then, packed files and Parquet's.
    """
    if work.on_bad_file == "fail":
        return list(unit), []
    sound, damaged = [], []
    for part in unit:
        try:
            if part.file.is_packed or part.file.kind == ".parquet":
                deque(read_parts([part], work.text_column), maxlen=0)
            sound.append(part)
        except DamagedFileError:
            damaged.append(part.file.name)
    return sound, damaged


def _in_batches(judged: Iterable[Judged]) -> Iterator[list[Judged]]:
    """Lists of consecutive documents of about BATCH_CHARACTERS together."""
    batch: list[Judged] = []
    characters = 0
    for document, fate in judged:
        batch.append((document, fate))
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
