"""The same run, evaluation and rollback, in whatever number of processes and with whatever sharding."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from overnight.run_directory import RunDirectory
from overnight.training.checkpoint.load import read_model

Train = Callable[..., Any]
distributed = pytest.mark.distributed  # not in a plain run


def params(quick: list[Any], long: list[Any]) -> list[Any]:
    """Cases of a plain run, and those that only `-m distributed` runs."""
    return [*quick, *(pytest.param(*case, marks=distributed) for case in long)]


def weights(run: Any) -> dict[str, torch.Tensor]:
    """Of the last checkpoint."""
    return read_model(run.newest).weights()


@pytest.mark.parametrize(
    "size, machines, sharding",
    params(
        [(1, 1, "none"), (2, 1, "none"), (2, 1, "zero1"), (2, 1, "fsdp"), (4, 2, "hsdp")],
        [(1, 1, "zero1"), (1, 1, "fsdp"), (2, 2, "hsdp"), (4, 1, "none"), (4, 1, "zero1"), (4, 1, "fsdp")],
    ),
)
def test_run_is_the_same_but_for_rounding(trained, size, machines, sharding):
    alone = trained(1, sharding="none")
    run = trained(size, machines=machines, sharding=sharding)
    assert run.ledger() == alone.ledger(), "the same tokens in the same order"
    assert len(alone.ledger()) == 20 * 8
    assert all(len(read) == 20 * 8 / size for read in run.read), "each computes its share"
    assert run.losses() == pytest.approx(alone.losses(), rel=1e-6, abs=0)
    evaluations, samples = (run.directory.read_events(kind) for kind in ("evaluations", "samples"))
    for mine, theirs in zip(evaluations, alone.directory.read_events("evaluations"), strict=True):
        assert mine.pop("low", None) is theirs.pop("low", None) is None, "too few rows for an interval"
        assert mine.pop("high", None) is theirs.pop("high", None) is None
        assert mine == pytest.approx(theirs, rel=1e-6, abs=0)
    assert [line["step"] for line in evaluations] == [0, 10, 20]
    assert samples == alone.directory.read_events("samples")
    found = weights(run)
    for name, weight in weights(alone).items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-6)


def test_run_learns_and_depends_on_the_seed(trained):
    """Negative control."""
    alone, other = trained(1, sharding="none"), trained(1, sharding="none", seed=7, total_steps=5)
    assert alone.losses()[-1] < 0.97 * alone.losses()[0]
    assert other.losses() != pytest.approx(alone.losses()[:5], rel=1e-4)
    assert other.ledger() != alone.ledger()[: 5 * 8]


@pytest.mark.parametrize(
    "size, sharding", params([(4, "zero1")], [(1, "zero1"), (2, "none"), (2, "zero1"), (4, "none")])
)
@pytest.mark.parametrize("steps", [20, pytest.param(200, marks=distributed)])
def test_deterministic_run_is_the_same_to_the_bit(trained, size, sharding, steps):
    settings: dict[str, Any] = {"deterministic_reduce": True}
    settings |= {"total_steps": 200, "peak_learning_rate": 1e-2} if steps == 200 else {}
    alone = trained(1, sharding="none", **settings)
    assert trained(size, sharding=sharding, **settings).record() == alone.record()


def test_other_runs_differ_by_rounding(trained):
    """Negative control: without it, sums are rounded as they come."""
    alone = trained(1, sharding="none").record()
    assert alone != trained(2, sharding="none").record()
    assert alone != trained(1, sharding="none", deterministic_reduce=True).record()


# Evaluation


@pytest.fixture
def task_files(tmp_path):
    """Questions and passages of many lengths."""
    (folder := tmp_path / "tasks").mkdir()
    words = ["the", "text", "of", "a", "line", "and", "what", "stands", "in", "it"]

    def phrase(first: int, count: int) -> str:
        return " ".join(words[first : first + count])

    questions = [
        {"ctx": phrase(0, 1 + n % 5), "endings": [phrase(e, 1 + n % 3) for e in range(4)], "label": n % 4}
        for n in range(37)
    ]
    passages = [{"text": phrase(0, 2 + n % 4)} for n in range(23)]
    for name, lines in (("hellaswag_val", questions), ("lambada_test", passages)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.parametrize(
    "case",
    [
        *[(2, 1, "none"), (4, 2, "hsdp"), pytest.param((3, 1, "none"), marks=distributed)],
        pytest.param((2, 1, "fsdp"), marks=distributed),
    ],
    ids=str,
)
def test_checkpoint_is_evaluated_the_same(trained, team, recipe, task_files, tmp_path, case):
    """Validation in 16 batches and a shorter one, which no two, three or four processes divide evenly."""
    checkpoint = trained(1, sharding="none").newest
    tasks = {"tasks": ("hellaswag", "lambada"), "task_files": str(task_files)}
    found = {}
    for name, (count, of, kind) in {"alone": (1, 1, "none"), "team": case}.items():
        asked = recipe(sharding=kind, tokens_per_step=32 * (48 if count == 3 else 16), **tasks)
        given = (asked, checkpoint, tmp_path / name)
        team("evaluate_checkpoint", *given, size=count, machines=of)
        found[name] = RunDirectory(tmp_path / name)
    alone, several = found["alone"], found["team"]
    # Tokens and learning rate belong to the recipe; what describes the weights is a sum over shards.
    for kind in ("samples", "tasks"):
        one, other = ([line | {"tokens": 0} for line in each.read_events(kind)] for each in (alone, several))
        assert one == other
    assert {line["examples"] for line in alone.read_events("tasks")} == {37, 23}
    (one,), (other,) = alone.read_events("evaluations"), several.read_events("evaluations")
    beside = {"tokens": 0, "applied_learning_rate": 0, "norm_gain": 0, "residual_ratio": 0}
    assert one | beside == other | beside
    for name in {"norm_gain", "residual_ratio"} & {*one}:
        assert other[name] == pytest.approx(one[name], rel=1e-6)
    rows, rest = divmod(one["evaluated_tokens"], 32)
    assert (-(-rows // 3), rest > 0) == (16, True), "choose another text"


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=distributed)])
def test_evaluate_command_prints_the_same_once(trained, team, task_files, size):
    run = trained(1, sharding="none", total_steps=5)
    values = {"model": str(run.directory.path), "tasks": ("validation,hellaswag,lambada",)}
    values |= {"task_files": str(task_files), "device": "cpu", "json": True}
    (alone,) = team("evaluate", values, size=1)
    first, *others = team("evaluate", values, size=size)
    assert json.loads(first) == json.loads(alone)
    assert others == [""] * (size - 1)
    (strided,) = team("evaluate", {**values, "stride": 8}, size=1)
    assert json.loads(strided)["loss"] != json.loads(alone)["loss"], "negative control"
    assert team("evaluate", {**values, "stride": 8}, size=size)[0] == strided


# Rollback


@pytest.mark.parametrize("size, sharding", params([(2, "none")], [(2, "zero1"), (2, "fsdp")]))
def test_rollback_is_the_same(team, recipe, tmp_path, size, sharding):
    def guarded(kind):
        return recipe(sharding=kind, total_steps=10, rollback_after_steps=2, checkpoint_every_steps=3)

    runs = {}
    for count, kind in ((1, "none"), (size, sharding)):
        ends = team("train_poisoned", guarded(kind), tmp_path / kind / str(count), [5, 6], size=count)
        assert {message for message, _ in ends} == {""}
        assert len({tuple(rows) for _, rows in ends}) == 1, "all skip the same rows"
        runs[count] = RunDirectory(tmp_path / kind / str(count))
    alone, several = runs[1], runs[size]
    assert [event["first_bad_step"] for event in several.read_events("rollbacks")] == [6]
    assert several.read_events("rollbacks") == alone.read_events("rollbacks")
    steps, losses = ([line[name] for line in several.read_metrics()] for name in ("step", "loss"))
    assert steps == list(range(1, 11))
    assert losses == pytest.approx([line["loss"] for line in alone.read_metrics()], rel=1e-5)
    # Negative control: without a checkpoint to roll back to, all end.
    ends = team("train_poisoned", guarded(sharding), tmp_path / "no-checkpoint", [0, 1], size=size)
    assert all("checkpoint" in message for message, _ in ends)
