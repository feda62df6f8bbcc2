"""Documents that share a passage with a benchmark: 13 words in a row, as for GPT-3 (its appendix C).

A benchmark is a file of its own: each text field of a line of .jsonl is a text, also within lists and
objects; the endings that belong to a context are read together with it, one text each. A .txt or .tokens is
one text. A text of 8 to 12 words counts as a whole; one of fewer, such as a label, tells nothing (8 is
GPT-3's least), and is not looked for.

What is looked for lies in the folder that is being filled:

    benchmarks/13.npy ...   by number of words: (2, passages), sorted numbers and in which benchmarks they are
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from overnight.preparation.ngrams import Hashes, Words, hash_windows, hash_words

PASSAGE_WORDS = 13
FEWEST_WORDS = 8
MOST_BENCHMARKS = 64  # a bit each
CONTEXTS = ("ctx", "context", "query", "question", "prompt", "goal")  # what the endings of a line follow
TEXTS_AT_ONCE = 10_000

Index = dict[int, NDArray[np.uint64]]
"""By number of words: (2, passages), the passages as sorted numbers, and a bit for each benchmark."""


class BenchmarkSearch:
    """Which of many texts share a passage with which benchmark."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._tables = {length: _LikelyTable(hashes) for length, (hashes, _) in index.items()}

    def find(self, texts: Sequence[str]) -> NDArray[np.uint64]:
        """(texts,): for each the sum of the bits of the benchmarks it shares a passage with."""
        words = hash_words(texts)
        shared = np.zeros(len(texts), dtype=np.uint64)
        for length, (known, benchmarks) in self._index.items():
            hashes, places = hash_windows(words, length)
            likely = self._tables[length].likely(hashes)
            hashes, places = hashes[likely], places[likely]
            found = np.minimum(np.searchsorted(known, hashes), known.size - 1)
            equal = known[found] == hashes
            np.bitwise_or.at(shared, places[equal], benchmarks[found[equal]])
        return shared


def benchmark_names(paths: Sequence[str]) -> dict[str, Path]:
    """The benchmarks' files by their names, in the names' order. Raises ValueError for two of one name."""
    if len(paths) > MOST_BENCHMARKS:
        raise ValueError(f"decontaminate: {len(paths)} files are more than {MOST_BENCHMARKS}")
    files = {Path(path).stem: Path(path) for path in sorted(paths, key=lambda path: Path(path).stem)}
    if len(files) < len(paths):
        raise ValueError(f"decontaminate: two of {', '.join(paths)} have one name; rename one")
    return files


def describe_benchmarks(files: Mapping[str, Path]) -> str:
    """Names and sha256 of the benchmarks' files."""
    digests = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    return ", ".join(f"{name} {digest}" for name, digest in digests.items())


def build_index(files: Mapping[str, Path]) -> Index:
    """What to look for. Raises ValueError for a file that can't be read, or holds no text of 8 words."""
    found: dict[int, list[NDArray[np.uint64]]] = {}
    for number, path in enumerate(files.values()):
        passages = [(length, np.unique(hashes)) for length, hashes in _passages(path) if hashes.size]
        for length, hashes in passages:
            bits = np.full(hashes.size, 1 << number, dtype=np.uint64)
            found.setdefault(length, []).append(np.stack([hashes, bits]))
        if not passages:
            raise ValueError(f"decontaminate: {path} holds no text of {FEWEST_WORDS} words or more")
    return {length: _merge(np.concatenate(each, axis=1)) for length, each in sorted(found.items())}


def save_index(place: Path, index: Index) -> None:
    """Write it into the folder, whole or not at all."""
    partial_folder = place / "benchmarks.partial"
    shutil.rmtree(partial_folder, ignore_errors=True)
    partial_folder.mkdir()
    for length, passages in index.items():
        np.save(partial_folder / f"{length}.npy", passages)
    partial_folder.rename(place / "benchmarks")


def open_search(place: Path) -> BenchmarkSearch:
    """What `save_index` wrote, opened once in a process."""
    return _open_search(str(place / "benchmarks"), (place / "benchmarks").stat().st_mtime_ns)


@functools.lru_cache(maxsize=1)
def _open_search(folder: str, _state: int) -> BenchmarkSearch:
    return BenchmarkSearch({int(path.stem): np.load(path) for path in sorted(Path(folder).glob("*.npy"))})


class _LikelyTable:
    """Tells of most numbers at once, by their first bits, that they are not known; 16 MB at most."""

    def __init__(self, known: Hashes) -> None:
        bits = min(24, known.size.bit_length() + 4)
        self._shift = np.uint64(64 - bits)
        self._is_known = np.zeros(1 << bits, dtype=bool)
        self._is_known[(known >> self._shift).astype(np.intp)] = True

    def likely(self, hashes: Hashes) -> NDArray[np.intp]:
        """Where the numbers stand that may be known."""
        return np.flatnonzero(self._is_known[(hashes >> self._shift).astype(np.intp)])


def _merge(passages: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Sorted, each once, with the bits of all benchmarks that hold it."""
    passages = passages[:, np.argsort(passages[0], kind="stable")]
    starts = np.flatnonzero(np.concatenate([[True], passages[0, 1:] != passages[0, :-1]]))
    return np.stack([passages[0, starts], np.bitwise_or.reduceat(passages[1], starts)])


def _passages(path: Path) -> Iterator[tuple[int, Hashes]]:
    """(words, numbers): what to look for of a benchmark's texts."""
    texts = list(dict.fromkeys(_read_texts(path)))
    for begin in range(0, len(texts), TEXTS_AT_ONCE):
        words = hash_words(texts[begin : begin + TEXTS_AT_ONCE])
        yield PASSAGE_WORDS, hash_windows(words, PASSAGE_WORDS)[0]
        sizes = np.diff(words.bounds)
        for length in range(FEWEST_WORDS, PASSAGE_WORDS):
            whole = words.hashes[np.repeat(sizes == length, sizes)]
            if whole.size:
                alone = Words(whole, np.arange(0, whole.size + 1, length))
                yield length, hash_windows(alone, length)[0]


def _read_texts(path: Path) -> Iterator[str]:
    """Every text of a benchmark's file."""
    try:
        content = path.read_bytes().decode()
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
    """The texts of a field, of a list's items or of an object's fields; a list's behind their context."""
    if isinstance(value, str):
        yield before + value
    elif isinstance(value, list):
        for item in value:
            yield from _texts_in(item, before)
    elif isinstance(value, dict):
        yield from _texts_of_fields(value, before)


def _texts_of_fields(fields: Mapping[str, object], before: str) -> Iterator[str]:
    context = next((name for name in CONTEXTS if isinstance(fields.get(name), str)), None)
    leading = before if context is None else f"{fields[context]} "
    behind = [
        text for value in fields.values() if not isinstance(value, str) for text in _texts_in(value, leading)
    ]
    yield from behind
    for name, value in fields.items():
        if isinstance(value, str) and not (behind and name == context):
            yield value
