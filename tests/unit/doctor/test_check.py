from __future__ import annotations

import json
from dataclasses import replace

import pytest

from overnight.doctor.check import CheckResult, checks_to_json, describe_check, run_check, skipped

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


@pytest.mark.parametrize(
    "error, words",
    [(MemoryError(), "MemoryError"), (RuntimeError("the disk said no\nand no"), "the disk said no and no")],
)
def test_check_that_raises_has_failed(error, words):
    def fail():
        raise error

    result = run_check("loss", fail)
    assert (result.passed, result.cause) == (False, f"it raised an error, as a run would: {words}")


@pytest.mark.parametrize("error", [KeyboardInterrupt, PermissionError])
def test_interruption_and_unusable_path_are_no_failures(error):
    def interrupt():
        raise error

    with pytest.raises(error):
        run_check("loss", interrupt)


def test_lines_have_at_most_80_columns():
    lines = describe_check(FAILED)
    assert all(len(line) <= 80 for line in lines)
    assert " ".join(" ".join(lines).split()).endswith(" ".join(FAILED.cause.split()))
    assert PASSED.cause not in " ".join(describe_check(PASSED))
    assert SKIPPED.cause in " ".join(describe_check(SKIPPED))


def test_json_has_causes_of_failures_and_skips_only():
    found = json.loads(json.dumps(checks_to_json("mine", [PASSED, FAILED, SKIPPED], 3.0), allow_nan=False))
    assert found["passed"] is False
    assert [check["cause"] for check in found["checks"]] == ["", FAILED.cause, "none"]
    assert found["checks"][1]["figures"] == {"loss": None, "steps": 3}
    assert checks_to_json("mine", [PASSED, SKIPPED], 3.0)["passed"] is True
