"""Poisoned rows: the run rolls back, skips them, and decides the same when it is resumed."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import re
from typing import Any

import pytest
from torch import Tensor

from overnight.data.loader import Batch
from overnight.recipe import with_settings
from overnight.run import train as train_module
from overnight.run_directory import RunDirectory
from overnight.runs.status import describe_run
from overnight.training.checkpoint.format import list_checkpoints
from overnight.training.guard import AT_LEAST, Guard, SkippedRows

STEPS, ROWS, LIMIT = 60, 8, 3


@pytest.fixture
def asked(recipe):
    """A run of many small steps, with dropout."""
    batch = {"tokens_per_step": ROWS * 32, "micro_batch_size": 4}
    return recipe(total_steps=STEPS, checkpoint_every_steps=4, rollback_after_steps=LIMIT, **batch)


class Poison:
    """Stands in for the data and the loss of a run's steps. Counts the batches with poisoned rows."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._train_step = train_module.train_step
        self._rows, self._factor, self._left_out = range(0), 1.0, range(0)
        self._is_bad = False
        self.times_read = 0
        monkeypatch.setattr(train_module, "train_step", self._step)

    def put(self, rows: range, factor: float) -> None:
        """From now on the loss of these rows is multiplied by `factor`."""
        self._rows, self._factor = rows, factor

    def leave_out(self, rows: range) -> None:
        """From now on these rows are not read and none is poisoned: the independent twin of a rollback."""
        self._rows, self._left_out = range(0), rows

    def _step(self, state: Any, setup: Any) -> Any:
        self._setup = setup
        return self._train_step(state, dataclasses.replace(setup, data=self, loss=self._loss))

    def batch(self, first: int, count: int) -> Batch:
        self._is_bad = any(row in self._rows for row in range(first, first + count))
        self.times_read += self._is_bad
        later = len(self._left_out) if self._left_out and first >= self._left_out.start else 0
        batch: Batch = self._setup.data.batch(first + later, count)
        return batch

    def _loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        nats: Tensor = self._setup.loss(ids, targets)
        return nats * self._factor if self._is_bad else nats


@pytest.fixture
def poison(monkeypatch):
    """Nothing is poisoned yet."""
    return Poison(monkeypatch)


def rows_of(first_step: int, steps: int) -> range:
    """The rows of steps, counted from 0."""
    return range(first_step * ROWS, (first_step + steps) * ROWS)


def last_state(directory: RunDirectory) -> dict[str, Any]:
    return json.loads((list_checkpoints(directory.checkpoints)[-1] / "state.json").read_text())


@pytest.fixture
def roll_back_and_compare(asked, poison, train_to, fingerprint):
    """Train with poisoned rows, which are rolled back, and compare with a twin that leaves them out."""

    def compare(rows, factor):
        poison.put(rows, factor)
        run = train_to(asked, "run")
        assert poison.times_read == 2 * LIMIT, "once: both micro-batches of each step"
        poison.leave_out(rows)
        twin = train_to(asked, "twin")
        checkpoints = [list_checkpoints(each.checkpoints)[-1] for each in (run, twin)]
        for name in ("model.safetensors", "optimizer.safetensors"):
            assert (checkpoints[0] / name).read_bytes() == (checkpoints[1] / name).read_bytes()
        assert fingerprint(run)[1:] == fingerprint(twin)[1:]
        return run

    return compare


CHOSEN = [(5, math.nan), (45, 3.0)]
DRAWN = [
    pytest.param(random.Random(number).randrange(low, STEPS - LIMIT), factor, marks=pytest.mark.slow)
    for number in range(9)
    for low, factor in ((4, math.nan), (AT_LEAST + 1, 4.0 + number))
]


@pytest.mark.parametrize("first, factor", [*CHOSEN, *DRAWN])
def test_rolled_back_run_equals_run_without_those_rows(roll_back_and_compare, first, factor):
    run = roll_back_and_compare(rows_of(first, LIMIT), factor)
    assert [line["step"] for line in run.read_metrics()] == list(range(1, STEPS + 1))
    back_to = first - first % 4
    assert run.read_events("rollbacks") == [
        {"step": back_to + 1, "first_bad_step": first + 1, "last_bad_step": first + LIMIT, "rows": 3 * ROWS}
    ]


