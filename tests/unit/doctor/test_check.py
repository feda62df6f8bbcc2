from __future__ import annotations

import json

import pytest

from overnight.doctor.check import (
    Check,
    CheckResult,
    checks_to_json,
    describe_checks,
    run_check,
    skipped,
    summarize_checks,
)
from overnight.doctor.model_checks import check_processes
from overnight.doctor.run_checks import check_disk, check_memory, check_time

SOUND = CheckResult(passed=True, measured="1", bound="at most 2", cause="never said")
BROKEN = CheckResult(
    passed=False,
    measured="a figure that takes very much room",
    bound="at most 2 of whatever it is that is counted here, and no more",
    cause="the likely cause, " * 12,
    shown=("a drawing that is much too wide " * 4,),
    figures={"loss": float("nan"), "steps": 3},
)


def test_a_check_is_timed_and_named() -> None:
    check = run_check("loss", lambda: SOUND)
    assert check.name == "loss"
    assert check.finding is SOUND
    assert check.seconds >= 0


@pytest.mark.parametrize(
    "error, words", [(ValueError("two\nlines"), "two lines"), (MemoryError(), "MemoryError")]
)
def test_a_check_that_raises_has_failed(error: Exception, words: str) -> None:
    def fail() -> CheckResult:
        raise error

    finding = run_check("loss", fail).finding
    assert finding.passed is False
    assert finding.measured == type(error).__name__
    assert finding.cause == f"it came to an error, as a run would: {words}"


def test_an_interruption_is_no_finding() -> None:
    def interrupt() -> CheckResult:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_check("loss", interrupt)


def test_a_line_says_mark_name_figure_and_bound() -> None:
    assert describe_checks(Check("loss", SOUND, 0.0)) == [
        "ok   loss           1                         at most 2"
    ]
    assert describe_checks(Check("loss", skipped("there is none"), 0.0)) == [
        "-    loss           there is none"
    ]


def test_no_line_is_wider_than_a_terminal() -> None:
    lines = describe_checks(Check("loss", BROKEN, 0.0))
    assert lines[0].startswith("FAIL loss           a figure that takes very much room")
    assert all(len(line) <= 80 for line in lines)
    assert " ".join(" ".join(lines).split()).endswith(" ".join(BROKEN.cause.split()))


def test_only_failures_and_skips_have_a_cause_for_programs() -> None:
    checks = [Check("a", SOUND, 1.0), Check("b", BROKEN, 2.0), Check("c", skipped("none"), 0.0)]
    told = json.loads(json.dumps(checks_to_json("mine", checks, 3.0), allow_nan=False))
    assert told["passed"] is False
    assert [check["cause"] for check in told["checks"]] == ["", BROKEN.cause, "none"]
    assert told["checks"][1]["figures"] == {"loss": None, "steps": 3}
    assert summarize_checks(checks, 3.0) == "1 passed, 1 FAILED, 1 skipped in 3.0 s"
    assert checks_to_json("mine", checks[::2], 3.0)["passed"] is True


def test_memory_and_disk_are_held_against_what_there_is() -> None:
    assert check_memory(10, 10, "cpu").passed
    assert check_memory(11, 10, "cpu").passed is False
    assert check_disk({"shards": 4, "checkpoints": 6}, 10).passed
    found = check_disk({"shards": 4_000_000_000, "checkpoints": 6, "metrics": 0}, 10)
    assert found.passed is False
    assert "(shards 4.00 GB, checkpoints 0.00 GB)" in found.cause


def test_a_time_that_is_none_is_found() -> None:
    assert check_time(3.0, "3 s", "measured").passed
    assert check_time(float("inf"), "?", "measured").passed is False


def test_one_process_and_two_are_compared_step_by_step() -> None:
    alone = [(5.0, 1.0), (4.0, 2.0)]
    assert check_processes(lambda: alone, lambda: [(5.0, 1.00001), (4.0, 2.0)]).passed
    found = check_processes(lambda: alone, lambda: [(5.0, 1.0), (4.01, 2.0)])
    assert found.passed is False
    assert found.figures["relative_difference"] == pytest.approx(0.0025)


def test_a_loss_that_is_no_number_is_not_the_same() -> None:
    nan = float("nan")
    assert check_processes(lambda: [(5.0, 1.0)], lambda: [(5.0, nan)]).passed is False
    assert check_processes(lambda: [(5.0, 1.0), (5.0, 1.0)], lambda: [(5.0, 1.0), (nan, 1.0)]).passed is False
