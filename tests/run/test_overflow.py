"""Steps that float16 makes overflow: written as JSON has it, and met by everything that reads a run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from overnight.model.model_config import ModelConfig
from overnight.recipe import Recipe
from overnight.report.compare import compare_runs
from overnight.report.page import write_report
from overnight.run import command as run_command
from overnight.run import log
from overnight.run import train as train_module
from overnight.run_directory import RunDirectory
from overnight.runs import command as runs_command
from overnight.training import ComputeConfig
from overnight.training.schedule import ScheduleConfig

Build = Callable[..., Recipe]


@pytest.fixture
def small(recipe: Build) -> Recipe:
    """Four steps in float16, and an evaluation before them and after."""
    return recipe(
        schedule=ScheduleConfig(total_steps=4),
        compute=ComputeConfig(device="cpu", precision="fp16", compile=False),
        trackers=("tensorboard",),
    )


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_skipped_steps_are_null_and_every_reader_copes(
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
    lines = [json.loads(line, parse_constant=refuse) for line in directory.metrics.read_text().splitlines()]
    assert [line["grad_norm"] is None for line in lines] == [False, True, False, True]
    assert [line["loss"] is None for line in lines] == [False, True, False, True]
    assert "4 steps, 12,288 tokens; last loss not finite" in capsys.readouterr().err

    page = write_report(directory.path).read_text()
    assert "2 steps skipped: float16 overflow" in page
    assert "the training loss was not finite at 2 steps, first at step 2" in page
    assert "side by side" in compare_runs([directory.path, directory.path])

    runs_command.run(runs_command.RunsConfig(json=True))
    (told,) = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert (told["state"], told["step"], told["loss"]) == ("finished", 4, None)
    assert told["validation_loss"] is not None

    (events,) = directory.path.rglob("events.out.tfevents.*")
    tracked = EventAccumulator(str(events.parent)).Reload()
    assert [event.step for event in tracked.Scalars("grad_norm")] == [1, 3]
    assert [event.step for event in tracked.Scalars("learning_rate")] == [1, 2, 3, 4]


def test_a_run_that_does_not_overflow_says_nothing_of_it(small: Recipe, tmp_path: Path) -> None:
    """The negative control of the test above."""
    directory = RunDirectory(tmp_path / "run")
    train_module.run(dataclasses.replace(small, trackers=()), directory)
    assert "null" not in directory.metrics.read_text()
    assert "float16 overflow" not in write_report(directory.path).read_text()


def test_both_shares_of_the_peak_are_logged_where_it_is_known(
    recipe: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "find_peak_flops", lambda device, precision: 1e9)
    directory = RunDirectory(tmp_path / "run")
    model = ModelConfig(n_layer=2, n_head=2, n_embd=16, context_length=32)
    compute = ComputeConfig(device="cpu", precision="fp32", compile=False, activation_checkpointing="block")
    decided = train_module.run(
        recipe(model=model, compute=compute, schedule=ScheduleConfig(total_steps=2)), directory
    ).model
    for line in directory.read_metrics():
        speed = line["tokens_per_second"] / 1e9
        assert line["mfu"] == pytest.approx(speed * decided.flops_per_token(), abs=1e-4)
        executed = decided.executed_flops_per_token("block")
        assert line["mfu_executed"] == pytest.approx(speed * executed, abs=1e-4)
