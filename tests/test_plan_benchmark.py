"""What could make the benchmark of a plan lie: other settings for the run, a ratio of medians, leftovers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from overnight.run_directory import RunDirectory


@pytest.fixture
def plan(benchmarks: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return benchmarks["plan"]


def figures(value: float) -> dict[str, float]:
    names = (
        "tokens_per_second",
        "step_seconds",
        "peak_bytes",
        "estimated_bytes",
        "checkpoint_bytes",
        "seconds",
    )
    return dict.fromkeys(names, value)


def test_a_ratio_is_the_median_of_the_rounds_ratios(plan: Any) -> None:
    foretold, measured = [2.0, 20.0, 20.0], [1.0, 10.0, 2.0]  # the medians' ratio would be 10
    rows = plan.table_rows(
        {
            "foretold": [figures(value) for value in foretold],
            "measured": [figures(value) for value in measured],
        }
    )
    assert [row[0] for row in rows] == [title for title, _, _ in plan.FIGURES.values()]
    assert {row[-1] for row in rows} == {"2.00"}


def test_the_plan_and_the_run_are_asked_for_the_same(plan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def answer(words: list[str]) -> Any:
        asked.append(words)
        if words[0] == "plan":
            peaks = {"peak_memory_bytes": 9, "evaluation_peak_memory_bytes": 11, "needed_bytes": 10}
            told = figures(3.0) | peaks | {"fits": True}
            return plan.Finished(json.dumps(told), 1.0, 5)
        directory = RunDirectory(Path("runs", words[-1]))
        for step, rate in enumerate([1.0, 1.0, 4.0, 6.0, 5.0], start=1):
            directory.append_metrics({"step": step, "tokens_per_second": rate, "milliseconds": 1000 / rate})
        (directory.checkpoints / "step-00000005").mkdir(parents=True)
        (directory.checkpoints / "step-00000005" / "model.safetensors").write_bytes(bytes(7))
        return plan.Finished("", 2.0, 8)

    monkeypatch.setattr(plan, "call", answer)
    report = plan.compare(plan.read_options(["quickstart", "--steps", "5", "--n_layer=2"]))
    (foretold,), (measured,) = report.measured["foretold"], report.measured["measured"]
    assert foretold["peak_bytes"] == 9
    assert measured["tokens_per_second"] == 5.0, "the first two steps warm up"
    assert (measured["peak_bytes"], measured["checkpoint_bytes"]) == (8, 7)
    (first, *planned, _, _), (second, *trained, _, _) = asked
    assert (first, second) == ("plan", "train")
    assert planned == trained
    assert {"quickstart", "--n_layer=2", "--total-steps=5"} <= set(planned)
    assert list(Path("runs").iterdir()) == []


def test_what_the_command_refuses_is_told(plan: Any) -> None:
    with pytest.raises(ValueError, match="overnight plan failed: overnight: there is no recipe quikstart"):
        plan.compare(plan.read_options(["quikstart"]))
    with pytest.raises(ValueError, match="--steps 2 is too few"):
        plan.compare(plan.read_options(["quickstart", "--steps", "2"]))
