"""Several processes go back together, and decide what one decides."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from overnight.recipe import CheckpointsConfig
from overnight.run_directory import RunDirectory
from overnight.training.guard import GuardConfig

distributed = pytest.mark.distributed
TEAMS = [
    (2, "none"),
    pytest.param(2, "zero1", marks=distributed),
    pytest.param(2, "fsdp", marks=distributed),
]


def guarded(build: Any, sharding: str, total_steps: int) -> Any:
    """A recipe that saves often and goes back after two bad steps."""
    return dataclasses.replace(
        build(sharding=sharding, total_steps=total_steps),
        guard=GuardConfig(rollback_after_steps=2),
        checkpoints=CheckpointsConfig(checkpoint_every_steps=3),
    )


@pytest.mark.parametrize("size, sharding", TEAMS)
def test_a_team_goes_back_as_one_does(
    team: Any, recipe: Any, tmp_path: Path, size: int, sharding: str
) -> None:
    runs = {}
    for count, kind in ((1, "none"), (size, sharding)):
        path = tmp_path / f"{count}-{kind}"
        ends = team("train_poisoned", guarded(recipe, kind, 10), path, [5, 6], size=count)
        assert {said for said, _ in ends} == {""}
        assert len({tuple(rows) for _, rows in ends}) == 1, "all leave out the same rows"
        runs[count] = RunDirectory(path)
    alone, several = runs[1], runs[size]
    assert [event["first_bad_step"] for event in several.read_events("rollbacks")] == [6]
    assert several.read_events("rollbacks") == alone.read_events("rollbacks")
    steps, losses = ([line[name] for line in several.read_metrics()] for name in ("step", "loss"))
    assert steps == list(range(1, 11))
    assert losses == pytest.approx([line["loss"] for line in alone.read_metrics()], rel=1e-5)


@pytest.mark.parametrize("size, sharding", TEAMS)
def test_a_team_that_can_not_go_back_ends_together(
    team: Any, recipe: Any, tmp_path: Path, size: int, sharding: str
) -> None:
    """The control: it is the going back that lets the run end."""
    ends = team("train_poisoned", guarded(recipe, sharding, 10), tmp_path / "run", [0, 1], size=size)
    assert all("no checkpoint is from before" in said for said, _ in ends)
