from __future__ import annotations

import bz2
import gzip
import lzma
import random

import pytest

from overnight.evaluation.compressors import compressed_bits_per_byte

WORDS = [f"word{number}" for number in range(500)]


def text(seed: int, words: int) -> bytes:
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(words)).encode()


def test_these_are_the_compressors_own_figures() -> None:
    sample = text(1, 5000)
    found = compressed_bits_per_byte(sample, b"")
    assert found["gzip"] == pytest.approx(8 * len(gzip.compress(sample, 9)) / len(sample))
    assert found["bz2"] == pytest.approx(8 * len(bz2.compress(sample, 9)) / len(sample))
    own = 8 * len(lzma.compress(sample, preset=9 | lzma.PRESET_EXTREME)) / len(sample)
    assert found["xz"] == pytest.approx(own, rel=0.01)


def test_training_text_helps_only_where_it_is_alike() -> None:
    sample = text(1, 5000)
    same = compressed_bits_per_byte(sample, text(1, 5000))["xz given the training text"]
    other = compressed_bits_per_byte(sample, random.Random(0).randbytes(30_000))["xz given the training text"]
    alone = compressed_bits_per_byte(sample, b"")["xz"]
    assert same < 0.1 * alone
    assert other == pytest.approx(alone, rel=0.1)


def test_no_text_is_refused() -> None:
    with pytest.raises(ValueError, match="no text"):
        compressed_bits_per_byte(b"", b"something")
