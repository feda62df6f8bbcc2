"""Tables that a campaign writes into a document, each in its place, with the commit and the command."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

from measure import Report

HERE = Path(__file__).parent


def put(document: str, part: str, figures: str) -> str:
    """The document with these figures in their place. Raises ValueError if it has none for them."""
    begin, end = f"<!-- figures: {part} -->", "<!-- end of figures -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    found, count = pattern.subn(lambda _: f"{begin}\n\n{figures}\n\n{end}", document)
    if count != 1:
        raise ValueError(f"the document has no place for {part}: write {begin} and {end} where it is to be")
    return found


def find_commit() -> str:
    """Of the checkout, with a word if its code has been changed since."""
    git = ["git", "-C", str(HERE)]
    commit = subprocess.run(
        [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    changed = subprocess.run(
        [*git, "status", "--porcelain", ":/src", ":/benchmarks"], capture_output=True, text=True, check=False
    )
    return (commit.stdout.strip() or "unknown") + (" and changes" if changed.stdout else "")


def write_figures(path: Path, part: str, report: Report, words: Sequence[str]) -> None:
    """Put a report into the document without its title; `words` are the program and its options."""
    _, *paragraphs = report.as_markdown().split("\n\n")
    source = f"Commit {find_commit()}; `{shlex.join(['python', *words])}`."
    path.write_text(put(path.read_text(encoding="utf-8"), part, "\n\n".join([*paragraphs, source])))
