"""What can't be trained is refused before any work, in one sentence, with nothing half-written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from overnight.recipe import read_recipe_of, with_settings
from overnight.run import preflight, setup
from overnight.run.resume import load_resumed
from overnight.tokenizer.open_tokenizer import build_tokenizer


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"context_length": 10**6, "tokens_per_step": 10**6, "micro_batch_size": None}, ["context"]),
        ({"vocab_size": 7}, ["vocab_size=7"]),
        ({"seed": -1}, ["seed=-1"]),
        ({"sample_prompts": ("x" * 99,)}, ["sample prompt"]),
        ({"n_head": 3, "warmup_steps": -1}, ["n_head=3", "warmup_steps=-1"]),  # all problems at once
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_impossible_run_is_refused(recipe, refusal, tmp_path, changes, named):
    """These and those of test_commands.py."""
    message = refusal(recipe(**changes), tmp_path / "run")
    assert [name for name in named if name not in message] == []


def test_finished_run_is_neither_overwritten_nor_made_shorter(recipe, refusal, copied_run, tmp_path):
    assert "--resume" in refusal(recipe(), copied_run.path)
    shorter = with_settings(read_recipe_of(copied_run.path), total_steps=5)
    assert "total_steps=5" in refusal(shorter, copied_run.path, resume=True)
    assert "no run" in refusal(shorter, tmp_path / "nowhere", resume=True)


def test_full_disk_is_refused_before_the_first_step(recipe, refusal, tmp_path, monkeypatch):
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: full)
    assert "--keep-checkpoints" in refusal(recipe(keep_checkpoints=3), tmp_path / "run")


def test_too_little_memory_is_refused(recipe, refusal, finished_run, train_to, tmp_path, monkeypatch):
    """On a CPU: 16 bytes of each weight are held all the time, and 12 more while a checkpoint is written."""

    def set_memory(available: int) -> None:
        for module in (setup, preflight):
            monkeypatch.setattr(module, "find_memory_bytes", lambda device: available)

    set_memory(100_000)
    assert "a smaller model" in refusal(recipe(), tmp_path / "run")
    set_memory(22 * read_recipe_of(finished_run.path).model.parameter_count())
    assert "--no-async-checkpoint" in refusal(recipe(), tmp_path / "run")
    train_to(recipe(async_checkpoint=False), "run")
    set_memory(1_000_000)
    train_to(recipe(), "another")


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
def test_damaged_shards_are_refused(recipe, refusal, prepared, tmp_path, damage, named):
    shards = Path(shutil.copytree(prepared, tmp_path / "shards"))
    damage(shards)
    assert named in refusal(with_settings(recipe(), data=str(shards)), tmp_path / "run")


def test_text_beside_another_model_is_a_source(recipe, refusal, tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    (text / "model.bin").write_bytes(b"no shard")
    (text / "notes.txt").write_text("Some plain text. " * 400)  # too short for this recipe
    assert "manifest.json" not in refusal(with_settings(recipe(), data=str(text)), tmp_path / "run")
