"""A check: what was measured, what it must keep to, and what is likely wrong if it does not."""

from __future__ import annotations

import math
import textwrap
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from overnight.terminal import duration
from overnight.training.state import TrainState
from overnight.training.step import TrainSetup


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """What a check found out."""

    passed: bool | None
    """None if there was nothing to check, or no way to; `cause` says why."""
    measured: str = ""
    bound: str = ""
    """What `measured` must be."""
    cause: str = ""
    """If it failed: what is likely wrong, and what to do."""
    shown: tuple[str, ...] = ()
    """Lines for a person to judge: a drawing, texts."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """What was measured, in full, by name."""


class Check(NamedTuple):
    """A finding, by the name of what was checked."""

    name: str
    finding: CheckResult
    seconds: float


class SetUp(NamedTuple):
    """A model about to be trained, and everything to train it with, as a run has them."""

    state: TrainState
    training: TrainSetup


class Build(Protocol):
    """Makes a set-up, always of the same weights and the same text."""

    def __call__(self, **compute: object) -> SetUp:
        """The set-up with these fields of its ComputeConfig changed."""
        ...


def skipped(why: str) -> CheckResult:
    """A finding that there was nothing to find."""
    return CheckResult(passed=None, cause=why)


def run_check(name: str, examine: Callable[[], CheckResult]) -> Check:
    """Do the check of that name. One that raises an error has failed, and says the error."""
    started_at = time.perf_counter()
    try:
        finding = examine()
    except Exception as error:  # whatever a night would have come to
        words = " ".join(str(error).split()) or type(error).__name__
        finding = CheckResult(
            passed=False,
            measured=type(error).__name__,
            bound="no error",
            cause=f"it came to an error, as a run would: {words}",
        )
    return Check(name, finding, time.perf_counter() - started_at)


# ---------------------------------------------------------------- what `overnight doctor` says


COLUMNS, INDENT = 80, "     "
NAME, MEASURED = 15, 26
MARKS = {True: "ok", False: "FAIL", None: "-"}


def describe_checks(check: Check) -> list[str]:
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


def summarize_checks(checks: Collection[Check], seconds: float) -> str:
    """How many passed, failed and were skipped, in one line."""
    counts = {state: sum(check.finding.passed is state for check in checks) for state in (True, False, None)}
    words = [f"{counts[True]} passed"]
    words += [f"{counts[False]} FAILED"] if counts[False] else []
    words += [f"{counts[None]} skipped"] if counts[None] else []
    return f"{', '.join(words)} in {duration(seconds)}"


def checks_to_json(name: str, checks: Collection[Check], seconds: float) -> dict[str, Any]:
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
