"""Lines, progress bars and number formats for the terminal. Everything is printed to stderr.

Standard output is for output that programs read (`--json`, generated text).
"""

from __future__ import annotations

import math
import os
import re
import shlex
import sys
import textwrap
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path
from typing import Any, TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn
from rich.table import Column
from rich.text import Text

ROOM_FOR_A_BAR = 100  # columns
SECONDS_OF_SPEED = 3600.0  # the time left is estimated from these; a step alone may take minutes

_unprinted: deque[str] = deque(maxlen=10_000)
"""Lines that could not be printed, until `write_unprinted` writes them."""


def echo(text: str = "") -> None:
    """Print one plain line to stderr. If that fails (a closed terminal, a full disk) the line is kept."""
    try:
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError, RuntimeError):  # failed, closed, None, or within a signal
        _unprinted.append(text)


def write_unprinted(path: Path) -> None:
    """Append the lines that could not be printed to a file, if there are any and it can be written."""
    if not _unprinted:
        return
    with suppress(OSError), path.open("a", encoding="utf-8") as file:
        file.write("".join(f"{line}\n" for line in _unprinted))
        _unprinted.clear()


@contextmanager
def quiet(yes: bool) -> Iterator[None]:
    """Context manager: if `yes`, nothing is printed to stderr. Only the main process prints."""
    if not yes:
        yield
        return
    with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere):
        yield


@contextmanager
def progress(title: str, total: float | None, unit: str = "") -> Iterator[Callable[..., None]]:
    """A progress bar; yields `advance(amount=1, note="")`.

    On a terminal it is live, with the rate and the estimated time; elsewhere (a log file, a pipe) a single
    line at the end. `total=None`: the length is unknown. Without a `unit` the note describes the progress.
    """
    started_at = time.perf_counter()
    done, last_note = 0.0, ""
    if not _is_terminal():

        def count(amount: float = 1, note: str = "") -> None:
            nonlocal done, last_note
            done, last_note = done + amount, note

        yield count
        what = f"{_amount(done)} {unit}" if unit else last_note
        if unit or last_note:
            echo(f"{title}: {what} in {time.perf_counter() - started_at:.1f} s".replace("  ", " "))
        return

    with _live_bar(unit) as bar:
        task = bar.add_task(title, total=total, note="")

        def advance(amount: float = 1, note: str = "") -> None:
            bar.update(task, advance=amount, note=note)

        yield advance


def _amount(number: float) -> str:
    """A count, or a measure of less than ten with a decimal: 0.3 MB is not nothing."""
    if number >= 10 or number == round(number):
        return f"{number:,.0f}"
    return f"{number:.1f}" if number >= 0.1 else f"{number:.1g}"


def _is_terminal() -> bool:
    try:
        return sys.stderr.isatty()
    except (ValueError, AttributeError):  # closed
        return False


