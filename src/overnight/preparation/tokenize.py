"""Documents to ids, unit by unit, by any worker in any order: the slowest step."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from overnight.data.shards import HEADER_BYTES, check_ids, token_format
from overnight.data.text_files import DamagedFileError
from overnight.files import flush_to_disk, write_atomically
from overnight.preparation.decontaminate import BenchmarkSearch, open_search
from overnight.preparation.dedup import BUCKETS, sign_texts
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
from overnight.preparation.ngrams import Hashes
from overnight.preparation.prepare_state import (
    PrepareState,
    Unit,
    open_encoder,
    open_tokenizer,
    read_state,
    reject_encoder,
    target_units,
)
from overnight.preparation.sources import read_parts
from overnight.terminal import progress
from overnight.tokenizer.fast_byte_pair import FastBytePair
from overnight.tokenizer.open_tokenizer import build_tokenizer
from overnight.tokenizer.tokenizer import Tokenizer

BATCH_CHARACTERS = 200_000  # per call of the tokenizer in one thread
TRAINING_BYTES = 1_000_000_000  # of text that a tokenizer is trained on, at most
SAMPLED_DOCUMENTS = 64
CHECKED_DOCUMENTS, CHECKED_CHARACTERS = 8, 3000  # the first documents of a unit, the start of each
BYTES_PER_TOKEN = 4.5  # of English text in GPT-2's tokens: for the progress bar of an unfinished unit
POLL_SECONDS = 0.3
BATCHES_AHEAD = 32  # the same for any number of threads, so that all of them read equally far ahead


class TokenizedBatch(NamedTuple):
    """Some consecutive documents."""

    records: Records
    ids: NDArray[np.uint32]
    """Of each document that is kept the end-of-text id and the ids of its text, end to end."""
    signatures: Hashes
    """(BUCKETS, documents), or (BUCKETS, 0) if near-duplicates are kept."""


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
        for text, status in documents:
            size = len(text.encode())
            advance(size / 1e6)
            read_bytes += size
            digest = document_hash(text)
            if status in KEPT and digest not in seen:
                seen.add(digest)
                if split_of(text, state.validation_fraction) == "train":
                    yield text
            if read_bytes >= TRAINING_BYTES:
                return


def estimate_bytes(staging: Path, state: PrepareState) -> int:
    """Estimated disk space of the units and the shards, if all documents are like the first ones."""
    tokenizer, _ = open_encoder(staging)
    first = itertools.islice(documents_in_order(state), SAMPLED_DOCUMENTS)
    batches = list(tokenize_documents(first, tokenizer))
    tokens = sum(batch.ids.size for batch in batches)
    text_bytes = sum(int(batch.records["bytes"].sum()) for batch in batches)
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
    documents, damaged_files = open_unit(state, number)
    documents, tokenizer = _check_encoder(staging, documents)
    dtype = token_format(tokenizer.vocab_size).dtype
    search = open_search(staging) if state.config.benchmark_paths else None
    signed = state.config.near_duplicates == "drop"
    records, signatures = [np.zeros(0, RECORD)], [np.zeros((BUCKETS, 0), np.uint64)]
    partial_file = path.with_suffix(".ids.partial")
    with partial_file.open("wb", buffering=1 << 20) as file:
        for batch in tokenize_documents(documents, tokenizer, threads, search, signed=signed):
            file.write(batch.ids.astype(dtype).tobytes())
            records.append(batch.records)
            signatures.append(batch.signatures)
        file.flush()
        flush_to_disk(file.fileno())
    partial_file.replace(path.with_suffix(".ids"))
    write_atomically(path.with_suffix(".documents"), np.concatenate(records).tobytes())
    if signed:
        write_atomically(path.with_suffix(".signatures"), np.concatenate(signatures, axis=1).tobytes())
    write_atomically(path.with_suffix(".json"), json.dumps(damaged_files) + "\n")


def _check_encoder(
    staging: Path, documents: Iterator[FilteredDocument]
) -> tuple[Iterator[FilteredDocument], Tokenizer]:
    """(the same documents, their tokenizer): by fastokens only if tiktoken gives the first the same ids."""
    tokenizer, _ = open_encoder(staging)
    if isinstance(tokenizer, FastBytePair):
        first = list(itertools.islice(documents, CHECKED_DOCUMENTS))
        documents = itertools.chain(first, documents)
        if difference := tokenizer.difference([text[:CHECKED_CHARACTERS] for text, _ in first]):
            tokenizer = reject_encoder(staging, difference)
    return documents, tokenizer


def unit_path(staging: Path, number: int) -> Path:
    """Common stem of the paths of a unit's files.

    The concatenated ids of all documents are in .ids, one `documents.RECORD` for each in .documents, their
    signatures (near_duplicates="drop") in .signatures, and the names of the files that were skipped
    (on_bad_file="skip") in .json, which is written last.
    """
    return staging / "units" / f"{number:05d}"


def read_records(staging: Path, number: int) -> Records:
    """The records of a tokenized unit's documents, in order."""
    return np.fromfile(unit_path(staging, number).with_suffix(".documents"), dtype=RECORD)


