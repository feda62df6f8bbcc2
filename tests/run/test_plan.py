from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from overnight.cli import main
from overnight.distributed.world import SINGLE_PROCESS
from overnight.model.model_config import ModelConfig
from overnight.planning import PlanConfig
from overnight.planning import measure as measure_module
from overnight.planning.command import plan_here, planned_recipe
from overnight.planning.measure import Trial, build, measure_step_costs, time_parts, time_writing
from overnight.recipe import Recipe
from overnight.run import train
from overnight.run.setup import build_setup, resolve_recipe
from overnight.run_directory import RunDirectory
from overnight.training.batch import BatchConfig, plan_batches
from overnight.training.checkpoint.format import list_checkpoints
from overnight.training.schedule import ScheduleConfig
from overnight.training.step import train_step

SIZES = ModelConfig(n_layer=2, n_head=2, n_embd=64, context_length=32)
NOISE = 3.0  # other tests run beside this one, on the same cores


@pytest.fixture
def planned(recipe: Callable[..., Recipe]) -> Recipe:
    """A recipe whose steps take some 30 milliseconds, in eight micro-batches."""
    return recipe(
        model=SIZES,
        schedule=ScheduleConfig(total_steps=10),
        batch=BatchConfig(tokens_per_step=64 * 32, micro_batch_size=8),
    )


def with_vocabulary(recipe: Recipe) -> Recipe:
    """Decided, as a run would decide it."""
    return build_setup(recipe, SINGLE_PROCESS, has_checkpoint=False).recipe


def test_what_is_foretold_is_what_a_run_does(
    planned: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outlook = plan_here(PlanConfig(**vars(planned), seconds=0.5), "small")
    assert outlook.fits
    assert outlook.paces is not None
    _, likely, _ = outlook.paces
    directory = RunDirectory(tmp_path / "runs" / "small")
    train.run(planned, directory)
    steps = directory.read_metrics()[2:]
    measured = statistics.median(step["tokens_per_second"] for step in steps)
    assert measured / NOISE < outlook.tokens_per_second(likely) < measured * NOISE
    (*_, newest) = list_checkpoints(directory.checkpoints)
    written = sum(file.stat().st_size for file in newest.iterdir())
    assert outlook.work.checkpoint_bytes == pytest.approx(written, rel=0.01)
    assert outlook.work.tokens == directory.read_metrics()[-1]["tokens"]
    assert outlook.work.evaluations == len(directory.read_events("evaluations"))
    judged = sum(event["evaluated_tokens"] for event in directory.read_events("evaluations"))
    assert outlook.work.evaluated_tokens == judged
    lines = directory.metrics.read_text().splitlines()
    assert outlook.disk_bytes["metrics"] == pytest.approx(sum(map(len, lines)), rel=0.25)


def test_a_plan_decides_what_a_run_decides(planned: Recipe) -> None:
    longer = dataclasses.replace(planned, batch=BatchConfig(tokens_per_step=64 * 32))
    job = build_setup(longer, SINGLE_PROCESS, has_checkpoint=False)
    asked = PlanConfig(**vars(planned))
    asked = dataclasses.replace(asked, batch=BatchConfig(tokens_per_step=64 * 32))
    recipe, plan = resolve_recipe(planned_recipe(asked), job.recipe.model, job.recipe.data, "cpu")
    assert recipe == job.recipe
    assert plan == job.plan


def test_a_step_too_long_to_be_run_is_put_together_from_its_parts(planned: Recipe) -> None:
    """Of 100 micro-batches a few are timed; the rest is arithmetic, which a whole step confirms."""
    recipe = with_vocabulary(dataclasses.replace(planned, batch=BatchConfig(tokens_per_step=200 * 32)))
    plan = plan_batches(dataclasses.replace(recipe.batch, micro_batch_size=2), 32, 2)
    measured = measure_step_costs(recipe, plan, seconds=0.2)
    assert measured is not None
    found, _ = measured
    assert found.micro_batches < plan.micro_batches(0) == 100
    state, training = build(recipe, plan)
    seconds = train_step(state, training).seconds
    _, likely, _ = found.paces()
    assert seconds / NOISE < likely.step(100) < seconds * NOISE


def test_the_paces_are_quartiles_of_what_was_timed() -> None:
    found = Trial(
        micro_batches=4,
        step_seconds=(1.4, 1.2, 1.8, 1.0, 9.0),
        update_seconds=0.2,
        start_seconds=30.0,
        evaluated_token_seconds=0.1,
        sampled_token_seconds=0.2,
        saved_byte_seconds=0.3,
        peak_memory_bytes=None,
        evaluation_peak_memory_bytes=None,
        process_memory_bytes=0,
    )
    assert [pace.step(4) for pace in found.paces()] == pytest.approx([1.2, 1.4, 1.8])
    assert [pace.micro_batch for pace in found.paces()] == pytest.approx([0.25, 0.3, 0.4])


def test_the_timed_parts_are_a_step(planned: Recipe) -> None:
    """The one step that is written out in the trial does what `train_step` does."""
    recipe = with_vocabulary(planned)
    plan = plan_batches(recipe.batch, 32, 8)
    weights = []
    for parted in (False, True):
        state, training = build(recipe, plan)
        if parted:
            time_parts(state, training, plan.micro_batches(0))
        else:
            train_step(state, training)
        weights.append(state.model.weights())
    for name, weight in weights[0].items():
        assert torch.allclose(weight, weights[1][name], atol=1e-6), name


@pytest.mark.parametrize("enough", [4, 0])
def test_a_micro_batch_that_does_not_fit_is_halved_as_a_run_would_halve_it(
    planned: Recipe, enough: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = with_vocabulary(planned)
    monkeypatch.setattr(
        measure_module, "fits", lambda training, state: training.plan.micro_batch_size <= enough
    )
    measured = measure_step_costs(recipe, plan_batches(recipe.batch, 32, 8), seconds=0.2)
    if enough:
        assert measured is not None
        assert measured[1].micro_batch_size == 4
        assert measured[1].tokens(0) == 64 * 32
    else:
        assert measured is None


def test_the_disk_is_left_as_it_was(tmp_path: Path) -> None:
    seconds = time_writing(tmp_path)
    assert 1e-11 < seconds < 1e-6  # between 100 GB/s and 1 MB/s
    assert list(tmp_path.iterdir()) == []


def test_the_command_measures_and_names_the_next_one(
    planned: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data = ["--data", planned.data.data, "--compile=False", "--precision=fp32", "--device=cpu"]
    sizes = ["--n_layer=1", "--n_embd=32", "--n_head=2", "--context_length=16", "--tokens_per_step=64"]
    assert main(["plan", "quickstart", *data, *sizes, "--seconds=0.2", "--dollars-per-hour=1", "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["measured"]
    assert found["peak_memory_bytes"] > 0
    assert found["tokens_per_second"] > 0
    assert set(found["seconds_by_use"]) == {"training", "evaluation", "samples", "checkpoints", "compilation"}
    assert all(
        found["seconds_by_use"][name] > 0 for name in ("training", "evaluation", "samples", "checkpoints")
    )
    assert "next: overnight train quickstart" in err
    assert "--n-layer 1" in err
    assert list(tmp_path.iterdir()) == []
