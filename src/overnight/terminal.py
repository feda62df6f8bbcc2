"""What a person sees while a command works: plain lines and progress bars, on stderr.

Standard output stays free for what a program would read (`--json`, generated text).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, Task


def say(text: str = "") -> None:
    """Print one plain line to stderr."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def hushed(yes: bool) -> Iterator[None]:
    """Within, if `yes`, nothing is said: of several processes one speaks for all. Errors still are, later."""
    if not yes:
        yield
        return
    with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere):
        yield


@contextmanager
def progress(title: str, total: float | None, unit: str = "") -> Iterator[Callable[..., None]]:
    """Show how far a stage has come; yields `advance(amount=1, note="")`.

    On a terminal this is a live bar with the rate and the time left. Elsewhere (a log file, a
    pipe) it is a single line when the stage ends. `total=None` means the length is unknown. Without
    a `unit` the amounts only move the bar, and the note tells what was done.
    """
    started_at = time.perf_counter()
    done, told = 0.0, "nothing"
    if not sys.stderr.isatty():

        def count(amount: float = 1, note: str = "") -> None:
            nonlocal done, told
            done, told = done + amount, note

        yield count
        what = f"{done:,.0f} {unit}" if unit else told
        say(f"{title}: {what} in {time.perf_counter() - started_at:.1f} s".replace("  ", " "))
        return

    with _live_bar(unit) as bar:
        task = bar.add_task(title, total=total, note="")

        def advance(amount: float = 1, note: str = "") -> None:
            bar.update(task, advance=amount, note=note)

        yield advance


def _live_bar(unit: str) -> Progress:
    """A bar of rich's, which is imported only where a bar is drawn."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        """Units finished, and how many a second."""

        def render(self, task: Task) -> Text:
            rate = f" {task.speed:,.0f}/s" if task.speed else ""
            return Text(f"{task.completed:,.0f} {unit}{rate}" if unit else "")

    return Progress(
        TextColumn("{task.description:<14}"),
        BarColumn(bar_width=20),
        Rate(),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
    )
