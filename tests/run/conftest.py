"""A small text, prepared once, a small recipe over it, a finished run of it, and ways to disturb a run."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import shutil
import signal
from typing import Any

import pytest

from overnight.evaluation import EvaluateConfig
from overnight.evaluation import command as evaluation_command
from overnight.recipe import read_recipe_of, with_settings
from overnight.run import train
from overnight.run_directory import RunDirectory
from overnight.training.checkpoint.format import list_checkpoints

CLOCK = {"milliseconds", "tokens_per_second", "mfu", "mfu_executed"}  # all that a repetition may change


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, prepare_texts):
    """A folder of shards of about 5,000 training tokens, below the folder of its texts."""
    return prepare_texts(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def recipe(prepared, small_recipe):
    """`recipe(**changes)`: 12 steps, with dropout, accumulation and less than two steps to an epoch.

    Changes are settings by their flat names, or whole sections.
    """
    every = {"evaluate_every_steps": 4, "sample_every_steps": 5, "checkpoint_every_steps": 3}
    batch = {"tokens_per_step": 96 * 32, "micro_batch_size": 32}
    small = small_recipe(prepared, peak_learning_rate=1e-2, **batch, **every)

    def build(**changes):
        sections = {name: value for name, value in changes.items() if dataclasses.is_dataclass(value)}
        settings = {name: value for name, value in changes.items() if name not in sections}
        return with_settings(dataclasses.replace(small, **sections), **settings)

    return build


@pytest.fixture(scope="session")
def finished_run(recipe, tmp_path_factory):
    """`recipe()` trained to its end without interruption. Do not change it; see `copied_run`."""
    directory = RunDirectory(tmp_path_factory.mktemp("finished") / "run")
    train.train_recipe(recipe(), directory)
    return directory


@pytest.fixture
def copied_run(finished_run, tmp_path):
    """A copy of the finished run in tmp_path/run."""
    return RunDirectory(shutil.copytree(finished_run.path, tmp_path / "run"))


@pytest.fixture(scope="session")
def metrics_of():
    """Every metrics line of a run, without times and speeds."""

    def read(directory):
        return [
            {key: value for key, value in line.items() if key not in CLOCK}
            for line in directory.read_metrics()
        ]

    return read


@pytest.fixture(scope="session")
def fingerprint(metrics_of):
    """(digest of the newest checkpoint, metrics, events) of a run: the same for runs equal to the bit."""

    def compute(directory):
        newest, digest = list_checkpoints(directory.checkpoints)[-1], hashlib.sha256()
        for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
            digest.update((newest / name).read_bytes())
        events = [event for kind in ("evaluations", "samples") for event in directory.read_events(kind)]
        return digest.hexdigest(), metrics_of(directory), events

    return compute


@pytest.fixture
def train_until(monkeypatch, tmp_path):
    """`train_until(steps, recipe, name)` trains in tmp_path/name; SIGTERM comes after that many steps."""
    must_stop = train.must_stop

    def run(steps, recipe, name, **how):
        directory, asked = RunDirectory(tmp_path / name), itertools.count()  # before every step

        def signalled(*given):
            if next(asked) == steps:
                signal.raise_signal(signal.SIGTERM)
            return must_stop(*given)

        with monkeypatch.context() as patch:
            patch.setattr(train, "must_stop", signalled)
            with pytest.raises(KeyboardInterrupt):
                train.train_recipe(recipe, directory, **how)
        return directory

    return run


@pytest.fixture
def resume():
    """`resume(directory, **settings)` trains a run to its end, with these settings changed."""

    def run(directory, **settings):
        recipe = with_settings(read_recipe_of(directory.path), **settings)
        return train.train_recipe(recipe, directory, resume=True)

    return run


@pytest.fixture
def train_to(train_until, resume, tmp_path):
    """`train_to(recipe, name, *stops)` trains in tmp_path/name to the end, stopped and resumed on the way."""

    def run(recipe, name, *stops):
        directory = RunDirectory(tmp_path / name)
        for number, steps in enumerate(stops):
            train_until(steps, recipe, name, resume=number > 0)
            recipe = read_recipe_of(directory.path)
        train.train_recipe(recipe, directory, resume=bool(stops))
        return directory

    return run


@pytest.fixture
def kill_at(monkeypatch):
    """`kill_at(step, work, *given)`: the run in it breaks off after that step, and no handler is called."""
    append = RunDirectory.append_metrics

    def kill_at(step, work, *given):
        def killed(self, line):
            append(self, line)
            if line["step"] == step:
                raise MemoryError("stands for a kill")

        with monkeypatch.context() as patch:
            patch.setattr(RunDirectory, "append_metrics", killed)
            with pytest.raises(MemoryError):
                work(*given)

    return kill_at


@pytest.fixture
def evaluate(capsys):
    """`evaluate(model, **settings)`: the JSON of `overnight evaluate`, strictly parsed."""

    def evaluate(model, **settings):
        capsys.readouterr()
        evaluation_command.run(EvaluateConfig(model=str(model), device="cpu", json=True, **settings))
        return json.loads(capsys.readouterr().out, parse_constant=pytest.fail)

    return evaluate


@pytest.fixture(scope="session")
def refusal():
    """`refusal(recipe, path, resume=...)`: the sentence that refuses it before anything is written."""

    def files(path):
        found = (file for file in path.rglob("*") if file.is_file() and file.name != ".lock")
        return {file: file.read_bytes() for file in found}

    def refuse(recipe, path, *, resume=False):
        before = path.exists(), files(path)
        with pytest.raises(ValueError, match=".") as error:
            train.train_recipe(recipe, RunDirectory(path), resume=resume)
        assert "\n" not in str(error.value)
        assert (path.exists(), files(path)) == before
        return str(error.value)

    return refuse


@pytest.fixture
def overflow_at(monkeypatch):
    """Makes the loss infinite at some steps, counted from 0, as float16 does now and then."""
    train_step = train.train_step

    def overflow_at(steps):
        def step(state, setup):
            def infinite(ids, targets):
                return setup.loss(ids, targets) * float("inf")

            loss: Any = infinite if state.step in steps else setup.loss
            return train_step(state, dataclasses.replace(setup, loss=loss))

        monkeypatch.setattr(train, "train_step", step)

    return overflow_at
