"""How the machine is used does not change what is trained; steps that overflow float16 are skipped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from overnight.recipe import read_recipe_of
from overnight.report.compare import comparison_page
from overnight.report.page import write_report
from overnight.run import command as run_command
from overnight.run import log, setup
from overnight.run.train import train_recipe
from overnight.run_directory import RunDirectory
from overnight.runs import RunsConfig
from overnight.runs import command as runs_command
from overnight.training.checkpoint.format import list_checkpoints


def test_fp16_overflow_skips_step_and_resumes_exactly(recipe, overflow_at, train_to, fingerprint):
    small = recipe(precision="fp16")
    overflow_at({4, 5})
    whole = train_to(small, "full")
    norms = [line["grad_norm"] for line in whole.read_metrics()]
    assert [step for step, norm in enumerate(norms) if norm is None] == [4, 5]
    state = json.loads((list_checkpoints(whole.checkpoints)[-1] / "state.json").read_text())
    assert (state["step"], state["updates"]) == (12, 10)
    assert state["loss_scale"]["scale"] == 65536 / 4
    assert fingerprint(train_to(small, "stopped", 6)) == fingerprint(whole)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_skipped_steps_are_null_and_every_reader_accepts_them(recipe, here, capsys, overflow_at):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    overflow_at({1, 3})
    run_command.run(recipe(total_steps=4, precision="fp16", trackers=("tensorboard",)), None)
    directory = RunDirectory(Path("runs/small"))
    texts = directory.metrics.read_text().splitlines()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in texts]
    assert [line["grad_norm"] is None for line in lines] == [False, True, False, True]
    assert [line["loss"] is None for line in lines] == [False, True, False, True]
    assert "not finite" in capsys.readouterr().err

    page = write_report(directory.path).read_text()
    assert "2 steps skipped: float16 overflow" in page
    assert "not finite at 2 steps, first at step 2" in page
    assert comparison_page([directory.path, directory.path])

    runs_command.run(RunsConfig(json=True))
    (status,) = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert (status["state"], status["step"], status["loss"]) == ("finished", 4, None)
    assert status["validation_loss"] is not None

    (events,) = directory.path.rglob("events.out.tfevents.*")
    tracked = EventAccumulator(str(events.parent)).Reload()
    for name, known in (("grad_norm", [1, 3]), ("loss", [1, 3]), ("learning_rate", [1, 2, 3, 4])):
        curve = {event.step: event.value for event in tracked.Scalars(name)}
        assert curve == {step: pytest.approx(lines[step - 1][name], rel=1e-6) for step in known}
    evaluations = {line["step"]: line["loss"] for line in directory.read_events("evaluations")}
    curve = {event.step: event.value for event in tracked.Scalars("validation/loss")}
    assert curve == pytest.approx(evaluations, rel=1e-6)


def test_run_without_overflow_reports_none(recipe, train_to):
    directory = train_to(recipe(total_steps=4, precision="fp16"), "run")
    assert "null" not in directory.metrics.read_text()
    assert "float16 overflow" not in write_report(directory.path).read_text()


def test_both_definitions_of_mfu_are_logged_if_the_peak_is_known(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(log, "find_peak_flops", lambda device, precision: 1e9)
    directory = RunDirectory(tmp_path / "run")
    short = recipe(total_steps=2, warmup_steps=0, dropout=0.0, activation_checkpointing="block")
    model = train_recipe(short, directory).model
    for line in directory.read_metrics():
        speed = line["tokens_per_second"] / 1e9
        assert line["mfu"] == pytest.approx(speed * model.flops_per_token(), abs=1e-4)
        assert line["mfu_executed"] == pytest.approx(
            speed * model.executed_flops_per_token("block"), abs=1e-4
        )


def test_micro_batch_is_halved_until_it_fits(recipe, train_to, fingerprint, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(setup, "fits", lambda state, training: training.plan.micro_batch_size <= 10)
        halved = train_to(recipe(dropout=0.0), "halved")
    assert read_recipe_of(halved.path).batch.micro_batch_size == 8
    choices = json.loads(halved.environment.read_text())["choices"]
    assert choices["micro_batch_size"].startswith("8 (halved")
    asked = train_to(recipe(dropout=0.0, micro_batch_size=8), "asked")
    assert fingerprint(asked) == fingerprint(halved)


def test_nothing_is_written_if_no_row_fits(recipe, refusal, tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "fits", lambda state, training: False)
    assert "--activation-checkpointing" in refusal(recipe(), tmp_path / "none")


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_evaluation_samples_and_checkpoints_recompile_nothing(recipe, train_to):
    torch._dynamo.reset()
    counters.clear()
    often = {"evaluate_every_steps": 2, "sample_every_steps": 2}
    train_to(recipe(n_layer=1, compile=True, **often), "compiled")  # one layer compiles in half the time
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["recompile_limit"]
    torch.compile(lambda x: 2 * x, dynamic=False, fullgraph=True, backend="eager")(torch.ones(2))
    assert counters["stats"]["unique_graphs"] == 2, "the negative control: another shape is counted"
