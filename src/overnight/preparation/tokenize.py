"""Documents to ids, unit by unit: what takes most of the time, done by any worker in any order."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from overnight.data.shards import HEADER_BYTES, check_ids, token_format
from overnight.data.text_files import DamagedFileError
from overnight.preparation.decontaminate import BenchmarkSearch, open_search
from overnight.preparation.documents import (
    KEPT,
    RECORD,
    STATUSES,
    Document,
    FilteredDocument,
    Part,
    Records,
    document_hash,
    filter_documents,
    hash_halves,
    split_of,
)
from overnight.preparation.prepare_state import PrepareState, Unit, open_tokenizer, read_state, target_units
from overnight.preparation.sources import read_parts
from overnight.run_directory import flush_to_disk, write_atomically
from overnight.terminal import progress
from overnight.tokenizer.open_tokenizer import build_tokenizer
from overnight.tokenizer.tokenizer import Tokenizer

BATCH_CHARACTERS = 200_000  # what one thread encodes at a time
TRAINING_BYTES = 1_000_000_000  # of text that a tokenizer is trained on, at most
SAMPLED_DOCUMENTS = 64
BYTES_PER_TOKEN = 4.5  # of English text in GPT-2's tokens: for the progress bar of an unfinished unit
BATCHES_AHEAD = 32  # the same for any number of threads, so that all of them read equally far ahead
Encoded = tuple[FilteredDocument, NDArray[np.uint32]]


@dataclass(frozen=True)
class TokenizedUnit:
    """The documents of a unit and their ids."""

    records: Records
    """One per document, in order; see `documents.RECORD`."""
    ids: Path
    """The ids of all documents, end to end, each document with its end-of-text id before it."""
    damaged_files: list[str]
    """Files that were skipped (on_bad_file="skip")."""
    shared: NDArray[np.uint64]
    """(documents,): a bit for each benchmark that the document shares a passage with."""


def save_tokenizer(staging: Path, state: PrepareState) -> None:
    """Load or train the tokenizer, and save it in the staging folder, whole or not at all."""
    partial_folder = staging / "tokenizer.partial"
    shutil.rmtree(partial_folder, ignore_errors=True)
    build_tokenizer(state.config.tokenizer_name, training_texts(state)).save(partial_folder)
    partial_folder.rename(staging / "tokenizer")


def training_texts(state: PrepareState) -> Iterator[str]:
    """The texts that a tokenizer may be trained on: of the training split, each once; a gigabyte at most.

    Reads nothing until the first is taken.
    """
    seen: set[bytes] = set()
    documents = documents_in_order(state)
    read_bytes = 0
    with progress("tokenizer", min(TRAINING_BYTES, sum(state.unit_bytes)) / 1e6, "MB") as advance:
        for document, status in filter_documents(documents, state.config.on_bad_text):
            size = len(document.text.encode())
            advance(size / 1e6)
            read_bytes += size
            digest = document_hash(document.text)
            if status in KEPT and digest not in seen:
                seen.add(digest)
                if split_of(document.text, state.validation_fraction) == "train":
                    yield document.text
            if read_bytes >= TRAINING_BYTES:
                return


def estimate_bytes(staging: Path, state: PrepareState) -> int:
    """Estimated disk space of the units and the shards, if all documents are like the first ones."""
    tokenizer = open_tokenizer(staging)
    first = itertools.islice(filter_documents(documents_in_order(state), "replace"), SAMPLED_DOCUMENTS)
    encoded = list(tokenize_documents(first, tokenizer))
    tokens = sum(ids.size for _, ids in encoded)
    text_bytes = sum(len(document.text.encode()) for (document, _), _ in encoded)
    expected = tokens * max(1.0, sum(state.unit_bytes) / max(1, text_bytes))
    if state.config.tokens is not None:
        expected = min(expected, state.config.tokens)
    return 2 * round(1.1 * expected * token_format(tokenizer.vocab_size).dtype.itemsize) + 2 * HEADER_BYTES


def tokenize_units(staging: Path, rank: int = 0, ranks: int = 1, threads: int = 1) -> None:
    """Tokenize every `ranks`-th unit that is wanted."""
    state = read_state(staging)
    for number in range(rank, target_units(staging), ranks):
        tokenize_unit(staging, state, number, threads)


def tokenize_unit(staging: Path, state: PrepareState, number: int, threads: int = 1) -> None:
    """Write the ids and records of one unit into the staging folder, unless they are there already.

    Raises ValueError for bad text and DamagedFileError for a damaged file, unless they are to be skipped.
    """
    path = staging / "units" / f"{number:05d}"
    if path.with_suffix(".json").is_file():
        return
    tokenizer = open_tokenizer(staging)
    documents, damaged_files = open_unit(state, number)
    shared: dict[int, int] = {}
    if state.config.benchmark_paths:
        documents = _search_benchmarks(documents, open_search(staging), shared)
    partial_file = path.with_suffix(".ids.partial")
    with partial_file.open("wb", buffering=1 << 20) as file:
        rows = list(_write_ids(file, tokenize_documents(documents, tokenizer, threads), tokenizer))
        file.flush()
        flush_to_disk(file.fileno())
    partial_file.replace(path.with_suffix(".ids"))
    write_atomically(path.with_suffix(".documents"), np.array(rows, dtype=RECORD).tobytes())
    content = {"damaged_files": damaged_files, "shared": shared}
    write_atomically(path.with_suffix(".json"), json.dumps(content) + "\n")


def read_unit(staging: Path, number: int) -> TokenizedUnit:
    """What `tokenize_unit` wrote."""
    path = staging / "units" / f"{number:05d}"
    content = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    records = np.fromfile(path.with_suffix(".documents"), dtype=RECORD)
    shared = np.zeros(len(records), dtype=np.uint64)
    for document, bits in content["shared"].items():
        shared[int(document)] = bits
    return TokenizedUnit(records, path.with_suffix(".ids"), content["damaged_files"], shared)


def count_documents(staging: Path, number: int) -> int:
    """How many documents a tokenized unit has."""
    return (staging / "units" / f"{number:05d}.documents").stat().st_size // RECORD.itemsize


def tokenize_documents(
    documents: Iterable[FilteredDocument], tokenizer: Tokenizer, threads: int = 1
) -> Iterator[Encoded]:
    """The documents in order, each with its end-of-text id and its ids; no ids for one that is left out.

    Uses threads, not processes: the tokenizers release the GIL while they encode.
    """
    separator = np.array([tokenizer.end_of_text], dtype=np.uint32)
    pending: deque[tuple[list[FilteredDocument], Future[list[NDArray[np.uint32]]]]] = deque()

    def finish_first() -> Iterator[Encoded]:
        batch, future = pending.popleft()
        for filtered, ids in zip(batch, future.result(), strict=True):
            yield filtered, np.concatenate([separator, ids]) if filtered.status in KEPT else ids

    with ThreadPoolExecutor(threads) as pool:
        for batch in _in_batches(documents):
            pending.append((batch, pool.submit(tokenizer.encode_batch, _kept_texts(batch))))
            if len(pending) > BATCHES_AHEAD:
                yield from finish_first()
        while pending:
            yield from finish_first()


def documents_in_order(state: PrepareState) -> Iterator[Document]:
    """Every document of all units, without damaged files if they are to be skipped."""
    first, *others = state.units
    # read_parts parses Python's documentation at once, with a progress bar, which must not overlap another.
    documents = read_parts(_sound_parts(first, state)[0], state.config.text_column)
    later = (read_parts(_sound_parts(unit, state)[0], state.config.text_column) for unit in others)
    return itertools.chain(documents, itertools.chain.from_iterable(later))


def open_unit(state: PrepareState, number: int) -> tuple[Iterator[FilteredDocument], list[str]]:
    """The documents of a unit, and the names of the damaged files that are left out."""
    parts, damaged_files = _sound_parts(state.units[number], state)
    documents = read_parts(parts, state.config.text_column)
    return filter_documents(documents, state.config.on_bad_text), damaged_files


def _sound_parts(unit: Unit, state: PrepareState) -> tuple[list[Part], list[str]]:
    """The parts of a unit that can be read to their end, and the file names of the others.

    Checked only if damaged files are to be skipped: packed and Parquet files are read twice then.
    """
    if state.config.on_bad_file == "fail":
        return list(unit), []
    sound, damaged_files = [], []
    for part in unit:
        try:
            if part.file.is_packed or part.file.kind == ".parquet":
                deque(read_parts([part], state.config.text_column), maxlen=0)
            sound.append(part)
        except DamagedFileError:
            damaged_files.append(part.file.name)
    return sound, damaged_files


def count_tokenized(staging: Path, state: PrepareState) -> tuple[int, int]:
    """Estimated (bytes of text read, tokens written) so far: for a progress bar."""
    itemsize = token_format(open_tokenizer(staging).vocab_size).dtype.itemsize
    read_bytes = tokens = 0
    for entry in os.scandir(staging / "units"):
        number, _, kind = entry.name.partition(".")
        if kind not in {"ids", "ids.partial"}:
            continue
        written = entry.stat().st_size // itemsize
        tokens += written
        unit_bytes = state.unit_bytes[int(number)]
        read_bytes += unit_bytes if kind == "ids" else min(unit_bytes, round(written * BYTES_PER_TOKEN))
    return read_bytes, tokens


def _write_ids(
    file: BinaryIO, encoded: Iterable[Encoded], tokenizer: Tokenizer
) -> Iterator[tuple[int, int, int, int, int]]:
    """Append the ids of every document to the file; yields its record."""
    dtype = token_format(tokenizer.vocab_size).dtype
    for (document, status), ids in encoded:
        check_ids(ids, tokenizer.vocab_size)
        file.write(ids.astype(dtype).tobytes())
        halves = hash_halves(document_hash(document.text))
        yield (*halves, ids.size, len(document.text.encode()), STATUSES.index(status))


def _search_benchmarks(
    documents: Iterable[FilteredDocument], search: BenchmarkSearch, shared: dict[int, int]
) -> Iterator[FilteredDocument]:
    """The same documents; the bits of those that share a passage with a benchmark are added to `shared`."""
    searched = 0
    for batch in _in_batches(documents):
        bits = search.find(_kept_texts(batch))
        shared |= {searched + int(index): int(bits[index]) for index in np.flatnonzero(bits)}
        searched += len(batch)
        yield from batch


def _kept_texts(batch: list[FilteredDocument]) -> list[str]:
    return [document.text if status in KEPT else "" for document, status in batch]


def _in_batches(documents: Iterable[FilteredDocument]) -> Iterator[list[FilteredDocument]]:
    """Lists of consecutive documents of about BATCH_CHARACTERS together."""
    batch: list[FilteredDocument] = []
    characters = 0
    for filtered in documents:
        batch.append(filtered)
        characters += len(filtered.document.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
