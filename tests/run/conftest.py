"""A small text, prepared once, and a small recipe over it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from overnight.data import DataConfig
from overnight.model.model_config import ModelConfig
from overnight.preparation.prepare import prepare
from overnight.preparation.prepare_config import PrepareConfig
from overnight.recipe import CheckpointsConfig, EvaluationConfig, Recipe, SamplesConfig
from overnight.run import setup, train
from overnight.run.setup import TrainSetup
from overnight.training import ComputeConfig, OptimizerConfig
from overnight.training.batch import BatchConfig
from overnight.training.schedule import ScheduleConfig
from overnight.training.step import Training

LINES = "".join(
    f"Line {number} of a small text about the number {number * 7 % 100}.\n" for number in range(60)
)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of shards: some 40 documents in characters, about 5,000 training tokens in several shards."""
    root = tmp_path_factory.mktemp("text")
    for number in range(40):
        (root / f"{number:02}.txt").write_text(LINES[number * 37 : number * 37 + 150])
    folder = root / "shards"
    prepare(
        PrepareConfig(
            source=str(root),
            out=str(folder),
            tokenizer="characters",
            validation_fraction=0.2,
            shard_tokens=1500,
        )
    )
    return folder


@pytest.fixture
def recipe(prepared: Path) -> Callable[..., Recipe]:
    """Builds a recipe of 12 steps, with dropout, accumulation and less than two steps to an epoch."""

    def build(**changes: object) -> Recipe:
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


@pytest.fixture
def overflow_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[set[int]], None]:
    """Lets the loss be infinite at some steps, counted from 0, as float16 makes it now and then."""
    build = setup.build_training

    def overflow_at(steps: set[int]) -> None:
        def build_overflowing(job: TrainSetup) -> Training:
            training = build(job)

            def loss(ids: Tensor, targets: Tensor) -> Tensor:
                nats = training.loss(ids, targets)
                return nats * float("inf") if job.state.step in steps else nats

            return dataclasses.replace(training, loss=loss)

        monkeypatch.setattr(train, "build_training", build_overflowing)

    return overflow_at
