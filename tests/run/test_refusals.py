"""What can't be trained is refused before any work, in one plain sentence, with nothing half-written."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from overnight.data import DataConfig
from overnight.distributed.world import SINGLE_PROCESS
from overnight.model.model_config import ModelConfig
from overnight.recipe import CheckpointsConfig, Recipe, SamplesConfig
from overnight.run import setup, train
from overnight.run.command import load_resumed
from overnight.run_directory import RunDirectory
from overnight.training.batch import BatchConfig
from overnight.training.schedule import ScheduleConfig

Build = Callable[..., Recipe]


def refusal(recipe: Recipe, path: Path, *, resume: bool = False) -> str:
    """The sentence with which `recipe` is refused."""
    with pytest.raises(ValueError, match=".") as error:
        train.run(recipe, RunDirectory(path), resume=resume)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_all_problems_of_a_recipe_are_told_at_once(recipe: Build, tmp_path: Path) -> None:
    wrong = recipe(
        model=ModelConfig(n_layer=2, n_head=3, n_embd=16, context_length=32),
        schedule=ScheduleConfig(total_steps=5, total_tokens=7),
    )
    said = refusal(wrong, tmp_path / "run")
    assert "n_head=3" in said
    assert "only one of total_steps and total_tokens" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"batch": BatchConfig(tokens_per_step=100)}, "tokens_per_step=100"),
        ({"batch": BatchConfig(tokens_per_step=96, micro_batch_size=2)}, "micro_batch_size=2"),
        ({"model": ModelConfig(n_layer=1, n_head=1, n_embd=8, context_length=10**6)}, "context"),
        ({"model": ModelConfig(n_layer=1, n_head=1, n_embd=8, vocab_size=7)}, "vocab_size=7 contradicts"),
        ({"run_name": "../elsewhere"}, "run_name"),
        ({"seed": -1}, "seed=-1"),
        ({"samples": SamplesConfig(sample_prompts=("x" * 99,))}, "sample prompt"),
        ({"data": DataConfig(data="no-such-source")}, "no-such-source"),
        ({"trackers": ("wandbb",)}, "wandb"),
        ({"init_from": "no/such/model/here"}, "no/such/model/here"),
    ],
)
def test_a_run_that_cannot_be_is_refused(
    recipe: Build, tmp_path: Path, changes: dict[str, object], complaint: str
) -> None:
    if "model" in changes and "batch" not in changes:
        changes["batch"] = BatchConfig(tokens_per_step=changes["model"].context_length)  # type: ignore[attr-defined]
    assert complaint in refusal(recipe(**changes), tmp_path / "run")
    assert not RunDirectory(tmp_path / "run").exists()


def test_a_folder_that_holds_a_run_is_not_overwritten(recipe: Build, tmp_path: Path) -> None:
    train.run(recipe(), RunDirectory(tmp_path / "run"))
    assert "--resume" in refusal(recipe(), tmp_path / "run")
    again = train.from_toml(Recipe, (tmp_path / "run" / "recipe.toml").read_text(), "recipe.toml")
    other = dataclasses.replace(again, model=dataclasses.replace(again.model, n_embd=32))
    said = refusal(other, tmp_path / "run", resume=True)
    assert "belongs to another recipe: n_embd=32 (was 16)" in said


def test_sizes_that_contradict_the_model_started_from_are_refused(recipe: Build, tmp_path: Path) -> None:
    train.run(recipe(), RunDirectory(tmp_path / "run"))
    sizes = ModelConfig(n_layer=3, n_head=2, n_embd=16, context_length=32)
    other = recipe(init_from=str(tmp_path / "run"), model=sizes)
    assert "n_layer=3 contradicts" in refusal(other, tmp_path / "other")


def test_a_run_cannot_be_made_shorter_than_it_is(recipe: Build, tmp_path: Path) -> None:
    train.run(recipe(), RunDirectory(tmp_path / "run"))
    again = train.from_toml(Recipe, (tmp_path / "run" / "recipe.toml").read_text(), "recipe.toml")
    shorter = dataclasses.replace(again, schedule=dataclasses.replace(again.schedule, total_steps=5))
    assert "total_steps=5 is fewer than the 12 steps" in refusal(shorter, tmp_path / "run", resume=True)
    assert RunDirectory(tmp_path / "run").is_finished(12)


def test_there_must_be_a_run_to_resume(recipe: Build, tmp_path: Path) -> None:
    assert "no run" in refusal(recipe(), tmp_path / "run", resume=True)


def test_other_data_is_refused_on_resuming(recipe: Build, tmp_path: Path, prepared: Path) -> None:
    path = tmp_path / "run"
    train.run(recipe(), RunDirectory(path))
    data = path / "data.json"
    data.write_text(data.read_text().replace('"source": "', '"source": "another '))
    again = train.from_toml(Recipe, (path / "recipe.toml").read_text(), "recipe.toml")
    assert "is not what" in refusal(again, path, resume=True)


def test_a_full_disk_is_told_before_the_first_step(
    recipe: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(train.shutil, "disk_usage", lambda path: full)
    said = refusal(recipe(checkpoints=CheckpointsConfig(keep_checkpoints=3)), tmp_path / "run")
    assert "free" in said
    assert "--keep-checkpoints" in said


def test_too_little_memory_is_told_before_the_model_is_built(
    recipe: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "find_memory_bytes", lambda device: 100_000)
    said = refusal(recipe(), tmp_path / "run")
    assert "GB of memory, and cpu has" in said
    assert "choose a smaller model" in said
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(setup, "find_memory_bytes", lambda device: 1_000_000)
    train.run(recipe(), RunDirectory(tmp_path / "run"))


def test_the_copy_that_a_thread_saves_from_must_fit_as_well(
    recipe: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU: 16 bytes of each weight are held all the time, and 12 more while a checkpoint is written."""
    parameters = train.build_job(
        recipe(), SINGLE_PROCESS, has_checkpoint=False
    ).recipe.model.parameter_count()
    monkeypatch.setattr(setup, "find_memory_bytes", lambda device: 22 * parameters)
    said = refusal(recipe(), tmp_path / "run")
    assert "a copy while a checkpoint is written" in said
    assert "choose --no-async-checkpoint" in said
    waits = recipe(checkpoints=CheckpointsConfig(async_checkpoint=False))
    train.run(waits, RunDirectory(tmp_path / "run"))


