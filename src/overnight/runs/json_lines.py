"""Reads JSON-lines files tolerantly: damaged lines are left out and reported, a torn last line is noted."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

METRICS_KEYS = ("step", "tokens", "loss")
EVALUATION_KEYS = ("step", "tokens", "loss")
EVENT_KEYS = ("step",)

TAIL_BYTES = 65_536


@dataclass(frozen=True, kw_only=True)
class JsonLines:
    """The readable lines of one file, in order, and what was wrong with the others."""

    values: tuple[dict[str, Any], ...] = ()

    problems: tuple[str, ...] = ()
    """One sentence for each damaged line: its number and its beginning."""

    is_torn: bool = False
    """True if the last line was cut short and left out."""


def read_lines(path: Path, numeric_keys: Sequence[str]) -> JsonLines:
    """Every readable line of `path`; empty if the file does not exist.

    A line is damaged if it is not a JSON object, if the value of one of `numeric_keys` is not a number, or if
    `step` or `tokens` is not a whole number. A loss of null (it was not finite) is read as NaN.
    """
    return _parse(path.name, path.read_bytes(), numeric_keys) if path.is_file() else JsonLines()


def read_ends(path: Path, numeric_keys: Sequence[str]) -> JsonLines:
    """As `read_lines`, but only the first and the last 64 KiB, so that a long file takes no longer."""
    if not path.is_file():
        return JsonLines()
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        if size <= 2 * TAIL_BYTES:
            return _parse(path.name, file.read(), numeric_keys)
        head = file.read(TAIL_BYTES)
        file.seek(size - TAIL_BYTES)
        tail = file.read()
    head = head[: head.rfind(b"\n") + 1]
    tail = tail[tail.find(b"\n") + 1 :]
    first = _parse(path.name, head, numeric_keys)
    last = _parse(path.name, tail, numeric_keys)
    problems = first.problems
    if last.problems or not last.values:  # only now is it worth counting lines for a line number
        number = _count_newlines(path, size - len(tail))
        last = _parse(path.name, tail, numeric_keys, first_number=number + 1)
        problems += last.problems
    if not last.values:
        problems += (f"the last {TAIL_BYTES // 1024} KiB of {path.name} hold no readable line",)
    return JsonLines(values=first.values + last.values, problems=problems, is_torn=last.is_torn)


def _parse(name: str, content: bytes, numeric_keys: Sequence[str], first_number: int = 1) -> JsonLines:
    lines = content.removesuffix(b"\n").split(b"\n") if content else []
    values, problems, is_torn = [], [], False
    for number, line in enumerate(lines, start=first_number):
        value = _parse_line(line, numeric_keys)
        if value is not None:
            values.append(value)
        elif number == first_number + len(lines) - 1:
            is_torn = True
        else:
            start = line[:40].decode(errors="replace")
            problems.append(f"{name} line {number:,} is damaged and left out; it begins {start!r}")
    return JsonLines(values=tuple(values), problems=tuple(problems), is_torn=is_torn)


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
    """True for a valid number; a loss may be NaN or infinite, which is a result and not damage."""
    if key in {"step", "tokens"}:
        return isinstance(value, int) and 0 <= value < 2**63
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)


def _count_newlines(path: Path, until: int) -> int:
    with path.open("rb") as file:
        return file.read(until).count(b"\n")
