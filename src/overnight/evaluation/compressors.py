"""Bits per byte of general-purpose compressors, for comparison with a model's.

gzip, bz2 and xz compress the validation text alone. For a fair comparison xz also compresses the training
text first, and the difference in size counts. Needs no torch.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
from typing import Any

XZ_WINDOW_BYTES = 1 << 30  # the whole training text stays in the window


def compressed_bits_per_byte(text: bytes, training_text: bytes) -> dict[str, float]:
    """Bits per byte of `text` with gzip, bz2 and xz at their best, and with xz after `training_text`."""
    if not text:
        raise ValueError("the validation split is empty: it has nothing to compress")
    sizes = {
        "gzip": len(gzip.compress(text, 9, mtime=0)),
        "bz2": len(bz2.compress(text, 9)),
        "xz": _xz_bytes(text),
        "xz given the training text": _xz_bytes(training_text + text) - _xz_bytes(training_text),
    }
    return {name: 8 * size / len(text) for name, size in sizes.items()}


def _xz_bytes(text: bytes) -> int:
    window = min(XZ_WINDOW_BYTES, max(1 << 20, 1 << len(text).bit_length()))
    filters: list[dict[str, Any]] = [
        {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": window}
    ]
    return len(lzma.compress(text, lzma.FORMAT_XZ, filters=filters))
