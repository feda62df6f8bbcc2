"""A run whose steps grow is as exact: stopped in its ramp or divided otherwise, it reads the same rows."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import accumulate
from pathlib import Path

import pytest

from overnight.config import from_toml
from overnight.data.loader import Batch, TokenStream
from overnight.model.model_config import ModelConfig
from overnight.recipe import Recipe
from overnight.run import log
from overnight.run import train as train_module
from overnight.run_directory import RunDirectory
from overnight.training.batch import BatchConfig, BatchPlan, constant_plan
from overnight.training.schedule import ScheduleConfig

CLOCK = {"milliseconds", "tokens_per_second", "mfu", "mfu_executed"}
RAMP = BatchConfig(
    tokens_per_step=32 * 32, batch_ramp_start_tokens=8 * 32, batch_ramp_tokens=3072, micro_batch_size=4
)
ROWS_OF_STEPS = [
    8,
    8,
    8,
    8,
    16,
    16,
    24,
    24,
    32,
    32,
]  # a third of 3,072 tokens in each of the first three sizes

Build = Callable[..., Recipe]


@pytest.fixture
def ramped(recipe: Build) -> Recipe:
    """Ten steps of growing size, with dropout, that end past the ramp."""
    schedule = ScheduleConfig(total_tokens=32 * sum(ROWS_OF_STEPS), warmup_steps=2, learning_rate_decay="wsd")
    return recipe(batch=RAMP, schedule=schedule)


def train(recipe: Recipe, path: Path, patch: pytest.MonkeyPatch, stop: int | None = None) -> RunDirectory:
    """Train, or go on training, until the end, or until a signal after `stop` more steps."""

    @contextlib.contextmanager
    def signalled() -> Iterator[Callable[[], bool]]:
        asked = iter(range(10**6))
        yield lambda: stop is not None and next(asked) >= stop

    directory = RunDirectory(path)
    resume = directory.exists()
    patch.setattr(train_module, "stop_on_signal", signalled)
    with pytest.raises(KeyboardInterrupt) if stop is not None else contextlib.nullcontext():
        train_module.run(recipe, directory, resume=resume)
    return directory


def reread(directory: RunDirectory) -> Recipe:
    """The recipe as `overnight train --resume` reads it."""
    return from_toml(Recipe, directory.recipe.read_text(), "recipe.toml")


def lines(directory: RunDirectory) -> list[dict[str, float]]:
    return [
        {key: value for key, value in line.items() if key not in CLOCK} for line in directory.read_metrics()
    ]


def fingerprint(directory: RunDirectory) -> tuple[str, object, object]:
    """Hash of the last weights and moments, every metrics line without its clock, every evaluation."""
    newest = max(directory.checkpoints.iterdir())
    digest = hashlib.sha256()
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        digest.update((newest / name).read_bytes())
    return digest.hexdigest(), lines(directory), directory.read_events("evaluations")


def test_a_run_stopped_inside_its_ramp_is_the_run_that_never_was(
    ramped: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fingerprint(train(ramped, tmp_path / "full", monkeypatch))
    for stop in (3, 4, 5, 8):  # within a size, between two, within the next, at the ramp's end
        directory = train(ramped, tmp_path / f"run-{stop}", monkeypatch, stop)
        assert len(directory.read_metrics()) == stop
        assert fingerprint(train(reread(directory), directory.path, monkeypatch)) == whole


def test_a_resumed_run_that_forgot_its_ramp_would_be_noticed(
    ramped: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control of the test above."""
    whole = fingerprint(train(ramped, tmp_path / "full", monkeypatch))
    directory = train(ramped, tmp_path / "run", monkeypatch, 5)

    def forgetful(config: BatchConfig, tokens_per_row: int, rows_that_fit: int, processes: int) -> BatchPlan:
        return constant_plan(tokens_per_row, 4, 8)

    monkeypatch.setattr("overnight.run.setup.plan_batches", forgetful)
    assert fingerprint(train(reread(directory), directory.path, monkeypatch)) != whole


