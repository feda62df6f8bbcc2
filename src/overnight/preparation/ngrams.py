"""Texts as words, and words as numbers: shared passages and near-duplicates are found without the texts.

A word is a run of letters and digits in lower case; all else stands between words, as in GPT-3's search for
overlaps ("ignoring all punctuation, whitespace, and casing", appendix C). Words, and runs of words, become
64 bits each, the same on every machine: polynomials modulo 2^64 in the characters, and in the words.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BLOCK_CHARACTERS = 1 << 16  # at once: what they take stays within a processor's cache
CHARACTER_FACTOR = 0x9E3779B97F4A7C15  # odd, and so with an inverse modulo 2^64
WORD_FACTOR = 0xD1342543DE82EF95
BETWEEN_WORDS = re.compile(r"[\W_]")

Hashes = NDArray[np.uint64]
Places = NDArray[np.int64]


@dataclass(frozen=True)
class Words:
    """The words of some texts, end to end."""

    hashes: Hashes
    """(words,): a number for each."""
    bounds: Places
    """(texts + 1,): where each text's words begin, and last where all end."""


def hash_words(texts: Sequence[str]) -> Words:
    """The words of all texts as numbers."""
    lowered = [text.lower() for text in texts]
    hashes, starts = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    begin = 0
    for block in _blocks("\n".join(lowered)):
        in_block, places = _hash_block(block)
        hashes.append(in_block)
        starts.append(places + begin)
        begin += len(block)
    edges = np.cumsum([0, *(len(text) + 1 for text in lowered)])
    return Words(np.concatenate(hashes), np.searchsorted(np.concatenate(starts), edges))


def hash_windows(words: Words, length: int) -> tuple[Hashes, Places]:
    """Every run of `length` words that lies within one text, as a number; and which text that is."""
    windows = words.hashes.size - length + 1
    if windows <= 0:
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    powers, inverses = _powers(WORD_FACTOR, words.hashes.size)
    sums = np.zeros(words.hashes.size + 1, np.uint64)
    np.cumsum(words.hashes * powers[: words.hashes.size], out=sums[1:])
    hashes = (sums[length:] - sums[:-length]) * inverses[:windows]
    texts = np.repeat(np.arange(words.bounds.size - 1), np.diff(words.bounds))
    within = texts[:windows] == texts[length - 1 :]
    return hashes[within], texts[:windows][within]


def _blocks(text: str) -> Iterator[str]:
    """The text in pieces of some length that end between words."""
    begin = 0
    while begin < len(text):
        found = BETWEEN_WORDS.search(text, begin + BLOCK_CHARACTERS)
        end = found.end() if found else len(text)
        yield text[begin:end]
        begin = end


def _hash_block(block: str) -> tuple[Hashes, Places]:
    """A number for each word, and where it begins."""
    if block.isascii():
        points = np.frombuffer(block.encode(), dtype=np.uint8).astype(np.intp)
    else:
        points = np.frombuffer(block.encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.intp)
    values = _character_values().take(points)
    inside = np.zeros(values.size + 2, dtype=bool)
    np.not_equal(values, 0, out=inside[1:-1])
    edges = np.flatnonzero(inside[1:] != inside[:-1])
    starts, ends = edges[0::2], edges[1::2]
    powers, inverses = _powers(CHARACTER_FACTOR, values.size)
    sums = np.zeros(values.size + 1, np.uint64)
    np.cumsum(values * powers[: values.size], out=sums[1:])
    return _mix((sums[ends] - sums[starts]) * inverses[starts]), starts


@functools.cache
def _character_values() -> Hashes:
    """(code points,): a number for each letter and digit, 0 for what stands between words."""
    points = range(sys.maxunicode + 1)
    in_words = np.fromiter((chr(point).isalnum() for point in points), dtype=bool, count=len(points))
    return np.where(in_words, _mix(np.arange(1, len(points) + 1, dtype=np.uint64)), np.uint64(0))


def _powers(factor: int, count: int) -> tuple[Hashes, Hashes]:
    """At least `count` powers of a factor, from the zeroth on, and their inverses, modulo 2^64."""
    return _so_many_powers(factor, 1 << max(16, count.bit_length()))


@functools.lru_cache(maxsize=4)
def _so_many_powers(factor: int, count: int) -> tuple[Hashes, Hashes]:
    factors = np.array([[factor], [pow(factor, -1, 2**64)]], dtype=np.uint64)
    powers = np.repeat(factors, count, axis=1)
    powers[:, 0] = 1
    np.cumprod(powers, axis=1, out=powers)
    return powers[0], powers[1]


def _mix(numbers: Hashes) -> Hashes:
    """Each of 64 bits made to depend on all (the last step of splitmix64: Steele et al., 2014)."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Hashes = numbers ^ (numbers >> np.uint64(31))
    return mixed
