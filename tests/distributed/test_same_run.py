"""However many processes do it, and whatever they divide, it is the same run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from overnight.training.checkpoint.load import read_model

RELATIVE = 1e-6
ROWS_JUDGED = 3  # at once: then there are 16 batches and a shorter one

distributed = pytest.mark.distributed  # not in a plain run
TEAMS = [
    pytest.param(1, 1, "none"),
    pytest.param(1, 1, "zero1", marks=distributed),
    pytest.param(1, 1, "fsdp", marks=distributed),
    pytest.param(2, 1, "none"),
    pytest.param(2, 1, "zero1"),
    pytest.param(2, 1, "fsdp"),
    pytest.param(2, 2, "hsdp", marks=distributed),
    pytest.param(4, 1, "none", marks=distributed),
    pytest.param(4, 1, "zero1", marks=distributed),
    pytest.param(4, 1, "fsdp", marks=distributed),
    pytest.param(4, 2, "hsdp"),
]

Train = Callable[..., Any]


def weights(run: Any) -> dict[str, torch.Tensor]:
    """Of the last checkpoint."""
    return read_model(run.newest).weights()


def are_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """To the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---------------------------------------------------------------- equal but for rounding


@pytest.mark.parametrize("size, machines, sharding", TEAMS)
def test_every_team_does_the_run_of_one(trained: Train, size: int, machines: int, sharding: str) -> None:
    alone = trained(1, sharding="none", rows_judged=ROWS_JUDGED)
    run = trained(size, machines=machines, sharding=sharding, rows_judged=ROWS_JUDGED)
    assert run.ledger() == alone.ledger(), "the same tokens in the same order"
    assert len(alone.ledger()) == 20 * 8
    assert all(len(asked) == 20 * 8 / size for asked in run.asked), "each computes its share"
    assert run.losses() == pytest.approx(alone.losses(), rel=RELATIVE, abs=0)
    evaluations, samples = (run.directory.read_events(kind) for kind in ("evaluations", "samples"))
    for mine, theirs in zip(evaluations, alone.directory.read_events("evaluations"), strict=True):
        assert mine == pytest.approx(theirs, rel=RELATIVE, abs=0)
    assert [line["step"] for line in evaluations] == [0, 10, 20]
    assert samples == alone.directory.read_events("samples")
    assert len(samples) == 2 * 3
    found, expected = weights(run), weights(alone)
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-6)


def test_the_run_is_about_something(trained: Train) -> None:
    """Negative controls: it learns, and another seed is seen in the losses and in the order of the text."""
    alone = trained(1, sharding="none", rows_judged=ROWS_JUDGED)
    other = trained(1, sharding="none", seed=7, total_steps=5)
    assert alone.losses()[-1] < 0.97 * alone.losses()[0]
    assert other.losses() != pytest.approx(alone.losses()[:5], rel=1e-4)
    assert other.ledger() != alone.ledger()[: 5 * 8]


# ---------------------------------------------------------------- equal to the bit


@pytest.mark.parametrize(
    "size, sharding",
    [
        pytest.param(1, "zero1", marks=distributed),
        pytest.param(2, "none", marks=distributed),
        pytest.param(2, "zero1", marks=distributed),
        pytest.param(4, "none", marks=distributed),
        (4, "zero1"),
    ],
)
def test_bitwise_weights_do_not_depend_on_the_team(trained: Train, size: int, sharding: str) -> None:
    alone = trained(1, sharding="none", deterministic_reduce=True)
    run = trained(size, sharding=sharding, deterministic_reduce=True)
    assert run.losses() == alone.losses()
    assert are_equal(weights(run), weights(alone))
    assert all(
        run.directory.read_events(kind) == alone.directory.read_events(kind)
        for kind in ("evaluations", "samples")
    )


@distributed
@pytest.mark.parametrize(
    "size, sharding", [(1, "zero1"), (2, "none"), (2, "zero1"), (4, "none"), (4, "zero1")]
)
def test_bitwise_weights_are_equal_after_200_steps(trained: Train, size: int, sharding: str) -> None:
    settings = {"total_steps": 200, "learning_rate": 1e-2, "deterministic_reduce": True}
    alone = trained(1, sharding="none", **settings)
    run = trained(size, sharding=sharding, **settings)
    assert run.losses() == alone.losses()
    assert are_equal(weights(run), weights(alone))


def test_without_bitwise_they_differ_by_rounding(trained: Train) -> None:
    """The negative control: in the order in which they come, sums are rounded otherwise."""
    one, two = (trained(size, sharding="none", rows_judged=ROWS_JUDGED) for size in (1, 2))
    assert not are_equal(weights(one), weights(two))
    assert not are_equal(weights(one), weights(trained(1, sharding="none", deterministic_reduce=True)))


# ---------------------------------------------------------------- judged by several


@pytest.mark.parametrize(
    "size, machines, sharding",
    [
        (2, 1, "none"),
        pytest.param(2, 1, "fsdp", marks=distributed),
        pytest.param(3, 1, "none", marks=distributed),
        pytest.param(4, 1, "none", marks=distributed),
        pytest.param(4, 1, "zero1", marks=distributed),
        (4, 2, "hsdp"),
    ],
)
def test_the_same_weights_are_judged_the_same_to_the_digit(
    trained: Train, team: Any, recipe: Any, tmp_path: Path, size: int, machines: int, sharding: str
) -> None:
    """In 16 batches and a shorter one, which no two, three or four processes divide evenly."""
    run = trained(1, sharding="none", rows_judged=ROWS_JUDGED)
    given = (recipe(sharding=sharding, rows=48 if size == 3 else 16), run.newest, tmp_path / "judged")
    team("judge", *given, ROWS_JUDGED, size=size, machines=machines)
    judged = type(run.directory)(tmp_path / "judged")
    for kind in ("evaluations", "samples"):
        expected = [line for line in run.directory.read_events(kind) if line["step"] == 20]
        found = judged.read_events(kind)
        # How far a run is, and the rate it came with, are no matter of the weights; what is said of the
        # weights themselves is a sum over shards.
        beside = {"tokens": 0, "applied_learning_rate": 0, "norm_gain": 0, "residual_ratio": 0}
        assert [line | beside for line in found] == [line | beside for line in expected]
        for name in {"norm_gain", "residual_ratio"} & {*expected[0]}:
            assert found[0][name] == pytest.approx(expected[0][name], rel=1e-6)
        assert expected
    rows, rest = divmod(judged.read_events("evaluations")[0]["evaluated_tokens"], 32)
    assert (-(-rows // ROWS_JUDGED), rest > 0) == (16, True), "else let the text be another"
