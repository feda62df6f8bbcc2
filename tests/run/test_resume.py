"""A run that was stopped and resumed is, to the bit, the run that never was."""

from __future__ import annotations

import contextlib
import hashlib
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from overnight.recipe import Recipe
from overnight.run import train
from overnight.run_directory import RunDirectory
from overnight.runs import command as runs_command
from overnight.runs.status import describe_run
from overnight.training import OptimizerConfig
from overnight.training.checkpoint.load import VerifiedCheckpoint
from overnight.training.state import TrainState

CLOCK = {"milliseconds", "tokens_per_second", "mfu"}  # the only values that a repetition may change

Build = Callable[..., Recipe]


def fingerprint(directory: RunDirectory) -> tuple[str, list[dict[str, float]], list[dict[str, object]]]:
    """Hash of the newest weights and moments, every metrics line without its clock, every event."""
    newest = max(directory.checkpoints.iterdir())
    digest = hashlib.sha256()
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        digest.update((newest / name).read_bytes())
    lines = [
        {key: value for key, value in line.items() if key not in CLOCK} for line in directory.read_metrics()
    ]
    return digest.hexdigest(), lines, directory.read_events("evaluations") + directory.read_events("samples")


def max_time(monkeypatch: pytest.MonkeyPatch, steps: int | None) -> None:
    """Make the next call of `pretrain.run` see a signal once it has done `steps` more steps."""

    @contextlib.contextmanager
    def signalled() -> Iterator[Callable[[], bool]]:
        asked = iter(range(10**6))
        yield lambda: steps is not None and next(asked) >= steps

    monkeypatch.setattr(train, "stop_on_signal", signalled)


def one_signal(steps: int) -> Callable[[], contextlib.AbstractContextManager[Callable[[], bool]]]:
    """Stands for stop_on_signal: a signal comes after so many steps, and stays received."""

    @contextlib.contextmanager
    def signalled() -> Iterator[Callable[[], bool]]:
        asked = iter([False] * steps)
        yield lambda: next(asked, True)

    return signalled


def train_with_stops(
    recipe: Recipe, path: Path, stops: list[int], monkeypatch: pytest.MonkeyPatch
) -> RunDirectory:
    """Train to the end, stopping after each number of steps in `stops` on the way."""
    directory, begun = RunDirectory(path), False
    for steps in stops:
        max_time(monkeypatch, steps)
        with pytest.raises(KeyboardInterrupt):
            train.run(recipe, directory, resume=begun)
        recipe, begun = reread(directory), True
    max_time(monkeypatch, None)
    train.run(recipe, directory, resume=begun)
    return directory


def reread(directory: RunDirectory) -> Recipe:
    """The recipe as `overnight train --resume` reads it."""
    return train.from_toml(Recipe, directory.recipe.read_text(), "recipe.toml")


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, object]:
    """The fingerprint of the run without stops, computed by whichever test needs it first."""
    return {}


def expected(
    recipe: Build, undisturbed: dict[str, object], tmp_path: Path, patch: pytest.MonkeyPatch
) -> object:
    if "run" not in undisturbed:
        undisturbed["run"] = fingerprint(train_with_stops(recipe(), tmp_path / "full", [], patch))
    return undisturbed["run"]


