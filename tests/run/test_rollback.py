"""Poisoned rows: the run goes back, leaves them out, goes on, and decides the same when it is resumed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from overnight.config import from_toml
from overnight.data.loader import Batch
from overnight.recipe import CheckpointsConfig, Recipe
from overnight.run import rollback, setup, train
from overnight.run_directory import RunDirectory
from overnight.runs.status import describe_run
from overnight.training.batch import BatchConfig
from overnight.training.checkpoint.format import list_checkpoints
from overnight.training.guard import AT_LEAST, Guard, GuardConfig, SkippedRows
from overnight.training.schedule import ScheduleConfig

STEPS, ROWS, LIMIT = 60, 8, 3
CLOCK = {"milliseconds", "tokens_per_second", "mfu"}


@pytest.fixture
def asked(recipe: Callable[..., Recipe]) -> Recipe:
    """A run of many small steps, with dropout."""
    return recipe(
        schedule=ScheduleConfig(total_steps=STEPS, warmup_steps=3),
        batch=BatchConfig(tokens_per_step=ROWS * 32, micro_batch_size=4),
        checkpoints=CheckpointsConfig(checkpoint_every_steps=4),
        guard=GuardConfig(rollback_after_steps=LIMIT),
    )


class Poison:
    """Patches what training is built of: some rows' loss is multiplied; counts the batches of such rows."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch, self._build = monkeypatch, setup.build_training
        self.times_read = 0

    def put(self, rows: range, factor: float) -> None:
        """From now on."""

        def build(job: Any) -> Any:
            training, is_bad = self._build(job), False

            def batches(first: int, count: int) -> Batch:
                nonlocal is_bad
                is_bad = any(row in rows for row in range(first, first + count))
                self.times_read += is_bad
                return training.batches(first, count)

            def loss(ids: Tensor, targets: Tensor) -> Tensor:
                nats = training.loss(ids, targets)
                return nats * factor if is_bad else nats

            return dataclasses.replace(training, batches=batches, loss=loss)

        self._patch.setattr(train, "build_training", build)

    def leave_out(self, rows: range) -> None:
        """From now on such rows are never read at all: the independent twin of a detour."""

        def build(job: Any) -> Any:
            training = self._build(job)

            def batches(first: int, count: int) -> Batch:
                return training.batches(first + len(rows) if first >= rows.start else first, count)

            return dataclasses.replace(training, batches=batches)

        self._patch.setattr(train, "build_training", build)

    def max_time(self, steps: int | None) -> None:
        """The next run sees a signal after so many steps."""

        @contextlib.contextmanager
        def signalled() -> Iterator[Callable[[], bool]]:
            asked = iter(range(10**6))
            yield lambda: steps is not None and next(asked) >= steps

        self._patch.setattr(train, "stop_on_signal", signalled)


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Poison:
    """Nothing is poisoned yet."""
    return Poison(monkeypatch)


def rows_of(first_step: int, steps: int) -> range:
    """The rows of steps, counted from 0."""
    return range(first_step * ROWS, (first_step + steps) * ROWS)


def weights_of(directory: RunDirectory) -> tuple[bytes, bytes]:
    """Of the last checkpoint, with the moments."""
    newest = list_checkpoints(directory.checkpoints)[-1]
    first, second = ((newest / f"{kind}.safetensors").read_bytes() for kind in ("model", "optimizer"))
    return first, second


def lines_of(directory: RunDirectory) -> list[dict[str, Any]]:
    """Every metrics line without its clock."""
    return [
        {key: value for key, value in line.items() if key not in CLOCK} for line in directory.read_metrics()
    ]


CHOSEN = [(5, math.nan), (45, 3.0)]
DRAWN = [
    pytest.param(random.Random(number).randrange(low, STEPS - LIMIT), factor, marks=pytest.mark.slow)
    for number in range(9)
    for low, factor in ((4, math.nan), (AT_LEAST + 1, 4.0 + number))
]


@pytest.mark.parametrize("first, factor", [*CHOSEN, *DRAWN])
def test_the_run_goes_back_and_is_the_run_that_never_read_those_rows(
    asked: Recipe, poison: Poison, tmp_path: Path, first: int, factor: float
) -> None:
    rows = rows_of(first, LIMIT)
    poison.put(rows, factor)
    run, twin = RunDirectory(tmp_path / "run"), RunDirectory(tmp_path / "twin")
    train.run(asked, run)
    assert poison.times_read == 2 * LIMIT, "once: both micro-batches of each step"
    poison.leave_out(rows)
    train.run(asked, twin)
    assert weights_of(run) == weights_of(twin)
    assert lines_of(run) == lines_of(twin)
    assert [line["step"] for line in run.read_metrics()] == list(range(1, STEPS + 1))
    assert run.read_events("evaluations") == twin.read_events("evaluations")
    back_to = first - first % 4
    assert run.read_events("rollbacks") == [
        {"step": back_to + 1, "first_bad_step": first + 1, "last_bad_step": first + LIMIT, "rows": len(rows)}
    ]


