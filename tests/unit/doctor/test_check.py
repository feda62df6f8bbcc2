from __future__ import annotations

import json
from dataclasses import replace

import pytest

from overnight.doctor.check import (
    CheckResult,
    checks_to_json,
    describe_check,
    run_check,
    skipped,
    summarize_checks,
)
from overnight.doctor.model_checks import compare_steps

PASSED = CheckResult(name="a", passed=True, measured="1", bound="at most 2", cause="not shown")
FAILED = CheckResult(
    name="b",
    passed=False,
    measured="a figure that takes very much room",
    bound="at most 2 of whatever it is that is counted here, and no more",
    cause="the likely cause, " * 12,
    shown=("a drawing that is much too wide " * 4,),
    figures={"loss": float("nan"), "steps": 3},
)
SKIPPED = replace(skipped("none"), name="c")


def test_check_gets_its_name_and_duration() -> None:
    result = run_check("loss", lambda: PASSED)
    assert result == replace(PASSED, name="loss", seconds=result.seconds)
    assert result.seconds >= 0


@pytest.mark.parametrize(
    "error, words", [(ValueError("two\nlines"), "two lines"), (MemoryError(), "MemoryError")]
)
def test_check_that_raises_has_failed(error: Exception, words: str) -> None:
    def fail() -> CheckResult:
        raise error

    result = run_check("loss", fail)
    assert result.passed is False
    assert result.measured == type(error).__name__
    assert result.cause.endswith(words)


def test_interruption_is_not_a_failure() -> None:
    def interrupt() -> CheckResult:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_check("loss", interrupt)


def test_lines_have_at_most_80_columns() -> None:
    lines = describe_check(FAILED)
    assert lines[0].startswith("FAIL b ")
    assert all(len(line) <= 80 for line in lines)
    assert " ".join(" ".join(lines).split()).endswith(" ".join(FAILED.cause.split()))
    assert PASSED.cause not in " ".join(describe_check(PASSED))
    assert describe_check(SKIPPED)[0].split() == ["-", "c", "none"]


def test_json_has_causes_of_failures_and_skips_only() -> None:
    results = [PASSED, FAILED, SKIPPED]
    found = json.loads(json.dumps(checks_to_json("mine", results, 3.0), allow_nan=False))
    assert found["passed"] is False
    assert [check["cause"] for check in found["checks"]] == ["", FAILED.cause, "none"]
    assert found["checks"][1]["figures"] == {"loss": None, "steps": 3}
    keys = {"name", "passed", "measured", "bound", "cause", "shown", "figures", "seconds"}
    assert found["checks"][0].keys() == keys
    assert summarize_checks(results, 3.0) == "1 passed, 1 FAILED, 1 skipped in 3.0 s"
    assert checks_to_json("mine", results[::2], 3.0)["passed"] is True


@pytest.mark.parametrize(
    "together, passed",
    [
        ([(5.0, 1.00001), (4.0, 2.0)], True),
        ([(5.0, 1.0), (4.01, 2.0)], False),
        ([(5.0, 1.0), (4.0, float("nan"))], False),
        ([(float("nan"), 1.0), (4.0, 2.0)], False),
    ],
)
def test_steps_of_two_processes_are_compared(together: list[tuple[float, float]], passed: bool) -> None:
    assert compare_steps([(5.0, 1.0), (4.0, 2.0)], together).passed is passed
