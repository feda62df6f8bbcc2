"""Documents to ids, unit by unit, by any worker in any order: the slowest step."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from overnight.data.shards import HEADER_BYTES, check_ids, token_format
from overnight.data.text_files import DamagedFileError
from overnight.preparation.decontaminate import BenchmarkSearch, open_search
from overnight.preparation.documents import (
    KEPT,
    RECORD,
    STATUSES,
    FilteredDocument,
    Part,
    Records,
    document_hash,
    filter_documents,
    split_of,
)
from overnight.preparation.prepare_state import PrepareState, Unit, open_tokenizer, read_state, target_units
from overnight.preparation.sources import read_parts
from overnight.run_directory import flush_to_disk, write_atomically
from overnight.terminal import progress
from overnight.tokenizer.open_tokenizer import build_tokenizer
from overnight.tokenizer.tokenizer import Tokenizer

BATCH_CHARACTERS = 200_000  # per call of the tokenizer in one thread
TRAINING_BYTES = 1_000_000_000  # of text that a tokenizer is trained on, at most
SAMPLED_DOCUMENTS = 64
BYTES_PER_TOKEN = 4.5  # of English text in GPT-2's tokens: for the progress bar of an unfinished unit
BATCHES_AHEAD = 32  # the same for any number of threads, so that all of them read equally far ahead


class TokenizedDocument(NamedTuple):
    """A document and its ids."""

    filtered: FilteredDocument
    ids: NDArray[np.uint32]
    """The end-of-text id, then the ids of the text; empty if the document is left out."""
    shared: int
    """A bit for each benchmark that the document shares a passage with."""


def save_tokenizer(staging: Path, state: PrepareState) -> None:
    """Load or train the tokenizer, and save it in the staging folder, atomically."""
    partial_folder = staging / "tokenizer.partial"
    shutil.rmtree(partial_folder, ignore_errors=True)
    build_tokenizer(state.config.tokenizer_name, training_texts(state)).save(partial_folder)
    partial_folder.rename(staging / "tokenizer")


def training_texts(state: PrepareState) -> Iterator[str]:
    """The texts to train a tokenizer on: those of the training split, without duplicates, at most 1 GB.

    Reads nothing until the first is taken.
    """
    seen: set[tuple[int, int]] = set()
    documents = documents_in_order(state)
    read_bytes = 0
    with progress("tokenizer", min(TRAINING_BYTES, sum(state.unit_bytes)) / 1e6, "MB") as advance:
        for document, status in documents:
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
    first = itertools.islice(documents_in_order(state), SAMPLED_DOCUMENTS)
    encoded = list(tokenize_documents(first, tokenizer))
    tokens = sum(document.ids.size for document in encoded)
    text_bytes = sum(len(document.filtered.document.text.encode()) for document in encoded)
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
    path = unit_path(staging, number)
    if path.with_suffix(".json").is_file():
        return
    tokenizer = open_tokenizer(staging)
    dtype = token_format(tokenizer.vocab_size).dtype
    documents, damaged_files = open_unit(state, number)
    search = open_search(staging) if state.config.benchmark_paths else None
    rows = []
    partial_file = path.with_suffix(".ids.partial")
    with partial_file.open("wb", buffering=1 << 20) as file:
        for (document, status), ids, shared in tokenize_documents(documents, tokenizer, threads, search):
            check_ids(ids, tokenizer.vocab_size)
            file.write(ids.astype(dtype).tobytes())
            lengths = ids.size, len(document.text.encode())
            rows.append((*document_hash(document.text), shared, *lengths, STATUSES.index(status)))
        file.flush()
        flush_to_disk(file.fileno())
    partial_file.replace(path.with_suffix(".ids"))
    write_atomically(path.with_suffix(".documents"), np.array(rows, dtype=RECORD).tobytes())
    write_atomically(path.with_suffix(".json"), json.dumps(damaged_files) + "\n")


def unit_path(staging: Path, number: int) -> Path:
    """Common stem of the paths of a unit's files.

    The concatenated ids of all documents are in .ids, one `documents.RECORD` for each in .documents, and the
    names of the files that were skipped (on_bad_file="skip") in .json, which is written last.
    """
    return staging / "units" / f"{number:05d}"


def read_records(staging: Path, number: int) -> Records:
    """The records of a tokenized unit's documents, in order."""
    return np.fromfile(unit_path(staging, number).with_suffix(".documents"), dtype=RECORD)


def tokenize_documents(
    documents: Iterable[FilteredDocument],
    tokenizer: Tokenizer,
    threads: int = 1,
    search: BenchmarkSearch | None = None,
) -> Iterator[TokenizedDocument]:
    """The documents in order, each with its ids, and what `search` finds in it.

    Uses threads, not processes: the tokenizers release the GIL while they encode.
    """
    separator = np.array([tokenizer.end_of_text], dtype=np.uint32)
    pending: deque[tuple[list[FilteredDocument], list[int], Future[list[NDArray[np.uint32]]]]] = deque()

    def finish_first() -> Iterator[TokenizedDocument]:
        batch, found, future = pending.popleft()
        for filtered, shared, ids in zip(batch, found, future.result(), strict=True):
            is_kept = filtered.status in KEPT
            yield TokenizedDocument(filtered, np.concatenate([separator, ids]) if is_kept else ids, shared)

    with ThreadPoolExecutor(threads) as pool:
        for batch in _in_batches(documents):
            texts = [document.text if status in KEPT else "" for document, status in batch]
            found = [0] * len(batch) if search is None else search.find(texts).tolist()
            pending.append((batch, found, pool.submit(tokenizer.encode_batch, texts)))
            if len(pending) > BATCHES_AHEAD:
                yield from finish_first()
        while pending:
            yield from finish_first()


def documents_in_order(state: PrepareState) -> Iterator[FilteredDocument]:
    """Every document of all units; damaged files are left out if they are to be skipped."""
    units = (open_unit(state, number)[0] for number in range(len(state.units)))
    # The first is opened at once: Python's documentation has a progress bar, which must not overlap another.
    return itertools.chain(next(units), itertools.chain.from_iterable(units))


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
        if kind in {"ids", "ids.partial"}:
            written = entry.stat().st_size // itemsize
            tokens += written
            unit_bytes = state.unit_bytes[int(number)]
            read_bytes += unit_bytes if kind == "ids" else min(unit_bytes, round(written * BYTES_PER_TOKEN))
    return read_bytes, tokens


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
