"""Compressors' bits per byte."""

from __future__ import annotations

import bz2
import gzip
import lzma
import random

import pytest

from overnight.evaluation.compressors import compressed_bits_per_byte

DRAW = random.Random(1)
TEXT = " ".join(f"word{DRAW.randrange(500)}" for _ in range(5000)).encode()


def test_bits_per_byte_match_compressors() -> None:
    found = compressed_bits_per_byte(TEXT, b"")
    assert found["gzip"] == pytest.approx(8 * len(gzip.compress(TEXT, 9)) / len(TEXT))
    assert found["bz2"] == pytest.approx(8 * len(bz2.compress(TEXT, 9)) / len(TEXT))
    own = 8 * len(lzma.compress(TEXT, preset=9 | lzma.PRESET_EXTREME)) / len(TEXT)
    assert found["xz"] == pytest.approx(own, rel=0.01)


def test_training_text_helps_only_if_similar() -> None:
    same = compressed_bits_per_byte(TEXT, TEXT)["xz given the training text"]
    other = compressed_bits_per_byte(TEXT, DRAW.randbytes(30_000))["xz given the training text"]
    alone = compressed_bits_per_byte(TEXT, b"")["xz"]
    assert same < 0.1 * alone
    assert other == pytest.approx(alone, rel=0.1)


def test_empty_text_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        compressed_bits_per_byte(b"", b"something")
