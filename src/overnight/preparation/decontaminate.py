"""Documents that share a passage with a benchmark: 13 words in a row, as for GPT-3 (its appendix C).

Each text field of a line of .jsonl is a text, also within lists and objects; the endings of a context are
read together with it, one text each. A .txt or .tokens file is one text. A text of 8 to 12 words is searched
for as a whole; shorter ones, such as labels, are not (8 words are GPT-3's minimum).

The passages are in benchmarks.npz in the staging folder.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from overnight.data.text_files import refuse_wide_encoding
from overnight.files import write_atomically
from overnight.preparation.ngrams import Hashes, Words, hash_windows, hash_words
from overnight.preparation.prepare_state import read_once

PASSAGE_WORDS = 13
FEWEST_WORDS = 8
MOST_BENCHMARKS = 64  # one bit each
CONTEXTS = ("ctx", "context", "query", "question", "prompt", "goal")  # fields that the endings follow
TEXTS_AT_ONCE = 10_000
BENCHMARKS = "benchmarks.npz"

Index = dict[int, NDArray[np.uint64]]
"""By number of words: (2, passages), the sorted hashes, and a bit for each benchmark that holds them."""


class BenchmarkSearch:
    """Finds the texts that share a passage with a benchmark."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._prefixes = {length: _first_bits(hashes) for length, (hashes, _) in index.items()}

    def find(self, texts: Sequence[str]) -> NDArray[np.uint64]:
        """(texts,): for each a bit for each benchmark that it shares a passage with."""
        words = hash_words(texts)
        shared = np.zeros(len(texts), dtype=np.uint64)
        for length, (known, benchmarks) in self._index.items():
            hashes, text_indices = hash_windows(words, length)
            # The first bits exclude most hashes, faster than a binary search.
            is_first, shift = self._prefixes[length]
            candidates = np.flatnonzero(is_first[(hashes >> shift).astype(np.intp)])
            hashes, text_indices = hashes[candidates], text_indices[candidates]
            found = np.minimum(np.searchsorted(known, hashes), known.size - 1)
            equal = known[found] == hashes
            np.bitwise_or.at(shared, text_indices[equal], benchmarks[found[equal]])
        return shared


def _first_bits(known: Hashes) -> tuple[NDArray[np.bool_], np.uint64]:
    """(2^bits,): True where a known hash begins with these bits (at most 24); and the shift to them."""
    bits = min(24, known.size.bit_length() + 4)
    shift = np.uint64(64 - bits)
    is_first = np.zeros(1 << bits, dtype=bool)
    is_first[(known >> shift).astype(np.intp)] = True
    return is_first, shift


def benchmark_names(paths: Sequence[str]) -> dict[str, Path]:
    """The files of the benchmarks by name, in the order of the names. Raises ValueError for equal names."""
    if len(paths) > MOST_BENCHMARKS:
        raise ValueError(f"decontaminate: {len(paths)} files are more than {MOST_BENCHMARKS}")
    files = {Path(path).stem: Path(path) for path in sorted(paths, key=lambda path: Path(path).stem)}
    if len(files) < len(paths):
        raise ValueError(f"decontaminate: two of {', '.join(paths)} have the same name; rename one")
    return files


def describe_benchmarks(paths: Sequence[str]) -> str:
    """Name and sha256 of each benchmark."""
    files = benchmark_names(paths).items()
    return ", ".join(f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}" for name, path in files)


def build_index(files: Mapping[str, Path]) -> Index:
    """The passages of the benchmarks. Raises ValueError for a damaged file, or one without a passage."""
    found: dict[int, list[NDArray[np.uint64]]] = {}
    for number, path in enumerate(files.values()):
        passages = [(length, np.unique(hashes)) for length, hashes in _passages(path) if hashes.size]
        for length, hashes in passages:
            bits = np.full(hashes.size, 1 << number, dtype=np.uint64)
            found.setdefault(length, []).append(np.stack([hashes, bits]))
        if not passages:
            raise ValueError(f"decontaminate: {path} holds no text of {FEWEST_WORDS} words or more")
    return {length: _merge(np.concatenate(each, axis=1)) for length, each in sorted(found.items())}


def save_index(staging: Path, paths: Sequence[str]) -> None:
    """Write the passages of the benchmarks into the staging folder, atomically."""
    content, index = io.BytesIO(), build_index(benchmark_names(paths))
    arrays: dict[str, Any] = {str(length): passages for length, passages in index.items()}
    np.savez(content, **arrays)
    write_atomically(staging / BENCHMARKS, content.getvalue())


def open_search(staging: Path) -> BenchmarkSearch:
    """The search for what `save_index` wrote, read once per process."""
    return read_once(_load_search, staging / BENCHMARKS)


def _load_search(path: Path) -> BenchmarkSearch:
    with np.load(path) as index:
        return BenchmarkSearch({int(length): index[length] for length in index})


def _merge(passages: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Sorted, each passage once, with the bits of all benchmarks that hold it."""
    passages = passages[:, np.argsort(passages[0], kind="stable")]
    starts = np.flatnonzero(np.concatenate([[True], passages[0, 1:] != passages[0, :-1]]))
    return np.stack([passages[0, starts], np.bitwise_or.reduceat(passages[1], starts)])


def _passages(path: Path) -> Iterator[tuple[int, Hashes]]:
    """(number of words, hashes) of the passages of a benchmark."""
    texts = list(dict.fromkeys(_read_texts(path)))
    for begin in range(0, len(texts), TEXTS_AT_ONCE):
        words = hash_words(texts[begin : begin + TEXTS_AT_ONCE])
        yield PASSAGE_WORDS, hash_windows(words, PASSAGE_WORDS)[0]
        sizes = np.diff(words.bounds)
        for length in range(FEWEST_WORDS, PASSAGE_WORDS):
            whole = words.hashes[np.repeat(sizes == length, sizes)]  # of the texts of that length, end to end
            yield length, hash_windows(Words(whole, np.arange(0, whole.size + 1, length)), length)[0]


def _read_texts(path: Path) -> Iterator[str]:
    try:
        data = path.read_bytes()
        refuse_wide_encoding(data, str(path))
        content = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"decontaminate: {path} is not UTF-8 at byte {error.start:,}") from None
    if path.suffix.lower() != ".jsonl":
        yield content
        return
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError):
            raise ValueError(f"decontaminate: {path} line {number:,} is not JSON") from None
        yield from _texts_in(fields)


def _texts_in(value: object, before: str = "") -> Iterator[str]:
    """The texts of a field, of the items of a list or of the fields of an object; `before` leads each."""
    if isinstance(value, str):
        yield before + value
    elif isinstance(value, list):
        for item in value:
            yield from _texts_in(item, before)
    elif isinstance(value, dict):
        context = next((name for name in CONTEXTS if isinstance(value.get(name), str)), None)
        leading = before if context is None else f"{value[context]} "
        fields = [field for field in value.values() if not isinstance(field, str)]
        nested = [text for field in fields for text in _texts_in(field, leading)]
        yield from nested
        for name, field in value.items():
            if isinstance(field, str) and not (nested and name == context):  # else it leads the nested texts
                yield field
