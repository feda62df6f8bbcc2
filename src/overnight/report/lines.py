"""JSON-lines files read tolerantly: a damaged line is left out and named, the others are kept.

A last line cut short is no damage: it is what a process leaves behind that was killed while writing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

METRICS_KEYS = ("step", "tokens", "loss")
EVALUATION_KEYS = ("step", "tokens", "loss")
SAMPLE_KEYS = ("step",)

TAIL_BYTES = 65_536


@dataclass(frozen=True, kw_only=True)
class Lines:
    """The readable lines of one file, in order, and what was wrong with the others."""

    values: tuple[dict[str, Any], ...] = ()

    problems: tuple[str, ...] = ()
    """One sentence for each damaged line: which, and how it begins."""

    is_torn: bool = False
    """True if the last line was cut short, and left out."""


def read_lines(path: Path, numeric_keys: Sequence[str]) -> Lines:
    """Every readable line of `path`; nothing at all if there is no such file.

    A line counts as damaged if it is no JSON object, or one of `numeric_keys` is not a number in it, or
    its `step` or `tokens` no whole one. A loss of null, which was not finite, is read as NaN.
    """
    return _parse(path.name, path.read_bytes(), numeric_keys) if path.is_file() else Lines()


def read_ends(path: Path, numeric_keys: Sequence[str]) -> Lines:
    """The readable lines among the first and the last 64 KiB, however long the file is.

    What lies between is not looked at. Line numbers in the sentences count from the file's first line.
    """
    if not path.is_file():
        return Lines()
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
    if last.problems or not last.values:
        number = _count_newlines(path, size - len(tail))
        last = _parse(path.name, tail, numeric_keys, first_number=number + 1)
    nothing = (
        () if last.values else (f"the last {TAIL_BYTES // 1024} KiB of {path.name} hold no readable line",)
    )
    return Lines(
        values=first.values + last.values,
        problems=first.problems + last.problems + nothing,
        is_torn=last.is_torn,
    )


def _parse(name: str, content: bytes, numeric_keys: Sequence[str], first_number: int = 1) -> Lines:
    lines = content.removesuffix(b"\n").split(b"\n") if content else []
    values, problems, is_torn = [], [], False
    for number, line in enumerate(lines, start=first_number):
        value = _value(line, numeric_keys)
        if value is not None:
            values.append(value)
        elif number == first_number + len(lines) - 1:
            is_torn = True
        else:
            start = line[:40].decode(errors="replace")
            problems.append(f"{name} line {number:,} is damaged and left out; it begins {start!r}")
    return Lines(values=tuple(values), problems=tuple(problems), is_torn=is_torn)


def _value(line: bytes, numeric_keys: Sequence[str]) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):  # not JSON, not even UTF-8, or brackets without end
        return None
    if not isinstance(value, dict):
        return None
    value |= {key: math.nan for key in numeric_keys if value.get(key, 0) is None}
    return value if all(_is_number(key, value.get(key)) for key in numeric_keys) else None


def _is_number(key: str, value: object) -> bool:
    """True if `value` can stand under `key`; a loss may be NaN or infinite, which is news, not damage."""
    if key in {"step", "tokens"}:
        return isinstance(value, int) and 0 <= value < 2**63
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)


def _count_newlines(path: Path, until: int) -> int:
    with path.open("rb") as file:
        return file.read(until).count(b"\n")
