"""Documents to shards: what is left out, which side a document is on, its ids, and the manifest at the end.

    source -> judged documents -> ids -> shards of two splits -> manifest

Each arrow is a function over iterators, so memory stays flat: what is kept is a 16-byte hash per document.
The result is the same, byte for byte, for any number of workers, and appears under its name only when it is
complete.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from overnight import __version__
from overnight.data.documents import Document
from overnight.data.output import alone, appearing_whole, check_disk, plain_disk_errors
from overnight.data.request import PrepareConfig, output_folder
from overnight.data.selection import KEPT, Fate, judge, split_of
from overnight.data.shards import SPLITS, Manifest, ShardWriter, read_manifest, verify, write_manifest
from overnight.data.sources import Source, open_source
from overnight.data.token_file import HEADER_BYTES, token_format
from overnight.settings import raise_problems
from overnight.terminal import progress, say

if TYPE_CHECKING:
    from overnight.text.tokenizer import Tokenizer

__all__ = [
    "PrepareConfig",
    "encode_documents",
    "output_folder",
    "prepare",
    "training_texts",
    "write_prepared",
]

BATCH_CHARACTERS = 200_000  # what one thread encodes at a time
BATCHES_AHEAD = 32  # the same for any number of threads, so that they all read equally far
Judged = tuple[Document, Fate]
Encoded = tuple[Document, Fate, NDArray[np.uint32]]
Request = dict[str, str | int | float | None]


def prepare(config: PrepareConfig) -> Manifest:
    """Fill `output_folder(config)` with shards, or verify and reuse it if the same request filled it before.

    Raises ValueError for a request that can't be met: nothing is there under the folder's name then.
    """
    raise_problems(config.problems(), "prepare")
    folder = output_folder(config)
    with plain_disk_errors(folder):
        source = open_source(config.source, config.text_column, config.from_file)
        request = _request(config, source)
        existing = _find_prepared(folder, request)  # needs no lock: a folder appears whole
        if existing is None:
            with alone(folder):
                existing = _find_prepared(folder, request)  # by another process, while this one waited
                if existing is None:
                    with appearing_whole(folder) as partial:
                        return write_prepared(partial, source, config, request)
    say(f"{folder} holds this already, and it is sound")
    return existing


def write_prepared(folder: Path, source: Source, config: PrepareConfig, request: Request) -> Manifest:
    """Write shards, tokenizer and manifest of one source into an empty folder."""
    from overnight.text.load import build_tokenizer

    fraction = _validation_fraction(config, source)
    tokenizer = build_tokenizer(config.tokenizer, training_texts(source, config.on_bad_text, fraction))
    tokenizer.save(folder / "tokenizer")
    writers = {
        split: ShardWriter(folder, split, tokenizer.vocab_size, config.shard_tokens) for split in SPLITS
    }
    try:
        fates = _write_documents(writers, source, tokenizer, config)
        shards = {split: writer.finish() for split, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.abandon()
    manifest = Manifest(
        overnight_version=__version__,
        source=source.name,
        licence=source.licence,
        request=request,
        split_rule=f"validation if the first 8 bytes of the text's blake2b-128 are below {fraction} of 2^64",
        tokenizer=tokenizer.name,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        end_of_text=tokenizer.end_of_text,
        documents=fates["kept"] + fates["repaired"],
        duplicate_documents=fates["duplicate"],
        empty_documents=fates["empty"],
        skipped_documents=fates["skipped"],
        repaired_documents=fates["repaired"],
        train=shards["train"],
        validation=shards["validation"],
    )
    _check_splits(manifest)
    write_manifest(folder, manifest)
    return manifest


def training_texts(source: Source, on_bad_text: str, validation_fraction: float) -> Iterator[str]:
    """What a tokenizer may be trained on: no validation document. Reads nothing until asked for the first."""
    documents = source.documents()  # some sources show a bar of their own while they read
    with progress("tokenizer", source.text_bytes / 1e6, "MB") as advance:
        for document, fate in judge(documents, on_bad_text):
            advance(len(document.text.encode()) / 1e6)
            if fate in KEPT and split_of(document.text, validation_fraction) == "train":
                yield document.text


def encode_documents(
    judged: Iterable[Judged], tokenizer: Tokenizer, workers: int | None = None
) -> Iterator[Encoded]:
    """The documents in their order, each with its end-of-text id and its own; one left out has no ids.

    Threads, not processes: the tokenizers release the interpreter while they work.
    """
    before = np.array([tokenizer.end_of_text], dtype=np.uint32)
    waiting: deque[tuple[list[Judged], Future[list[NDArray[np.uint32]]]]] = deque()

    def finished() -> Iterator[Encoded]:
        batch, future = waiting.popleft()
        for (document, fate), ids in zip(batch, future.result(), strict=True):
            yield document, fate, np.concatenate([before, ids]) if fate in KEPT else ids

    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        for batch in _in_batches(judged):
            texts = [document.text if fate in KEPT else "" for document, fate in batch]
            waiting.append((batch, pool.submit(tokenizer.encode_batch, texts)))
            if len(waiting) > BATCHES_AHEAD:
                yield from finished()
        while waiting:
            yield from finished()


def _write_documents(
    writers: dict[str, ShardWriter], source: Source, tokenizer: Tokenizer, config: PrepareConfig
) -> Counter[Fate]:
    """Send every document to the shards of its split; how many met which fate."""
    fraction = _validation_fraction(config, source)
    fates: Counter[Fate] = Counter()
    tokens = 0
    encoded = encode_documents(judge(source.documents(), config.on_bad_text), tokenizer, config.workers)
    with progress("writing shards", source.text_bytes / 1e6, "MB") as advance:
        first = list(itertools.islice(encoded, 64))
        check_disk(writers["train"].folder, _estimate_bytes(first, source, tokenizer, config.tokens))
        for document, fate, ids in itertools.chain(first, encoded):
            text_bytes = len(document.text.encode())
            advance(text_bytes / 1e6)
            fates[fate] += 1
            if fate in KEPT:
                writers[split_of(document.text, fraction)].add(ids, text_bytes)
                tokens += ids.size
            if config.tokens is not None and tokens >= config.tokens:
                break
    return fates


def _estimate_bytes(first: list[Encoded], source: Source, tokenizer: Tokenizer, limit: int | None) -> int:
    """About how large the shards will be, if all documents are like the first ones, and a tenth more."""
    tokens = sum(ids.size for _, _, ids in first)
    text_bytes = sum(len(document.text.encode()) for document, _, _ in first)
    expected = tokens * max(1.0, source.text_bytes / max(1, text_bytes))
    if limit is not None:
        expected = min(expected, limit)
    return round(1.1 * expected * token_format(tokenizer.vocab_size).dtype.itemsize) + 2 * HEADER_BYTES


def _validation_fraction(config: PrepareConfig, source: Source) -> float:
    return source.validation_fraction if config.validation_fraction is None else config.validation_fraction


def _check_splits(manifest: Manifest) -> None:
    """Raise ValueError if nothing is left on one side."""
    if manifest.documents == 0:
        raise ValueError(f"{manifest.source} holds no text")
    for split in SPLITS:
        if not manifest.shards(split):
            direction = "raise" if split == "validation" else "lower"
            raise ValueError(
                f"none of the {manifest.documents:,} documents of {manifest.source} fell to {split}, "
                f"which goes by their hash: {direction} --validation-fraction, or give more text"
            )


def _request(config: PrepareConfig, source: Source) -> Request:
    """What decides the content of the shards, in words that mean the same on every machine."""
    from overnight.text.load import NAMES, load_tokenizer

    tokenizer = config.tokenizer
    if tokenizer not in NAMES and not tokenizer.startswith("bpe-"):  # a path: what lies there counts
        tokenizer = f"{Path(tokenizer).name} {load_tokenizer(tokenizer).fingerprint}"
    return {
        "source": source.name,
        "source_sha256": source.sha256,
        "text_column": config.text_column,
        "on_bad_text": config.on_bad_text,
        "tokenizer": tokenizer,
        "validation_fraction": _validation_fraction(config, source),
        "tokens": config.tokens,
        "shard_tokens": config.shard_tokens,
    }


def _find_prepared(folder: Path, request: Request) -> Manifest | None:
    """The manifest in `folder` if it holds this very request, None if there is nothing yet.

    Raises ValueError for anything else that is there, and if the shards are not sound.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    if not (folder / "manifest.json").is_file():
        raise ValueError(f"{folder} is there and holds no shards of ours; give another --out")
    manifest = read_manifest(folder)
    before = manifest.request
    differing = [
        f"{name} is {before.get(name)} there and {request[name]} here"
        for name in request
        if before.get(name) != request[name] and name != "source_sha256"
    ]
    if not differing and before != request:
        differing = ["the text of the source has changed since"]
    if differing:
        raise ValueError(
            f"{folder} holds something else ({'; '.join(differing)}): give another --out, or delete it"
        )
    return verify(folder)


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
