"""A run that was stopped and resumed equals, to the bit, the run that was never stopped."""

from __future__ import annotations

import random
import shutil
import signal
from types import SimpleNamespace

import pytest

from overnight.data import DataConfig, MixtureSource
from overnight.data.dataset import open_one_dataset
from overnight.recipe import load_recipe, read_recipe_of, with_settings
from overnight.run import resume as resume_module
from overnight.run import train as train_module
from overnight.run.resume import load_resumed
from overnight.run.train import STOP_SIGNALS, StopConditions, train_recipe
from overnight.run_directory import RunDirectory
from overnight.runs import command as runs_command
from overnight.runs.status import describe_run

DRAWN = [[random.Random(number).randrange(4) for _ in range(3)] for number in range(6)]


@pytest.mark.parametrize("stops", [*([step] for step in range(12)), *DRAWN], ids=str)
def test_stopping_and_resuming_changes_nothing(recipe, finished_run, fingerprint, train_to, stops):
    resumed = train_to(recipe(), "run", *stops)
    assert fingerprint(resumed) == fingerprint(finished_run)
    assert [line["step"] for line in resumed.read_metrics()] == list(range(1, 13))


def test_the_run_crosses_epochs_and_shards_and_learns(recipe, finished_run):
    """What the comparisons above are about."""
    dataset = open_one_dataset(recipe().data)
    assert 4 * dataset.stream("train", 32, 1337).rows_per_epoch < 12 * 96
    assert len(dataset.manifest.train) >= 3
    lines = finished_run.read_metrics()
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    assert finished_run.read_events("evaluations")[-1]["step"] == 12


def test_comparison_detects_lost_moments(recipe, finished_run, fingerprint, train_to, monkeypatch):
    """The negative control: resuming with fresh moments is noticed."""
    restore = resume_module.restore

    def weights_only(state, opened):
        restore(state, opened)
        state.optimizer.state.clear()

    monkeypatch.setattr(resume_module, "restore", weights_only)
    resumed = train_to(recipe(), "run", 6)
    assert fingerprint(resumed) != fingerprint(finished_run)


def test_killed_run_repeats_lost_steps_exactly(recipe, finished_run, fingerprint, kill_at, resume, tmp_path):
    """Metrics and events beyond the last checkpoint are rewound."""
    directory = RunDirectory(tmp_path / "run")
    kill_at(8, train_recipe, recipe(), directory)
    assert len(directory.read_metrics()) == 8
    resume(directory)
    assert fingerprint(directory) == fingerprint(finished_run)


def test_settings_that_are_off_stay_off(recipe, fingerprint, train_to):
    """TOML has no null, and these settings are on by default."""
    off = recipe(max_grad_norm=None, checkpoint_every_steps=2, keep_checkpoints=None)
    whole = train_to(off, "full")
    resumed = train_to(off, "run", 5)
    assert read_recipe_of(resumed.path).optimizer.max_grad_norm is None
    assert len(list(resumed.checkpoints.iterdir())) == 7
    assert fingerprint(resumed) == fingerprint(whole)


def test_resumed_run_does_not_need_its_initial_model(recipe, copied_run, train_until, resume):
    tuned = recipe(init_from=str(copied_run.path), run_name="tuned")
    directory = train_until(3, tuned, "tuned")
    shutil.rmtree(copied_run.path)
    resume(directory)
    assert directory.is_finished(12)


def test_evaluation_and_checkpoints_do_not_change_training(recipe, finished_run, fingerprint, train_to):
    never = {f"{what}_every_steps": None for what in ("evaluate", "sample", "checkpoint")}
    weights, metrics, events = fingerprint(train_to(recipe(**never), "run"))
    assert (weights, metrics) == fingerprint(finished_run)[:2]
    assert events == []


def test_max_time_stops_the_run_and_it_resumes(
    recipe, finished_run, fingerprint, resume, tmp_path, monkeypatch
):
    """The clock moves ten minutes at each reading: the time is over before the third step."""
    directory, readings = RunDirectory(tmp_path / "small"), iter(range(0, 10**6, 600))
    with monkeypatch.context() as patch:
        clock = SimpleNamespace(monotonic=lambda: float(next(readings)))
        patch.setattr(train_module, "time", clock)
        with pytest.raises(KeyboardInterrupt):
            train_recipe(with_settings(recipe(), max_time="25m"), directory)
    stopped = describe_run(directory.path)
    assert (stopped.state, stopped.step, stopped.ended_by) == ("stopped", 2, "its time limit")
    resume(directory)
    assert fingerprint(directory) == fingerprint(finished_run)
    finished = describe_run(directory.path)
    assert (finished.state, finished.ended_by) == ("finished", None)