def read_bucket(staging: Path, units: int, bucket: int) -> Hashes:
    """(documents,): one row of the signatures of all documents of the first `units` units."""
    rows = []
    for number in range(units):
        path = unit_path(staging, number).with_suffix(".signatures")
        documents = path.stat().st_size // (8 * BUCKETS)
        rows.append(np.fromfile(path, np.uint64, documents, offset=8 * documents * bucket))
    return np.concatenate(rows)


def tokenize_documents(
    documents: Iterable[FilteredDocument],
    tokenizer: Tokenizer,
    threads: int = 1,
    search: BenchmarkSearch | None = None,
    *,
    signed: bool = False,
) -> Iterator[TokenizedBatch]:
    """The documents in order, each with its ids, what `search` finds in it, and its signature if `signed`.

    Uses threads, not processes: the tokenizers and numpy release the GIL.
    """
    work = partial(_tokenize_batch, tokenizer, search, signed)
    pending: deque[Future[TokenizedBatch]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for batch in _in_batches(documents):
            pending.append(pool.submit(work, batch))
            if len(pending) > BATCHES_AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _tokenize_batch(
    tokenizer: Tokenizer, search: BenchmarkSearch | None, signed: bool, batch: list[FilteredDocument]
) -> TokenizedBatch:
    texts = [text if status in KEPT else "" for text, status in batch]
    shared = [0] * len(batch) if search is None else search.find(texts).tolist()
    separator = np.array([tokenizer.end_of_text], dtype=np.uint32)
    ids, rows = [], []
    for (text, status), found, in_text in zip(batch, shared, tokenizer.encode_batch(texts), strict=True):
        ids.append(np.concatenate([separator, in_text]) if status in KEPT else in_text)
        content = text.encode()
        lengths = ids[-1].size, len(content)
        rows.append((*document_hash(content), found, *lengths, STATUSES.index(status)))
    check_ids(all_ids := np.concatenate(ids), tokenizer.vocab_size)
    return TokenizedBatch(np.array(rows, RECORD), all_ids, sign_texts(texts if signed else []))


def documents_in_order(state: PrepareState) -> Iterator[FilteredDocument]:
    """Every document of all units; damaged files are left out if they are to be skipped."""
    return itertools.chain.from_iterable(open_unit(state, number)[0] for number in range(len(state.units)))


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


@contextmanager
def tokenizing_bar(staging: Path, state: PrepareState, units: int) -> Iterator[None]:
    """A progress bar of the first `units` units, whose files are looked at a few times a second."""
    started_at, over = time.perf_counter(), threading.Event()
    shown, before = 0.0, count_tokenized(staging, state)[1]  # tokens of an earlier run, interrupted

    with progress("encoding", sum(state.unit_bytes[:units]) / 1e6, "MB") as advance:

        def update() -> None:
            nonlocal shown
            megabytes, tokens = count_tokenized(staging, state)
            rate = (tokens - before) / max(1e-3, time.perf_counter() - started_at)
            advance(megabytes - shown, f"{tokens / 1e6:,.1f} M tokens, {rate / 1e6:.2f} M/s")
            shown = megabytes

        def poll() -> None:
            update()
            while not over.wait(POLL_SECONDS):
                update()

        thread = threading.Thread(target=poll, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            update()


def count_tokenized(staging: Path, state: PrepareState) -> tuple[float, int]:
    """Estimated (megabytes of text read, tokens written) so far."""
    itemsize = token_format(open_tokenizer(staging).vocab_size).dtype.itemsize
    read_bytes = tokens = 0
    for entry in os.scandir(staging / "units"):
        number, _, kind = entry.name.partition(".")
        if kind in {"ids", "ids.partial"}:
            with suppress(FileNotFoundError):  # a partial file that was renamed just now
                written = entry.stat().st_size // itemsize
                tokens += written
                unit = state.unit_bytes[int(number)]
                read_bytes += unit if kind == "ids" else min(unit, round(written * BYTES_PER_TOKEN))
    return read_bytes / 1e6, tokens


def _in_batches(documents: Iterable[FilteredDocument]) -> Iterator[list[FilteredDocument]]:
    """Lists of consecutive documents of about BATCH_CHARACTERS together."""
    batch: list[FilteredDocument] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
