"""A run that is asked to sends its metrics to TensorBoard as well, with the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from overnight.recipe import Recipe
from overnight.run.train import train
from overnight.run_directory import RunDirectory
from overnight.training.schedule import ScheduleConfig


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_holds_the_metrics_lines(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    directory = RunDirectory(tmp_path / "run")
    train(recipe(trackers=("tensorboard",), schedule=ScheduleConfig(total_steps=5)), directory)
    (events,) = directory.path.rglob("events.out.tfevents.*")
    read = EventAccumulator(str(events.parent))
    read.Reload()
    losses = [(event.step, event.value) for event in read.Scalars("loss")]
    assert losses == [
        (line["step"], pytest.approx(line["loss"], rel=1e-6)) for line in directory.read_metrics()
    ]
    evaluations = {line["step"]: line["loss"] for line in directory.read_events("evaluations")}
    tracked = {event.step: event.value for event in read.Scalars("validation/loss")}
    assert tracked == pytest.approx(evaluations, rel=1e-6)