@pytest.mark.parametrize("stop", range(12))
def test_stopping_after_any_step_changes_nothing(
    recipe: Build, undisturbed: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    whole = expected(recipe, undisturbed, tmp_path, monkeypatch)
    resumed = train_with_stops(recipe(), tmp_path / "run", [stop], monkeypatch)
    assert fingerprint(resumed) == whole
    assert [line["step"] for line in resumed.read_metrics()] == list(range(1, 13))


@pytest.mark.parametrize("schedule", range(6))
def test_stopping_several_times_changes_nothing(
    recipe: Build,
    undisturbed: dict[str, object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    schedule: int,
) -> None:
    whole = expected(recipe, undisturbed, tmp_path, monkeypatch)
    draw = random.Random(schedule)
    stops = [draw.randrange(4) for _ in range(3)]
    assert fingerprint(train_with_stops(recipe(), tmp_path / "run", stops, monkeypatch)) == whole


def test_the_run_crosses_epochs_and_shards(recipe: Build, tmp_path: Path) -> None:
    """The promises above are about something: the 12 steps hold several epochs of several shards."""
    from overnight.data.dataset import open_one_dataset

    dataset = open_one_dataset(recipe().data)
    stream = dataset.stream("train", 32, 1337)
    assert 4 * stream.rows_per_epoch < 12 * 96
    assert len(dataset.manifest.train) >= 3


def test_a_kill_between_checkpoints_repeats_the_lost_steps_exactly(
    recipe: Build, undisturbed: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No signal handler runs: metrics and events go on past the last checkpoint, and are rewound."""
    whole = expected(recipe, undisturbed, tmp_path, monkeypatch)
    directory = RunDirectory(tmp_path / "run")
    append, lines = RunDirectory.append_metrics, 0

    def killed(self: RunDirectory, line: dict[str, float]) -> None:
        nonlocal lines
        append(self, line)
        lines += 1
        if lines == 8:
            raise MemoryError("stands for a kill")

    max_time(monkeypatch, None)
    with monkeypatch.context() as patched:
        patched.setattr(RunDirectory, "append_metrics", killed)
        with pytest.raises(MemoryError):
            train.run(recipe(), directory)
    assert len(directory.read_metrics()) == 8
    train.run(reread(directory), directory, resume=True)
    assert fingerprint(directory) == whole


def test_what_was_switched_off_stays_off(
    recipe: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None has no word of its own in TOML, and these settings are on where nothing is said."""
    off = recipe(
        optimizer=OptimizerConfig(peak_learning_rate=1e-2, max_grad_norm=None),
        checkpoints=pretrain_section("CheckpointsConfig", checkpoint_every_steps=2, keep_checkpoints=None),
    )
    whole = train_with_stops(off, tmp_path / "full", [], monkeypatch)
    resumed = train_with_stops(off, tmp_path / "run", [5], monkeypatch)
    assert reread(resumed).optimizer.max_grad_norm is None
    assert len(list(resumed.checkpoints.iterdir())) == 7
    assert fingerprint(resumed) == fingerprint(whole)


def test_a_resumed_run_does_not_ask_again_for_the_model_it_started_from(
    recipe: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = train_with_stops(recipe(), tmp_path / "first", [], monkeypatch)
    tuned = recipe(init_from=str(first.path), run_name="tuned")
    directory = RunDirectory(tmp_path / "tuned")
    max_time(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        train.run(tuned, directory)
    shutil.rmtree(first.path)
    max_time(monkeypatch, None)
    train.run(reread(directory), directory, resume=True)
    assert directory.is_finished(12)


def test_the_comparison_sees_a_lost_optimizer(
    recipe: Build, undisturbed: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: resuming with fresh moments, as many scripts do, is noticed."""
    whole = expected(recipe, undisturbed, tmp_path, monkeypatch)
    restore = train.restore

    def weights_only(state: TrainState, opened: VerifiedCheckpoint) -> None:
        restore(state, opened)
        state.optimizer.state.clear()

    monkeypatch.setattr(train, "restore", weights_only)
    assert fingerprint(train_with_stops(recipe(), tmp_path / "run", [6], monkeypatch)) != whole


def test_evaluating_sampling_and_saving_never_change_the_training(
    recipe: Build, undisturbed: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = expected(recipe, undisturbed, tmp_path, monkeypatch)
    quiet = recipe(
        evaluation=pretrain_section("EvaluationConfig", evaluate_every_steps=None),
        samples=pretrain_section("SamplesConfig", sample_every_steps=None),
        checkpoints=pretrain_section("CheckpointsConfig", checkpoint_every_steps=None),
    )
    silent = fingerprint(train_with_stops(quiet, tmp_path / "run", [], monkeypatch))
    assert silent[:2] == whole[:2]  # type: ignore[index]
    assert silent[2] == []


def pretrain_section(name: str, **values: object) -> object:
    from overnight import recipe

    return getattr(recipe, name)(**values)


def test_a_loss_that_can_be_learnt_is_learnt(
    recipe: Build, undisturbed: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, lines, events = expected(recipe, undisturbed, tmp_path, monkeypatch)  # type: ignore[misc]
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    assert events[-1]["step"] == 12


def test_a_run_stops_by_the_clock_and_goes_on(
    recipe: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The clock moves ten minutes a glance: the time is over before the third step."""
    whole = fingerprint(train_with_stops(recipe(), tmp_path / "full", [], monkeypatch))
    directory, glances = RunDirectory(tmp_path / "small"), iter(range(0, 10**6, 600))
    checkpoints = pretrain_section("CheckpointsConfig", checkpoint_every_steps=3, max_time="25m")
    with monkeypatch.context() as patch:
        patch.setattr(train, "time", SimpleNamespace(monotonic=lambda: float(next(glances))))
        with pytest.raises(KeyboardInterrupt):
            train.run(recipe(checkpoints=checkpoints), directory)
    assert "stopped and saved after step 2 of 12" in capsys.readouterr().err
    stopped = describe_run(directory.path)
    assert (stopped.state, stopped.step, stopped.ended_by) == ("stopped", 2, "its time limit")
    train.run(reread(directory), directory, resume=True)
    assert fingerprint(directory) == whole
    assert (describe_run(directory.path).state, describe_run(directory.path).ended_by) == ("finished", None)


def test_runs_says_what_stopped_a_run(
    recipe: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = RunDirectory(tmp_path / "small")
    monkeypatch.setattr(train, "stop_on_signal", one_signal(2))
    with pytest.raises(KeyboardInterrupt):
        train.run(recipe(), directory)
    capsys.readouterr()
    runs_command.run(runs_command.RunsConfig(folder=str(directory.path)))
    said = capsys.readouterr().err
    assert f"{directory.path}: stopped by a signal\n" in said
    assert f"next: overnight train --resume {directory.path}\n" in said
    directory.ended.unlink()
    assert describe_run(directory.path).ended_by == "a kill, or a loss of power: nothing was noted"
    directory.ended.write_text("{")
    assert describe_run(directory.path).ended_by == "a kill, or a loss of power: nothing was noted"