def test_a_run_that_has_lost_its_checkpoints_does_not_begin_anew(recipe: Build, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    train.run(recipe(checkpoints=CheckpointsConfig(checkpoint_every_steps=4)), run)
    assert load_resumed(run.path).schedule.total_steps == 12
    shutil.rmtree(run.checkpoints)
    with pytest.raises(ValueError, match=r"checkpoints holds no checkpoint, and 12 steps are done: bring it"):
        load_resumed(run.path)
    run.metrics.write_text("".join(run.metrics.read_text().splitlines(keepends=True)[:4]))
    load_resumed(run.path)  # killed before its first checkpoint, as far as one can tell


def test_shards_without_their_manifest_are_no_text(recipe: Build, tmp_path: Path, prepared: Path) -> None:
    shutil.copytree(prepared, copy := tmp_path / "shards")
    (copy / "manifest.json").unlink()
    said = refusal(recipe(data=DataConfig(data=str(copy))), tmp_path / "run")
    assert "shards and no manifest.json" in said
    assert "prepare the text again" in said
    for path in copy.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (copy / "model.bin").write_bytes(b"no shard")
    (copy / "notes.txt").write_text("Something is told. " * 400)
    assert "shards" not in refusal(recipe(data=DataConfig(data=str(copy))), tmp_path / "run").split(": ")[0]


def test_damaged_shards_are_refused(recipe: Build, tmp_path: Path, prepared: Path) -> None:
    copy = tmp_path / "shards"
    shutil.copytree(prepared, copy)
    shard = copy / "train-00001.bin"
    damaged = bytearray(shard.read_bytes())
    damaged[-1] ^= 1
    shard.write_bytes(damaged)
    assert "train-00001.bin" in refusal(recipe(data=DataConfig(data=str(copy))), tmp_path / "run")


def test_another_tokenizer_is_refused(recipe: Build, tmp_path: Path, prepared: Path) -> None:
    from overnight.tokenizer.open_tokenizer import build_tokenizer

    copy = tmp_path / "shards"
    shutil.copytree(prepared, copy)
    shutil.rmtree(copy / "tokenizer")
    build_tokenizer("characters", ["quite another text"]).save(copy / "tokenizer")
    assert "tokenizer" in refusal(recipe(data=DataConfig(data=str(copy))), tmp_path / "run")
