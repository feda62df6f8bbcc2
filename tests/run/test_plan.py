"""A plan decides and counts what a run does; how long both take is compared by benchmarks/plan.py."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from overnight.cli import main
from overnight.model.model_config import ModelConfig
from overnight.planning import PlanConfig, measure
from overnight.planning.command import estimate_plan, plan_recipe
from overnight.planning.estimate import StepCost
from overnight.planning.measure import build_trial, cost_quartiles, measure_step_costs, time_parts
from overnight.recipe import Recipe, Resolved
from overnight.run.train import train_recipe
from overnight.run_directory import RunDirectory
from overnight.training import OptimizerConfig
from overnight.training.batch import BatchConfig, plan_batches
from overnight.training.checkpoint.format import list_checkpoints
from overnight.training.schedule import ScheduleConfig
from overnight.training.step import train_step

SIZES = ModelConfig(n_layer=2, n_head=2, n_embd=64, context_length=32)


@pytest.fixture
def planned(recipe: Callable[..., Recipe]) -> Recipe:
    """A recipe with eight micro-batches a step."""
    return recipe(
        model=SIZES,
        schedule=ScheduleConfig(total_steps=10),
        batch=BatchConfig(tokens_per_step=64 * 32, micro_batch_size=8),
    )


@pytest.fixture
def resolved(planned: Recipe) -> Resolved:
    return estimate_plan(PlanConfig(**vars(planned)), "small").resolved


MODERN = dataclasses.replace(
    SIZES, positions="rotary", normalization="rms", tied_head=False, value_embeddings="all", n_expert=4
)


@pytest.mark.parametrize("model, optimizer", [(SIZES, "adamw"), (MODERN, "muon")], ids=["gpt2", "modern"])
def test_plan_counts_what_a_run_does(
    model: ModelConfig, optimizer: Any, planned: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    planned = dataclasses.replace(planned, batch=BatchConfig(tokens_per_step=64 * 32), model=model)
    planned = dataclasses.replace(planned, optimizer=OptimizerConfig(optimizer=optimizer))
    plan = plan_recipe(PlanConfig(**vars(planned), seconds=0.2), "small")
    assert plan.fits
    assert plan.forecast is not None
    assert 0 < plan.forecast.seconds < math.inf
    directory = RunDirectory(tmp_path / "runs" / "small")
    decided = train_recipe(planned, directory)
    recipe = dataclasses.replace(plan.resolved.recipe, data=decided.recipe.data)
    assert dataclasses.replace(plan.resolved, recipe=recipe) == decided
    (*_, newest) = list_checkpoints(directory.checkpoints)
    written = sum(file.stat().st_size for file in newest.iterdir())
    assert plan.counts.checkpoint_bytes == pytest.approx(written, rel=0.01)
    assert plan.counts.tokens == directory.read_metrics()[-1]["tokens"]
    evaluations = directory.read_events("evaluations")
    assert plan.counts.evaluations == len(evaluations)
    assert plan.counts.evaluated_tokens == sum(event["evaluated_tokens"] for event in evaluations)
    lines = directory.metrics.read_text().splitlines()
    assert plan.disk_bytes["metrics"] == pytest.approx(sum(map(len, lines)), rel=0.25)


def test_long_steps_are_timed_in_part(resolved: Resolved, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of 100 micro-batches of a second each, in 6 seconds."""
    plan = plan_batches(BatchConfig(tokens_per_step=200 * 32, micro_batch_size=2), 32, 2)
    steps: list[int] = []
    monkeypatch.setattr(measure, "time_parts", lambda *_: (1.0, 0.5))
    monkeypatch.setattr(measure, "_step", lambda state, training, count: steps.append(count) or 3.0)
    found = measure_step_costs(dataclasses.replace(resolved, plan=plan), seconds=6.0)
    assert found is not None
    assert {*steps} <= {1, 2}
    assert plan.micro_batches(0) == 100
    assert found.costs[1].update == pytest.approx(found.costs[1].micro_batch / 2)


def test_costs_are_quartiles_of_timed_steps() -> None:
    parts = StepCost(0.2, update=0.2, start=30.0, evaluated_token=0.1, sampled_token=0.2, saved_byte=0.3)
    costs = cost_quartiles(parts, (1.4, 1.2, 1.8, 1.0, 9.0), micro_batches=4)
    assert [cost.step(4) for cost in costs] == pytest.approx([1.2, 1.4, 1.8])
    assert [cost.micro_batch for cost in costs] == pytest.approx([0.24, 0.28, 0.36])
    assert {cost[2:] for cost in costs} == {parts[2:]}


def test_timed_step_is_a_step_of_training(resolved: Resolved) -> None:
    (trained, training), (timed, setup) = build_trial(resolved), build_trial(resolved)
    train_step(trained, training)
    assert min(time_parts(timed, setup, setup.plan.micro_batches(0))) > 0
    weights = timed.model.weights()
    assert all(torch.equal(weight, weights[name]) for name, weight in trained.model.weights().items())


@pytest.mark.parametrize("fitting_rows", [4, 0])
def test_micro_batch_that_does_not_fit_is_halved(
    resolved: Resolved, fitting_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        measure, "fits", lambda state, training: training.plan.micro_batch_size <= fitting_rows
    )
    found = measure_step_costs(resolved, seconds=0.1)
    if fitting_rows:
        assert found is not None
        assert found.resolved.plan.micro_batch_size == 4
        assert found.resolved.plan.tokens(0) == 64 * 32
    else:
        assert found is None


def test_command_measures_and_names_the_next_one(
    planned: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data = ["--data", planned.data.data, "--compile=False", "--precision=fp32", "--device=cpu"]
    sizes = ["--n_layer=1", "--n_embd=32", "--n_head=2", "--context_length=16", "--tokens_per_step=64"]
    assert main(["plan", "quickstart", *data, *sizes, "--seconds=0.1", "--dollars-per-hour=1", "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["measured"]
    assert found["peak_memory_bytes"] > 0
    assert found["tokens_per_second"] > 0
    assert found["seconds_by_use"].pop("compilation") >= 0
    assert found["seconds_by_use"].keys() == {"training", "evaluation", "samples", "checkpoints"}
    assert min(found["seconds_by_use"].values()) > 0
    assert "next: overnight train quickstart" in err
    assert "--n-layer 1" in err
    assert list(tmp_path.iterdir()) == []