def test_it_goes_back_past_a_damaged_checkpoint_and_makes_it_again(
    asked: Recipe, poison: Poison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, twin, rows = RunDirectory(tmp_path / "run"), RunDirectory(tmp_path / "twin"), rows_of(9, LIMIT)
    real = rollback.roll_back

    def damage_and_roll_back(*given: Any) -> None:
        newest = list_checkpoints(run.checkpoints)[-1]
        assert newest.name == "step-00000008"
        (newest / "model.safetensors").write_bytes(b"")
        real(*given)

    monkeypatch.setattr(rollback, "roll_back", damage_and_roll_back)
    poison.put(rows, math.nan)
    train.run(asked, run)
    poison.leave_out(rows)
    train.run(asked, twin)
    assert weights_of(run) == weights_of(twin)
    assert lines_of(run) == lines_of(twin)


@pytest.mark.parametrize("stop", [7, 9])
def test_a_run_that_is_stopped_around_the_trouble_decides_the_same(
    asked: Recipe, poison: Poison, tmp_path: Path, stop: int
) -> None:
    poison.put(rows_of(6, LIMIT), math.nan)
    whole, stopped = RunDirectory(tmp_path / "full"), RunDirectory(tmp_path / "stopped")
    train.run(asked, whole)
    poison.max_time(stop)
    with pytest.raises(KeyboardInterrupt):
        train.run(asked, stopped)
    poison.max_time(None)
    complete = from_toml(Recipe, stopped.recipe.read_text(), "recipe.toml")
    train.run(complete, stopped, resume=True)
    assert weights_of(stopped) == weights_of(whole)
    assert lines_of(stopped) == lines_of(whole)
    assert stopped.read_events("rollbacks") == whole.read_events("rollbacks")


def test_a_few_bad_steps_are_left_out_without_going_back(
    asked: Recipe, poison: Poison, tmp_path: Path
) -> None:
    poison.put(rows_of(10, LIMIT - 1), math.nan)
    run = RunDirectory(tmp_path / "run")
    train.run(asked, run)
    lines = run.read_metrics()
    assert [line["step"] for line in lines if line.get("skipped")] == [11, 12]
    assert [line["step"] for line in lines if line["loss"] is None] == [11, 12]
    assert run.read_events("rollbacks") == []
    about = json.loads((list_checkpoints(run.checkpoints)[-1] / "state.json").read_text())
    assert (about["step"], about["updates"]) == (STEPS, STEPS - 2)


def test_several_troubles_are_several_detours(asked: Recipe, poison: Poison, tmp_path: Path) -> None:
    poison.put(range(rows_of(10, 1).start, rows_of(10, 2 * LIMIT).stop), math.nan)
    run = RunDirectory(tmp_path / "run")
    train.run(asked, run)
    assert [(event["first_bad_step"], event["rows"]) for event in run.read_events("rollbacks")] == [
        (11, LIMIT * ROWS),
        (11, LIMIT * ROWS),
    ]
    about = json.loads((list_checkpoints(run.checkpoints)[-1] / "state.json").read_text())
    guard = Guard.from_values(about["guard"])
    assert guard.skipped == (SkippedRows(10, LIMIT * ROWS), SkippedRows(10, LIMIT * ROWS))


def test_trouble_that_is_everywhere_ends_the_run_in_a_sentence(
    asked: Recipe, poison: Poison, tmp_path: Path
) -> None:
    poison.put(range(rows_of(10, 1).start, 10**9), math.nan)
    with pytest.raises(FloatingPointError, match=r"steps 11 to 13 went wrong .* after going back 3 times"):
        train.run(asked, RunDirectory(tmp_path / "run"))
    found = describe_run(tmp_path / "run")
    assert (found.state, found.rollbacks) == ("diverged", 3)
    assert found.ended_by is not None
    assert found.ended_by.startswith("steps 11 to 13 went wrong")
    poison.put(rows_of(0, 9), math.nan)
    with pytest.raises(FloatingPointError, match=r"steps 1 to 3 went wrong .* no checkpoint is from before"):
        train.run(asked, RunDirectory(tmp_path / "begun"))


def test_without_the_guard_the_run_goes_on_through_the_explosion(
    asked: Recipe, poison: Poison, tmp_path: Path
) -> None:
    """The control: nothing else goes back."""
    poison.put(rows_of(45, LIMIT), 3.0)
    off = dataclasses.replace(asked, guard=GuardConfig(rollback_after_steps=None))
    run = RunDirectory(tmp_path / "run")
    train.run(off, run)
    assert run.read_events("rollbacks") == []
    assert poison.times_read == 2 * LIMIT
    assert min(line["loss"] for line in run.read_metrics()[45:48]) > 6


@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_a_spike_is_left_out_if_asked(asked: Recipe, poison: Poison, tmp_path: Path, factor: float) -> None:
    poison.put(rows_of(50, 1), factor)
    spiky = dataclasses.replace(asked, guard=GuardConfig(spike_sigma=4.0, rollback_after_steps=None))
    run = RunDirectory(tmp_path / "run")
    train.run(spiky, run)
    skipped = [line["step"] for line in run.read_metrics() if line.get("skipped")]
    assert skipped == ([51] if factor > 1 else [])


def test_the_spike_guard_decides_the_same_when_resumed(asked: Recipe, poison: Poison, tmp_path: Path) -> None:
    poison.put(range(rows_of(40, 1).start, 10**9, 3 * ROWS), 4.0)
    spiky = dataclasses.replace(asked, guard=GuardConfig(spike_sigma=6.0, rollback_after_steps=None))
    whole, stopped = RunDirectory(tmp_path / "full"), RunDirectory(tmp_path / "stopped")
    train.run(spiky, whole)
    assert sum("skipped" in line for line in whole.read_metrics()) >= 3
    recipe: Recipe = spiky
    for number, stop in enumerate((38, 5, 7, None)):
        poison.max_time(stop)
        with pytest.raises(KeyboardInterrupt) if stop else contextlib.nullcontext():
            train.run(recipe, stopped, resume=number > 0)
        recipe = from_toml(Recipe, stopped.recipe.read_text(), "recipe.toml")
    assert lines_of(stopped) == lines_of(whole)
    assert weights_of(stopped) == weights_of(whole)
