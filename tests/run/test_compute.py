"""How the machine is used does not change what is trained."""

from __future__ import annotations

import json

import pytest
import torch
from torch._dynamo.utils import counters

from overnight.recipe import read_recipe_of, with_settings
from overnight.run import setup
from overnight.run.train import train_recipe
from overnight.run_directory import RunDirectory
from overnight.training.checkpoint.format import list_checkpoints


def test_fp16_overflow_skips_step_and_resumes_exactly(recipe, overflow_at, train_to, fingerprint):
    small = with_settings(recipe(), precision="fp16")
    overflow_at({4, 5})
    whole = train_to(small, "full")
    norms = [line["grad_norm"] for line in whole.read_metrics()]
    assert [step for step, norm in enumerate(norms) if norm is None] == [4, 5]
    state = json.loads((list_checkpoints(whole.checkpoints)[-1] / "state.json").read_text())
    assert (state["step"], state["updates"]) == (12, 10)
    assert state["loss_scale"]["scale"] == 65536 / 4
    assert fingerprint(train_to(small, "stopped", 6)) == fingerprint(whole)


def test_micro_batch_is_halved_until_it_fits(recipe, train_to, fingerprint, monkeypatch):
    small = with_settings(recipe(), dropout=0.0)
    with monkeypatch.context() as patch:
        patch.setattr(setup, "fits", lambda state, training: training.plan.micro_batch_size <= 10)
        halved = train_to(small, "halved")
    assert read_recipe_of(halved.path).batch.micro_batch_size == 8
    choices = json.loads(halved.environment.read_text())["choices"]
    assert choices["micro_batch_size"].startswith("8 (halved")
    asked = train_to(with_settings(small, micro_batch_size=8), "asked")
    assert fingerprint(asked) == fingerprint(halved)


def test_nothing_is_written_if_no_row_fits(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "fits", lambda state, training: False)
    with pytest.raises(ValueError, match="--activation-checkpointing"):
        train_recipe(recipe(), RunDirectory(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_evaluation_samples_and_checkpoints_recompile_nothing(recipe, tmp_path):
    torch._dynamo.reset()
    counters.clear()
    often = {"evaluate_every_steps": 2, "sample_every_steps": 2}
    small = with_settings(recipe(), n_layer=1, compile=True, **often)  # one layer compiles in half the time
    train_recipe(small, RunDirectory(tmp_path / "compiled"))
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["recompile_limit"]
    torch.compile(lambda x: 2 * x, dynamic=False, fullgraph=True, backend="eager")(torch.ones(2))
    assert counters["stats"]["unique_graphs"] == 2, "the negative control: another shape is counted"
