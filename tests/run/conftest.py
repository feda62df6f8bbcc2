"""A small text, prepared once, a small recipe over it, a finished run of it, and ways to disturb a run."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import shutil
import signal
from typing import Any

import pytest

from overnight.data import DataConfig
from overnight.model.model_config import ModelConfig
from overnight.preparation.prepare import prepare_shards
from overnight.preparation.prepare_config import PrepareConfig
from overnight.recipe import CheckpointsConfig, EvaluationConfig, Recipe, SamplesConfig, read_recipe_of
from overnight.run import train
from overnight.run_directory import RunDirectory
from overnight.training import ComputeConfig, OptimizerConfig
from overnight.training.batch import BatchConfig
from overnight.training.checkpoint.format import list_checkpoints
from overnight.training.schedule import ScheduleConfig

LINES = "".join(
    f"Line {number} of a small text about the number {number * 7 % 100}.\n" for number in range(60)
)
CLOCK = {"milliseconds", "tokens_per_second", "mfu", "mfu_executed"}  # all that a repetition may change


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A folder of shards: some 40 documents in characters, about 5,000 training tokens in several shards."""
    root = tmp_path_factory.mktemp("text")
    for number in range(40):
        (root / f"{number:02}.txt").write_text(LINES[number * 37 : number * 37 + 150])
    folder = root / "shards"
    prepare_shards(
        PrepareConfig(
            source=str(root),
            out=str(folder),
            tokenizer="characters",
            validation_fraction=0.2,
            shard_tokens=1500,
        )
    )
    return folder


@pytest.fixture(scope="session")
def recipe(prepared):
    """Builds a recipe of 12 steps, with dropout, accumulation and less than two steps to an epoch."""

    def build(**changes):
        small = Recipe(
            run_name="small",
            data=DataConfig(data=str(prepared)),
            model=ModelConfig(n_layer=2, n_head=2, n_embd=16, context_length=32, dropout=0.1),
            optimizer=OptimizerConfig(peak_learning_rate=1e-2),
            schedule=ScheduleConfig(total_steps=12, warmup_steps=3),
            batch=BatchConfig(tokens_per_step=96 * 32, micro_batch_size=32),
            compute=ComputeConfig(device="cpu", precision="fp32", compile=False),
            evaluation=EvaluationConfig(evaluate_every_steps=4),
            samples=SamplesConfig(sample_every_steps=5, sample_tokens=8),
            checkpoints=CheckpointsConfig(checkpoint_every_steps=3),
        )
        return dataclasses.replace(small, **changes)

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
def stop_after(monkeypatch):
    """`stop_after(steps)`: the next run gets SIGTERM once it has done that many steps, and not again."""
    must_stop = train.must_stop

    def stop_after(steps):
        asked = itertools.count()  # before every step

        def signalled(*given):
            if next(asked) == steps:
                signal.raise_signal(signal.SIGTERM)
            return must_stop(*given)

        monkeypatch.setattr(train, "must_stop", signalled)

    return stop_after


@pytest.fixture
def train_to(stop_after, tmp_path):
    """`train_to(recipe, name, *stops)` trains in tmp_path/name to the end, stopped and resumed on the way."""

    def run(recipe, name, *stops):
        directory = RunDirectory(tmp_path / name)
        for number, steps in enumerate(stops):
            stop_after(steps)
            with pytest.raises(KeyboardInterrupt):
                train.train_recipe(recipe, directory, resume=number > 0)
            recipe = read_recipe_of(directory.path)
        train.train_recipe(recipe, directory, resume=bool(stops))
        return directory

    return run


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
