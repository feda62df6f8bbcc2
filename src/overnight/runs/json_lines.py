"""Reads JSON-lines files tolerantly: damaged lines are left out and reported, a torn last line is noted."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

LOSS_KEYS = ("step", "tokens", "loss")
EVENT_KEYS = ("step",)

END_BYTES = 65_536


@dataclass(frozen=True, kw_only=True)
class JsonLines:
    """The readable lines of one file, in order, and what was wrong with the others."""

    values: tuple[dict[str, Any], ...] = ()

    problems: tuple[str, ...] = ()
    """One sentence for each damaged line: its number and its beginning."""

    is_torn: bool = False
    """True if the last line was truncated and left out."""


def read_lines(path: Path, numeric_keys: Sequence[str], *, only_ends: bool = False) -> JsonLines:
    """Every readable line of `path`; empty if the file does not exist.

    A line is damaged if it is not a JSON object, if the value of one of `numeric_keys` is not a number, or if
    `step` or `tokens` is not a whole number. A loss of null (it was not finite) is read as NaN.
    `only_ends`: of a long file only the first and the last 64 KiB are read.
    """
    values: list[dict[str, Any]] = []
    problems, is_torn = [], False
    for start, content in _read_parts(path, only_ends) if path.is_file() else ():
        lines = content.removesuffix(b"\n").split(b"\n") if content else []
        parsed = [_parse_line(line, numeric_keys) for line in lines]
        readable = [value for value in parsed if value is not None]
        values += readable
        is_torn = bool(parsed) and parsed[-1] is None
        if damaged := [index for index, value in enumerate(parsed[:-1]) if value is None]:
            first = path.read_bytes()[:start].count(b"\n") + 1  # counted only for a message
            problems += [
                f"{path.name} line {first + index:,} is damaged and left out; it begins "
                f"{lines[index][:40].decode(errors='replace')!r}"
                for index in damaged
            ]
        if start and not readable:
            problems.append(f"the last {END_BYTES // 1024} KiB of {path.name} hold no readable line")
    return JsonLines(values=tuple(values), problems=tuple(problems), is_torn=is_torn)


def _read_parts(path: Path, only_ends: bool) -> Iterator[tuple[int, bytes]]:
    """(position, whole lines) of the file, or of its two ends."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        if not only_ends or size <= 2 * END_BYTES:
            yield 0, file.read()
            return
        yield 0, file.read(END_BYTES).rpartition(b"\n")[0]
        file.seek(size - END_BYTES)
        tail = file.read().partition(b"\n")[2]
        yield size - len(tail), tail


def _parse_line(line: bytes, numeric_keys: Sequence[str]) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):  # not JSON, not UTF-8, or nested too deeply
        return None
    if not isinstance(value, dict):
        return None
    value |= {key: math.nan for key in numeric_keys if value.get(key, 0) is None}
    return value if all(_is_valid(key, value.get(key)) for key in numeric_keys) else None


def _is_valid(key: str, value: object) -> bool:
    """True for a valid number; a loss may be NaN or infinite, which is not damage."""
    if key in {"step", "tokens"}:
        return isinstance(value, int) and 0 <= value < 2**63
    return is_number(value)


def is_number(value: object) -> TypeGuard[float]:
    """True for a float, which may be NaN or infinite, and for an integer that fits into 64 bits."""
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)