def test_every_line_and_event_counts_the_tokens_of_the_steps_that_were_done(
    ramped: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = train(ramped, tmp_path / "run", monkeypatch)
    choices = json.loads(directory.environment.read_text())["choices"]
    assert choices["micro_batch_size"] == "4 (as asked), 2 to 8 micro-batches a step"
    seen = [32 * rows for rows in accumulate(ROWS_OF_STEPS)]
    assert [line["tokens"] for line in directory.read_metrics()] == seen
    events = directory.read_events("evaluations") + directory.read_events("samples")
    assert len(events) > 4
    assert all(event["tokens"] == [0, *seen][event["step"]] for event in events)


def test_the_learning_rate_of_a_ramp_follows_the_tokens(
    ramped: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 full steps of 32 rows to the peak, and the last 2 of the run's 5.5 from there to a tenth."""
    rates = [line["learning_rate"] / 1e-2 for line in lines(train(ramped, tmp_path / "run", monkeypatch))]
    full_steps = [Fraction(rows, 32) for rows in accumulate(ROWS_OF_STEPS)]
    warm_up, falling = full_steps[:6], full_steps[8:]
    assert rates[:6] == pytest.approx([float(seen / 2) for seen in warm_up])
    assert rates[6:8] == [1.0, 1.0]
    left = [float((Fraction("5.5") - (seen - 1)) / 2) for seen in falling]
    assert rates[8:] == pytest.approx([0.1 + 0.9 * min(1.0, share) for share in left])


def test_a_ramp_too_short_for_its_schedule_is_refused_before_any_work(ramped: Recipe, tmp_path: Path) -> None:
    long = dataclasses.replace(ramped, schedule=dataclasses.replace(ramped.schedule, warmup_steps=6))
    with pytest.raises(ValueError, match=r"warmup_steps=6 is longer than total_steps=10 \(5\.5 full steps\)"):
        train_module.run(long, RunDirectory(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("done", [0, 5])
def test_the_bar_of_a_ramp_moves_with_the_tokens(
    ramped: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: int
) -> None:
    """All tokens take as long, so the time left that follows from them is right from the first step on."""
    directory = train(ramped, tmp_path / "run", monkeypatch, done) if done else RunDirectory(tmp_path / "run")
    moved: list[tuple[float, str]] = []

    @contextlib.contextmanager
    def bar(title: str, total: float) -> Iterator[Callable[[float, str], None]]:
        moved.append((total, title))
        yield lambda amount, note: moved.append((amount, note))

    monkeypatch.setattr(log, "progress", bar)
    train(reread(directory) if done else ramped, directory.path, monkeypatch)
    (total, _), *advances = moved
    assert [amount for amount, _ in advances] == [32 * rows for rows in ROWS_OF_STEPS[done:]]
    assert sum(amount for amount, _ in advances) == total
    assert advances[-1][1].startswith("step 10  loss ")


@pytest.mark.parametrize("rows_at_once", [2, 8])
def test_a_run_resumed_with_another_micro_batch_reads_the_same_rows(
    ramped: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows_at_once: int
) -> None:
    ramped = dataclasses.replace(
        ramped, model=ModelConfig(n_layer=2, n_head=2, n_embd=16, context_length=32)
    )  # without dropout, whose noise belongs to the micro-batch
    read: list[int] = []
    batch = TokenStream.batch

    def noted(self: TokenStream, first_row: int, rows: int) -> Batch:
        read.extend(range(first_row, first_row + rows))
        return batch(self, first_row, rows)

    monkeypatch.setattr(TokenStream, "batch", noted)
    whole = lines(train(ramped, tmp_path / "full", monkeypatch))
    order = list(range(sum(ROWS_OF_STEPS)))
    assert read == order
    read.clear()
    directory = train(ramped, tmp_path / "run", monkeypatch, 5)
    again = reread(directory)
    again = dataclasses.replace(again, batch=dataclasses.replace(again.batch, micro_batch_size=rows_at_once))
    divided = lines(train(again, directory.path, monkeypatch))
    assert read == order
    for one, other in zip(whole, divided, strict=True):
        assert other == {**one, "loss": pytest.approx(one["loss"], abs=1e-5), "grad_norm": other["grad_norm"]}
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)


def test_another_ramp_is_another_run(ramped: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = train(ramped, tmp_path / "run", monkeypatch, 2)
    again = reread(directory)
    other = dataclasses.replace(again, batch=dataclasses.replace(again.batch, batch_ramp_tokens=4096))
    with pytest.raises(ValueError, match=r"another recipe: batch_ramp_tokens=4096 \(was 3072\)"):
        train_module.run(other, directory, resume=True)


def test_a_ramp_that_cannot_be_is_refused_before_any_work(recipe: Build, tmp_path: Path) -> None:
    half = recipe(batch=dataclasses.replace(RAMP, batch_ramp_tokens=None))
    with pytest.raises(ValueError, match="give both of batch_ramp_start_tokens and batch_ramp_tokens"):
        train_module.run(half, RunDirectory(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
