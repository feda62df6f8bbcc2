"""Steps that overflow in float16: written as valid JSON, and read by everything that reads a run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from overnight.model.model_config import ModelConfig
from overnight.recipe import Recipe
from overnight.report.compare import comparison_page
from overnight.report.page import write_report
from overnight.run import command as run_command
from overnight.run import log
from overnight.run.train import train_recipe
from overnight.run_directory import RunDirectory
from overnight.runs import RunsConfig
from overnight.runs import command as runs_command
from overnight.training import ComputeConfig
from overnight.training.schedule import ScheduleConfig

Build = Callable[..., Recipe]


@pytest.fixture
def small(recipe: Build) -> Recipe:
    """Four steps in float16, with an evaluation before and after."""
    return recipe(
        schedule=ScheduleConfig(total_steps=4),
        compute=ComputeConfig(device="cpu", precision="fp16", compile=False),
        trackers=("tensorboard",),
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_skipped_steps_are_null_and_every_reader_accepts_them(
    small: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    overflow_at: Callable[[set[int]], None],
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    overflow_at({1, 3})
    monkeypatch.chdir(tmp_path)
    run_command.run(small, None)
    directory = RunDirectory(Path("runs") / small.run_name)
    lines = [
        json.loads(line, parse_constant=pytest.fail) for line in directory.metrics.read_text().splitlines()
    ]
    assert [line["grad_norm"] is None for line in lines] == [False, True, False, True]
    assert [line["loss"] is None for line in lines] == [False, True, False, True]
    assert "not finite" in capsys.readouterr().err

    page = write_report(directory.path).read_text()
    assert "2 steps skipped: float16 overflow" in page
    assert "not finite at 2 steps, first at step 2" in page
    assert comparison_page([directory.path, directory.path])

    runs_command.run(RunsConfig(json=True))
    (status,) = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert (status["state"], status["step"], status["loss"]) == ("finished", 4, None)
    assert status["validation_loss"] is not None

    (events,) = directory.path.rglob("events.out.tfevents.*")
    tracked = EventAccumulator(str(events.parent)).Reload()
    for name, known in (("grad_norm", [1, 3]), ("loss", [1, 3]), ("learning_rate", [1, 2, 3, 4])):
        curve = {event.step: event.value for event in tracked.Scalars(name)}
        assert curve == {step: pytest.approx(lines[step - 1][name], rel=1e-6) for step in known}
    evaluations = {line["step"]: line["loss"] for line in directory.read_events("evaluations")}
    curve = {event.step: event.value for event in tracked.Scalars("validation/loss")}
    assert curve == pytest.approx(evaluations, rel=1e-6)


def test_run_without_overflow_reports_none(small: Recipe, tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    train_recipe(dataclasses.replace(small, trackers=()), directory)
    assert "null" not in directory.metrics.read_text()
    assert "float16 overflow" not in write_report(directory.path).read_text()


def test_both_definitions_of_mfu_are_logged_if_the_peak_is_known(
    recipe: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "find_peak_flops", lambda device, precision: 1e9)
    directory = RunDirectory(tmp_path / "run")
    model = ModelConfig(n_layer=2, n_head=2, n_embd=16, context_length=32)
    compute = ComputeConfig(device="cpu", precision="fp32", compile=False, activation_checkpointing="block")
    resolved = train_recipe(
        recipe(model=model, compute=compute, schedule=ScheduleConfig(total_steps=2)), directory
    )
    for line in directory.read_metrics():
        speed = line["tokens_per_second"] / 1e9
        assert line["mfu"] == pytest.approx(speed * resolved.model.flops_per_token(), abs=1e-4)
        executed = resolved.model.executed_flops_per_token("block")
        assert line["mfu_executed"] == pytest.approx(speed * executed, abs=1e-4)
