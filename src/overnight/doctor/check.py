"""The result of a check, its lines on the terminal, and its JSON."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from overnight.run_directory import finite_values
from overnight.terminal import duration, wrap

COLUMNS, INDENT = 80, "     "
NAME_WIDTH, MEASURED_WIDTH = 15, 26
MARKS = {True: "ok", False: "FAIL", None: "-"}


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """What a check measured, the bound on it, and the likely cause if it is exceeded."""

    name: str = ""
    passed: bool | None
    """None if the check was skipped; `cause` is then the reason."""
    measured: str = ""
    bound: str = ""
    """The bound that `measured` must satisfy."""
    cause: str = ""
    """The likely cause of a failure, and the remedy."""
    shown: tuple[str, ...] = ()
    """Lines that are shown to the user: a chart, samples of text."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """All measured numbers, by name."""
    seconds: float = 0.0


def skipped(reason: str) -> CheckResult:
    """The result of a skipped check."""
    return CheckResult(passed=None, cause=reason)


def run_check(name: str, check: Callable[[], CheckResult]) -> CheckResult:
    """The result of `check`, with its name and duration. A check that raises an error has failed.

    Raises PermissionError for a path that this user may not read or write: nothing is known about it.
    """
    started_at = time.perf_counter()
    try:
        result = check()
    except PermissionError:
        raise
    except Exception as error:  # any error would end a run as well
        message = " ".join(str(error).split()) or type(error).__name__
        result = CheckResult(
            passed=False,
            measured=type(error).__name__,
            bound="no error",
            cause=f"it raised an error, as a run would: {message}",
        )
    return dataclasses.replace(result, name=name, seconds=time.perf_counter() - started_at)


def describe_check(result: CheckResult) -> list[str]:
    """The lines of one check, at most 80 columns wide."""
    start = f"{MARKS[result.passed]:<{len(INDENT)}}{result.name:<{NAME_WIDTH}}"
    if result.passed is None:
        return wrap(result.cause, COLUMNS, start, " " * len(start))
    start += f"{result.measured:<{MEASURED_WIDTH}}"
    if len(start) + len(result.bound) > COLUMNS or len(result.measured) >= MEASURED_WIDTH:
        rest = " " * (len(INDENT) + NAME_WIDTH)
        lines = [start, *wrap(result.bound, COLUMNS, rest, rest)]
    else:
        lines = [start + result.bound]
    lines += [(INDENT + line)[:COLUMNS] for line in result.shown]
    if result.passed is False:
        lines += wrap(result.cause, COLUMNS, INDENT, INDENT)
    return [line.rstrip() for line in lines]


def summarize_checks(results: Collection[CheckResult], seconds: float) -> str:
    """The numbers of checks that passed, failed and were skipped, in one line."""
    states = {True: "passed", False: "FAILED", None: "skipped"}
    counts = Counter(result.passed for result in results)
    words = [f"{counts[state]} {word}" for state, word in states.items() if counts[state] or state]
    return f"{', '.join(words)} in {duration(seconds)}"


def checks_to_json(name: str, results: Collection[CheckResult], seconds: float) -> dict[str, Any]:
    """All results; figures that are not finite are null."""
    checks = [
        dataclasses.asdict(result)
        | {"cause": "" if result.passed else result.cause, "figures": finite_values(result.figures)}
        for result in results
    ]
    passed = all(result.passed is not False for result in results)
    return {"recipe": name, "passed": passed, "seconds": seconds, "checks": checks}
