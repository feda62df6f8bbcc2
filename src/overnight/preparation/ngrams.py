"""Hashes of words and of n-grams of words, by which shared passages and near-duplicates are found.

A word is a run of letters and digits in lower case, as in GPT-3's search for overlaps ("ignoring all
punctuation, whitespace, and casing", appendix C). Its hash has 64 bits and is the same on every machine: a
polynomial modulo 2^64 in its characters; that of an n-gram is one in the hashes of its words.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BLOCK_CHARACTERS = 1 << 16  # hashed at once: their arrays fit a processor's cache
CHARACTER_FACTOR = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
WORD_FACTOR = 0xD1342543DE82EF95
BETWEEN_WORDS = re.compile(r"[\W_]")

Hashes = NDArray[np.uint64]
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Words:
    """The words of several texts, end to end."""

    hashes: Hashes
    """(words,): their hashes."""
    bounds: Indices
    """(texts + 1,): the index of each text's first word; last, the number of words."""


def hash_words(texts: Sequence[str]) -> Words:
    """The hashes of the words of all texts."""
    lowered = [text.lower() for text in texts]
    hashes, starts = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    begin = 0
    for block in _blocks("\n".join(lowered)):
        in_block, first = _hash_block(block)
        hashes.append(in_block)
        starts.append(first + begin)
        begin += len(block)
    edges = np.cumsum([0, *(len(text) + 1 for text in lowered)])
    return Words(np.concatenate(hashes), np.searchsorted(np.concatenate(starts), edges))


def hash_windows(words: Words, length: int) -> tuple[Hashes, Indices]:
    """The hash of every run of `length` words within one text, and the index of that text."""
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
    begin = 0
    while begin < len(text):
        found = BETWEEN_WORDS.search(text, begin + BLOCK_CHARACTERS)
        end = found.end() if found else len(text)
        yield text[begin:end]
        begin = end


def _hash_block(block: str) -> tuple[Hashes, Indices]:
    """The hash of each word, and the index of its first character."""
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
    """(code points,): a random number for each letter and digit, 0 for everything else."""
    points = range(sys.maxunicode + 1)
    in_words = np.fromiter((chr(point).isalnum() for point in points), dtype=bool, count=len(points))
    return np.where(in_words, _mix(np.arange(1, len(points) + 1, dtype=np.uint64)), np.uint64(0))


def _powers(factor: int, count: int) -> tuple[Hashes, Hashes]:
    """At least `count` powers of a factor, from the zeroth on, and their inverses, modulo 2^64."""
    return _cached_powers(factor, 1 << max(16, count.bit_length()))


@functools.lru_cache(maxsize=4)
def _cached_powers(factor: int, count: int) -> tuple[Hashes, Hashes]:
    factors = np.array([[factor], [pow(factor, -1, 2**64)]], dtype=np.uint64)
    powers = np.repeat(factors, count, axis=1)
    powers[:, 0] = 1
    np.cumprod(powers, axis=1, out=powers)
    return powers[0], powers[1]


def _mix(numbers: Hashes) -> Hashes:
    """Make every output bit depend on every input bit (splitmix64's finalizer: Steele et al., 2014)."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Hashes = numbers ^ (numbers >> np.uint64(31))
    return mixed
