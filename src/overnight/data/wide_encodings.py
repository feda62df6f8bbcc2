"""Recognizes text in UTF-16 and UTF-32, as some editors and Windows programs write it."""

from __future__ import annotations

import codecs

WIDE_MARKS = {  # those of UTF-32 first: one of them begins with one of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
WIDE_ENCODINGS = {"UTF-32LE": (4, 3), "UTF-32BE": (4, 0), "UTF-16LE": (2, 1), "UTF-16BE": (2, 0)}
"""Bytes of a unit, and which of them is 0 in most characters."""
WIDE_BYTES = range(8, 65_536)  # shorter texts show nothing; of longer ones the first bytes are checked


def find_wide_encoding(start: bytes) -> str | None:
    """The encoding of a text that begins with `start` if that is UTF-16 or UTF-32; else None.

    It is recognized by its byte order mark. Without one, it is recognized if most characters are of the first
    256, so that every second byte is 0: such bytes may be valid UTF-8, with NUL after each character.
    """
    for mark, name in WIDE_MARKS.items():
        if start.startswith(mark):
            return name
    start = start[: WIDE_BYTES.stop]
    if b"\0" not in start or len(start) < WIDE_BYTES.start:
        return None
    for name, (width, zero) in WIDE_ENCODINGS.items():
        units = len(start) // width
        zeros = [start[place : units * width : width].count(0) for place in range(width)]
        lowest = zeros[width - 1 - zero]
        if 2 * zeros[zero] > units and 10 * lowest < units and _can_be_decoded(start, name):
            return name
    return None


def _can_be_decoded(start: bytes, encoding: str) -> bool:
    try:
        codecs.getincrementaldecoder(encoding)().decode(start)  # the last character may be cut off
    except UnicodeDecodeError:
        return False
    return True
