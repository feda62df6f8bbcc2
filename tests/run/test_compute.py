"""How the machine is used does not change what is trained."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from overnight.config import from_toml
from overnight.recipe import Recipe
from overnight.run import train as train_module
from overnight.run_directory import RunDirectory
from overnight.training import ComputeConfig
from overnight.training.batch import BatchConfig
from overnight.training.checkpoint.format import list_checkpoints
from overnight.training.checkpoint.load import read_model

Build = Callable[..., Recipe]


def train(recipe: Recipe, path: Path, *, resume: bool = False) -> RunDirectory:
    directory = RunDirectory(path)
    train_module.run(recipe, directory, resume=resume)
    return directory


def weights(directory: RunDirectory) -> dict[str, torch.Tensor]:
    return read_model(list_checkpoints(directory.checkpoints)[-1]).weights()


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def in_fp16(recipe: Recipe) -> Recipe:
    compute = ComputeConfig(device="cpu", precision="fp16", compile=False)
    return dataclasses.replace(recipe, compute=compute)


def test_an_overflow_of_fp16_skips_the_step_and_resuming_stays_exact(
    recipe: Build,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    overflow_at: Callable[[set[int]], None],
) -> None:
    small = in_fp16(recipe())
    overflow_at({4, 5})
    whole = train(small, tmp_path / "full")
    norms = [line["grad_norm"] for line in whole.read_metrics()]
    assert [step for step, norm in enumerate(norms) if norm is None] == [4, 5]
    state = json.loads((list_checkpoints(whole.checkpoints)[-1] / "state.json").read_text())
    assert (state["step"], state["updates"]) == (12, 10)
    assert state["loss_scale"]["scale"] == 65536 / 4

    stops = iter([False] * 6 + [True])
    with monkeypatch.context() as patch:
        fit = train_module.fit
        patch.setattr(train_module, "fit", lambda *given: fit(*given[:4], lambda: next(stops)))
        with pytest.raises(KeyboardInterrupt):
            train(small, tmp_path / "stopped")
    written = (tmp_path / "stopped" / "recipe.toml").read_text()
    stopped = train(from_toml(Recipe, written, "recipe.toml"), tmp_path / "stopped", resume=True)
    assert same(weights(stopped), weights(whole))
    kept = [{name: line[name] for name in ("step", "loss", "grad_norm")} for line in stopped.read_metrics()]
    assert kept == [{name: line[name] for name in kept[0]} for line in whole.read_metrics()]


def test_what_does_not_fit_is_halved_and_the_step_stays_the_same(
    recipe: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_module, "fits", lambda training, state: training.plan.micro_batch_size <= 10)
    small = recipe(model=dataclasses.replace(recipe().model, dropout=0.0))
    halved = train(small, tmp_path / "halved")
    assert "micro_batch_size = 8" in halved.recipe.read_text()
    choices = json.loads(halved.environment.read_text())["choices"]
    assert choices["micro_batch_size"].startswith("8 (halved until it fitted), 12 micro-batches")
    monkeypatch.undo()
    asked = dataclasses.replace(small, batch=BatchConfig(tokens_per_step=96 * 32, micro_batch_size=8))
    assert same(weights(train(asked, tmp_path / "asked")), weights(halved))


def test_where_not_a_row_fits_nothing_is_begun(
    recipe: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_module, "fits", lambda training, state: False)
    with pytest.raises(ValueError, match="not a single row fits .* --activation_checkpointing block"):
        train(recipe(), tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_evaluating_sampling_and_saving_recompile_nothing(recipe: Build, tmp_path: Path) -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    small = recipe(
        model=dataclasses.replace(recipe().model, n_layer=1),  # compiled in half the time
        compute=ComputeConfig(device="cpu", precision="fp32", compile=True),
        evaluation=dataclasses.replace(recipe().evaluation, evaluate_every_steps=2),
        samples=dataclasses.replace(recipe().samples, sample_every_steps=2),
    )
    train(small, tmp_path / "compiled")
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["recompile_limit"]


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_another_shape_would_be_seen_as_a_recompilation() -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    double = torch.compile(lambda x: 2 * x, dynamic=False, fullgraph=True, backend="eager")
    double(torch.ones(2))
    double(torch.ones(3))
    assert counters["stats"]["unique_graphs"] == 2
