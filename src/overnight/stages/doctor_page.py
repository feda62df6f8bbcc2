"""What `overnight doctor` says: a line for each check, and what is behind those that failed."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from overnight.report.words import duration

if TYPE_CHECKING:
    from overnight.checks.check import Check

COLUMNS, INDENT = 80, "     "
NAME, MEASURED = 15, 26
MARKS = {True: "ok", False: "FAIL", None: "-"}


def describe(check: Check) -> list[str]:
    """The lines of one check, at most 80 columns wide."""
    finding = check.finding
    start = f"{MARKS[finding.passed]:<{len(INDENT)}}{check.name:<{NAME}}"
    if finding.passed is None:
        return _wrap(start + finding.cause, "", " " * len(start))
    start += f"{finding.measured:<{MEASURED}}"
    if len(start) + len(finding.bound) > COLUMNS or len(finding.measured) >= MEASURED:
        rest = " " * (len(INDENT) + NAME)
        lines = [start.rstrip(), *_wrap(finding.bound, rest, rest)]
    else:
        lines = [start + finding.bound]
    lines += [(INDENT + line)[:COLUMNS] for line in finding.shown]
    if finding.passed is False:
        lines += _wrap(finding.cause, INDENT, INDENT)
    return [line.rstrip() for line in lines]


def _wrap(text: str, first: str, others: str) -> list[str]:
    """Lines that end between words, so that a command can be copied."""
    return textwrap.wrap(
        text,
        COLUMNS,
        initial_indent=first,
        subsequent_indent=others,
        break_on_hyphens=False,
        break_long_words=False,
    )


def summarize(checks: Collection[Check], seconds: float) -> str:
    """How many passed, failed and were skipped, in one line."""
    counts = {state: sum(check.finding.passed is state for check in checks) for state in (True, False, None)}
    words = [f"{counts[True]} passed"]
    words += [f"{counts[False]} FAILED"] if counts[False] else []
    words += [f"{counts[None]} skipped"] if counts[None] else []
    return f"{', '.join(words)} in {duration(seconds)}"


def as_json(name: str, checks: Collection[Check], seconds: float) -> dict[str, Any]:
    """Everything, for a program; figures that are not finite are null."""
    return {
        "recipe": name,
        "passed": all(check.finding.passed is not False for check in checks),
        "seconds": seconds,
        "checks": [
            {
                "name": check.name,
                "passed": check.finding.passed,
                "measured": check.finding.measured,
                "bound": check.finding.bound,
                "cause": check.finding.cause if check.finding.passed is not True else "",
                "shown": list(check.finding.shown),
                "figures": {
                    key: value if math.isfinite(value) else None
                    for key, value in check.finding.figures.items()
                },
                "seconds": check.seconds,
            }
            for check in checks
        ],
    }