def test_rollback_skips_a_damaged_checkpoint(roll_back_and_compare, tmp_path, monkeypatch):
    roll_back = train_module.roll_back

    def damage_and_roll_back(*given):
        newest = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
        assert newest.name == "step-00000008"
        (newest / "model.safetensors").write_bytes(b"")
        roll_back(*given)

    monkeypatch.setattr(train_module, "roll_back", damage_and_roll_back)
    roll_back_and_compare(rows_of(9, LIMIT), math.nan)


@pytest.mark.parametrize("stop", [7, 9])
def test_run_stopped_around_the_trouble_rolls_back_equally(asked, poison, train_to, fingerprint, stop):
    poison.put(rows_of(6, LIMIT), math.nan)
    run, twin = train_to(asked, "run", stop), train_to(asked, "twin")
    assert fingerprint(run) == fingerprint(twin)
    assert run.read_events("rollbacks") == twin.read_events("rollbacks") != []


def test_few_bad_steps_are_skipped_without_rollback(asked, poison, train_to):
    poison.put(rows_of(10, LIMIT - 1), math.nan)
    run = train_to(asked, "run")
    found = [(line["step"], line["loss"]) for line in run.read_metrics() if line.get("skipped")]
    assert found == [(11, None), (12, None)]
    assert run.read_events("rollbacks") == []
    state = last_state(run)
    assert (state["step"], state["updates"]) == (STEPS, STEPS - 2)


def test_rollbacks_add_up(asked, poison, train_to):
    poison.put(range(rows_of(10, 1).start, rows_of(10, 2 * LIMIT).stop), math.nan)
    run = train_to(asked, "run")
    assert len(run.read_events("rollbacks")) == 2
    assert Guard.from_values(last_state(run)["guard"]).skipped == (SkippedRows(10, LIMIT * ROWS),) * 2


@pytest.mark.parametrize(
    "first, named, rollbacks",
    [
        (10, "steps 11 to 13 .*max_rollbacks", 3),
        (0, "steps 1 to 3 .*no checkpoint .*--peak-learning-rate", 0),
    ],
)
def test_run_ends_where_it_cannot_roll_back(asked, poison, train_to, tmp_path, first, named, rollbacks):
    poison.put(range(first * ROWS, 10**9), math.nan)
    with pytest.raises(FloatingPointError, match=named):
        train_to(asked, "run")
    found = describe_run(tmp_path / "run")
    assert (found.state, found.rollbacks) == ("diverged", rollbacks)
    assert re.match(named.partition(" .*")[0], found.ended_by)


def test_without_guard_the_run_trains_through_the_explosion(asked, poison, train_to):
    """The negative control: nothing else rolls back."""
    poison.put(rows_of(45, LIMIT), 3.0)
    run = train_to(with_settings(asked, rollback_after_steps=None), "run")
    assert run.read_events("rollbacks") == []
    assert poison.times_read == 2 * LIMIT
    assert min(line["loss"] for line in run.read_metrics()[45:48]) > 6


@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_spike_is_skipped_with_spike_sigma(asked, poison, train_to, factor):
    poison.put(rows_of(50, 1), factor)
    run = train_to(with_settings(asked, spike_sigma=4.0, rollback_after_steps=None), "run")
    skipped = [line["step"] for line in run.read_metrics() if line.get("skipped")]
    assert skipped == ([51] if factor > 1 else [])


def test_resumed_run_skips_the_same_spikes(asked, poison, train_to, fingerprint):
    poison.put(range(rows_of(40, 1).start, 10**9, 3 * ROWS), 4.0)
    recipe = with_settings(asked, spike_sigma=6.0, rollback_after_steps=None)
    twin = train_to(recipe, "twin")
    assert sum("skipped" in line for line in twin.read_metrics()) >= 3
    assert fingerprint(train_to(recipe, "run", 38, 5, 7)) == fingerprint(twin)
