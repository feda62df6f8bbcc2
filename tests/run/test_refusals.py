"""What can't be trained is refused before any work, in one sentence, with nothing half-written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from overnight.recipe import Recipe, read_recipe_of, with_settings
from overnight.run import preflight, setup
from overnight.run.resume import load_resumed
from overnight.run.train import train_recipe
from overnight.run_directory import RunDirectory
from overnight.tokenizer.open_tokenizer import build_tokenizer


def refusal(recipe: Recipe, path: Path, *, resume: bool = False) -> str:
    """The sentence with which `recipe` is refused."""
    with pytest.raises(ValueError, match=".") as error:
        train_recipe(recipe, RunDirectory(path), resume=resume)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"tokens_per_step": 100}, ["tokens_per_step=100"]),
        ({"tokens_per_step": 96, "micro_batch_size": 2}, ["micro_batch_size=2"]),
        ({"context_length": 10**6, "tokens_per_step": 10**6, "micro_batch_size": None}, ["context"]),
        ({"vocab_size": 7}, ["vocab_size=7"]),
        ({"run_name": "../elsewhere"}, ["run_name"]),
        ({"seed": -1}, ["seed=-1"]),
        ({"sample_prompts": ("x" * 99,)}, ["sample prompt"]),
        ({"data": "no-such-source"}, ["no-such-source"]),
        ({"trackers": ("wandbb",)}, ["wandb"]),
        ({"init_from": "no/such/model/here"}, ["no/such/model/here"]),
        ({"n_head": 3, "warmup_steps": -1}, ["n_head=3", "warmup_steps=-1"]),  # all problems at once
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_impossible_run_is_refused(recipe, tmp_path, changes, named):
    message = refusal(with_settings(recipe(), **changes), tmp_path / "run")
    assert [name for name in named if name not in message] == []
    assert not (tmp_path / "run").exists()


def test_existing_run_is_not_overwritten(recipe, copied_run):
    assert "--resume" in refusal(recipe(), copied_run.path)


def test_finished_run_cannot_be_made_shorter(copied_run):
    shorter = with_settings(read_recipe_of(copied_run.path), total_steps=5)
    assert "total_steps=5" in refusal(shorter, copied_run.path, resume=True)
    assert copied_run.is_finished(12)


def test_sizes_that_contradict_the_initial_model_are_refused(recipe, finished_run, tmp_path):
    other = with_settings(recipe(), init_from=str(finished_run.path), n_layer=3)
    assert "n_layer=3" in refusal(other, tmp_path / "other")


def test_resuming_needs_a_run(recipe, tmp_path):
    assert str(tmp_path / "run") in refusal(recipe(), tmp_path / "run", resume=True)


def test_full_disk_is_refused_before_the_first_step(recipe, tmp_path, monkeypatch):
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: full)
    message = refusal(with_settings(recipe(), keep_checkpoints=3), tmp_path / "run")
    assert "--keep-checkpoints" in message
    assert not (tmp_path / "run").exists()


def set_memory(patch: pytest.MonkeyPatch, available: int) -> None:
    for module in (setup, preflight):
        patch.setattr(module, "find_memory_bytes", lambda device: available)


def test_too_little_memory_is_refused_before_the_model_is_built(recipe, tmp_path, monkeypatch):
    set_memory(monkeypatch, 100_000)
    assert "a smaller model" in refusal(recipe(), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    set_memory(monkeypatch, 1_000_000)
    train_recipe(recipe(), RunDirectory(tmp_path / "run"))


def test_copy_for_an_async_checkpoint_must_fit(recipe, finished_run, tmp_path, monkeypatch):
    """On a CPU: 16 bytes of each weight are held all the time, and 12 more while a checkpoint is written."""
    parameters = read_recipe_of(finished_run.path).model.parameter_count()
    set_memory(monkeypatch, 22 * parameters)
    assert "--no-async-checkpoint" in refusal(recipe(), tmp_path / "run")
    train_recipe(with_settings(recipe(), async_checkpoint=False), RunDirectory(tmp_path / "run"))


def test_run_that_lost_its_checkpoints_does_not_restart(copied_run):
    assert load_resumed(copied_run.path).schedule.total_steps == 12
    shutil.rmtree(copied_run.checkpoints)
    with pytest.raises(ValueError, match="checkpoints holds no checkpoint"):
        load_resumed(copied_run.path)
    lines = copied_run.metrics.read_text().splitlines(keepends=True)
    copied_run.metrics.write_text("".join(lines[:3]))
    copied_run.record.unlink()
    load_resumed(copied_run.path)  # as if killed before its first checkpoint


def remove_manifest(shards: Path) -> None:
    (shards / "manifest.json").unlink()


def damage_shard(shards: Path) -> None:
    data = bytearray((shards / "train-00001.bin").read_bytes())
    data[-1] ^= 1
    (shards / "train-00001.bin").write_bytes(data)


def replace_tokenizer(shards: Path) -> None:
    shutil.rmtree(shards / "tokenizer")
    build_tokenizer("characters", ["quite another text"]).save(shards / "tokenizer")


@pytest.mark.parametrize(
    "damage, named",
    [(remove_manifest, "manifest.json"), (damage_shard, "train-00001.bin"), (replace_tokenizer, "tokenizer")],
)
def test_damaged_shards_are_refused(recipe, prepared, tmp_path, damage, named):
    shards = Path(shutil.copytree(prepared, tmp_path / "shards"))
    damage(shards)
    assert named in refusal(with_settings(recipe(), data=str(shards)), tmp_path / "run")


def test_text_beside_another_model_is_a_source(recipe, tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    (text / "model.bin").write_bytes(b"no shard")
    (text / "notes.txt").write_text("Some plain text. " * 400)  # too short for this recipe
    assert "manifest.json" not in refusal(with_settings(recipe(), data=str(text)), tmp_path / "run")