class _TolerantStream:
    """A text stream that ignores write errors, so that a closed terminal does not stop a run."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write `text`, or drop it if that fails."""
        with suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, if possible."""
        with suppress(OSError, ValueError):
            self._stream.flush()


def _live_bar(unit: str) -> Progress:
    class Rate(ProgressColumn):
        """Units finished, and units per second."""

        def render(self, task: Task) -> Text:
            rate = f" {_amount(task.speed)}/s" if task.speed else ""
            return Text(f"{_amount(task.completed)} {unit}{rate}")

    class Time(ProgressColumn):
        """The time left; at the end the time spent."""

        def render(self, task: Task) -> Text:
            if task.finished:
                return Text(f"in {duration(task.finished_time or 0)}")
            if (left := task.time_remaining) is not None:
                return Text(f"{duration(left)} left")
            return Text("" if task.total is None else "time left unknown")

    class Note(ProgressColumn):
        """The note in one line. It comes last, and gives way first in a narrow terminal."""

        def render(self, task: Task) -> Text:
            return Text(task.fields["note"], no_wrap=True, overflow="ellipsis")

    console = Console(file=cast(TextIO, _TolerantStream(sys.stderr)))
    in_one_line = Column(no_wrap=True)

    return Progress(
        TextColumn("{task.description}", table_column=in_one_line),
        BarColumn(bar_width=12 if console.width >= ROOM_FOR_A_BAR else 4),
        TaskProgressColumn(),
        *([Rate(table_column=in_one_line)] if unit else []),
        Time(table_column=in_one_line),
        Note(),
        console=console,
        speed_estimate_period=SECONDS_OF_SPEED,
    )


# ---------------------------------------------------------------- lines, and commands to be pasted

NO_BREAK = "\ue000"  # stands for a space at which no line may be broken


def wrap(text: str, columns: int, first: str = "", rest: str = "") -> list[str]:
    """The text in lines. No word is broken, and no command in backticks, so that it can be copied."""
    kept = re.sub("`[^`]*`", lambda command: command[0].replace(" ", NO_BREAK), text)
    lines = textwrap.wrap(
        kept,
        columns,
        initial_indent=first,
        subsequent_indent=rest,
        break_on_hyphens=False,
        break_long_words=False,
    )
    return [line.replace(NO_BREAK, " ") for line in lines]


def quote(word: str) -> str:
    """`word` quoted for bash, always on one line."""
    return shlex.quote(word) if word.isprintable() else f"$'{''.join(map(_escape, word))}'"


def _escape(letter: str) -> str:
    if letter in "\\'":
        return f"\\{letter}"
    if letter.isprintable():
        return letter
    return f"\\x{ord(letter):02x}" if letter.isascii() else f"\\U{ord(letter):08x}"


def join_words(words: Iterable[str]) -> str:
    """The words as a command line."""
    return " ".join(map(quote, words))


def shell_command(*words: object) -> str:
    """`overnight` with these words, for a shell. A path that begins with - or ~ is written ./-x."""
    texts = [str(word) for word in words]
    is_option = [isinstance(word, str) and word.startswith("--") for word in words]
    plain = [
        f"./{text}" if text.startswith(("-", "~")) and not option else text
        for text, option in zip(texts, is_option, strict=True)
    ]
    return join_words(["overnight", *plain])


# ---------------------------------------------------------------- number formats

UNITS_OF_TIME = (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1))


def short(number: float) -> str:
    """Three digits and a unit: 1,234 stays; 12,345 is 12.3k; 262,144,000 is 262M."""
    if not math.isfinite(number):
        return "not finite"
    if abs(number) < 9_999.5:
        return f"{number:,.0f}"
    for power, unit in ((3, "k"), (6, "M"), (9, "B"), (12, "T")):
        value = number / 10**power
        if abs(value) < 999.5 or unit == "T":
            digits = max(0, 2 - math.floor(math.log10(abs(float(f"{value:.3g}")))))
            return f"{value:,.{digits}f}".rstrip("0").rstrip(".") + unit if digits else f"{value:,.0f}{unit}"
    raise AssertionError(number)


def significant(number: float, digits: int = 4) -> str:
    """`digits` significant digits without an exponent while that stays readable: 26.61, 0.9812, 31,415."""
    if not math.isfinite(number):
        return "not finite"
    if number and not 1e-4 <= abs(number) < 1e9:
        return f"{number:.{digits - 1}e}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(number)))) if number else 0
    return f"{number:,.{decimals}f}"


def scientific(number: float) -> str:
    """A learning rate in its shortest form: 6e-4, 2.5e-4, 0."""
    if number == 0 or not math.isfinite(number):
        return "0" if number == 0 else "not finite"
    mantissa, exponent = f"{number:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def byte_size(count: float) -> str:
    """A number of bytes with three digits: 1.49 GB, 14.9 MB, 149 kB, 14 bytes."""
    for power, unit in ((9, "GB"), (6, "MB"), (3, "kB")):
        if count >= 0.9995 * 10**power:
            value = count / 10**power
            return f"{value:,.{0 if value >= 99.95 else 1 if value >= 9.995 else 2}f} {unit}"
    return f"{count:,.0f} bytes"


def duration(seconds: float) -> str:
    """The two largest units: 0.4 s, 42 s, 12 min 5 s, 3 h 12 min, 2 d 4 h."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    rest = round(seconds)
    parts: list[tuple[int, str]] = []
    for unit, size in UNITS_OF_TIME:
        amount, rest = divmod(rest, size)
        if amount or parts:
            parts.append((amount, unit))
    return " ".join(f"{amount} {unit}" for amount, unit in parts[:2] if amount)


def ago(seconds: float) -> str:
    """The time since an event, in its largest unit: "just now", "12 min ago", "3 d ago"."""
    if seconds < 60:
        return "just now"
    unit, size = next((unit, size) for unit, size in UNITS_OF_TIME if seconds >= size)
    return f"{int(seconds // size)} {unit} ago"