def test_runs_tells_what_stopped_a_run(recipe, train_until, capsys):
    directory = train_until(2, recipe(), "small")
    assert describe_run(directory.path).ended_by == "a signal"
    capsys.readouterr()
    runs_command.run(runs_command.RunsConfig(folder=str(directory.path)))
    assert f"overnight train --resume {directory.path}\n" in capsys.readouterr().err
    directory.ended.write_text("{")
    assert describe_run(directory.path).state == "damaged"
    directory.record.unlink()
    assert "kill" in describe_run(directory.path).ended_by


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_first_signal_asks_and_the_second_interrupts(number):
    before = signal.getsignal(number)
    with StopConditions(None) as stop:
        assert not stop.is_met()
        signal.raise_signal(number)
        assert stop.is_met()
        assert stop.reason == "a signal"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) is before


def test_launched_process_may_get_a_signal_twice(monkeypatch):
    """Once from its sender and once from the launcher."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2" if "WORLD_SIZE" in name else "0")
    with StopConditions(None) as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.is_met()


@pytest.mark.parametrize("is_mixed", [False, True])
def test_relative_paths_are_those_of_where_a_run_was_begun(
    recipe, prepared, prepare_texts, train_until, evaluate, monkeypatch, tmp_path, is_mixed
):
    """Another text of the same name in the working directory is not taken for the run's."""
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(prepared, first / "shards")
    second.mkdir()
    prepare_texts(second, [f"{number} lines about the text\n" * 9 for number in range(20)])
    mixture = (MixtureSource(path="shards", weight=1.0),) if is_mixed else ()
    data = DataConfig(data="" if is_mixed else "shards", mixture=mixture)
    monkeypatch.chdir(first)
    directory = train_until(6, recipe(data=data), "run")
    here = evaluate(directory.path)
    monkeypatch.chdir(second)
    assert evaluate(directory.path)["loss"] == here["loss"]
    again = load_recipe(str(directory.recipe))
    assert again.data == read_recipe_of(directory.path).data != data
    train_recipe(with_settings(load_resumed(directory.path), total_steps=8), directory, resume=True)
    assert directory.read_metrics()[-1]["step"] == 8
    # The negative control: without a record of where it was begun, the text here is found, and refused.
    copy = RunDirectory(shutil.copytree(directory.path, tmp_path / "copy"))
    copy.environment.write_text("{}")
    copy.recipe.write_text(copy.recipe.read_text().replace(f"{first}/", ""))
    with pytest.raises(ValueError, match="the data in shards is not the data that"):
        evaluate(copy.path)
    (first / "shards").rename(first / "moved")
    with pytest.raises(ValueError, match=f"{first}/shards"):
        evaluate(directory.path)


def test_project_that_was_copied_reads_its_own_data(recipe, prepared, train_until, monkeypatch, tmp_path):
    """From anywhere; a copied run without its project still finds the data it was trained on."""
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(prepared, old / "shards")
    monkeypatch.chdir(old)
    train_until(2, recipe(data=DataConfig(data="shards")), old / "runs" / "small")
    shutil.copytree(old, new)
    monkeypatch.chdir(tmp_path)
    assert read_recipe_of(new / "runs" / "small").data.data == str(new / "shards")
    shutil.rmtree(new / "shards")
    assert read_recipe_of(new / "runs" / "small").data.data == str(old / "shards")


def test_project_that_was_moved_is_evaluated_where_it_is(
    recipe, prepared, train_until, evaluate, monkeypatch, tmp_path
):
    shutil.copytree(prepared, tmp_path / "old" / "shards")
    monkeypatch.chdir(tmp_path / "old")
    directory = train_until(2, recipe(data=DataConfig(data="shards")), "run")
    monkeypatch.chdir((tmp_path / "old").rename(tmp_path / "new"))
    assert read_recipe_of(directory.path).data.data == "shards"
    assert evaluate(directory.path)["loss"] > 0
