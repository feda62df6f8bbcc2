"""A resumed run keeps the settings and the data it began with: differences are named."""

from __future__ import annotations

import dataclasses
import json
import shutil
from typing import Any

import pytest

from overnight import recipe as recipe_module
from overnight.config import flat_names, to_toml
from overnight.data.shards import FILE_COUNTS, Manifest
from overnight.recipe import RESUME_MUTABLE, Recipe, flatten, read_recipe_of, with_settings
from overnight.run import resume as resume_module
from overnight.run.resume import check_directory
from overnight.run.train import train_recipe
from overnight.run_directory import RunDirectory
from overnight.tokenizer.open_tokenizer import build_tokenizer
from overnight.training.checkpoint.format import file_digest, list_checkpoints, manifest

FROZEN = sorted(set(flat_names(Recipe)) - RESUME_MUTABLE)

# Another valid value of each setting that may change.
OTHERWISE: dict[str, Any] = {
    "attention": "math",
    "cache_bytes": 10**9,
    "checkpoint_every_steps": 2,
    "device": None,
    "evaluate_every_steps": 3,
    "evaluation_tokens": 64,
    "keep_best": True,
    "keep_checkpoints": 1,
    "keep_every_steps": 2,
    "max_restarts": 3,
    "micro_batch_size": 16,
    "sample_every_steps": 2,
    "sample_prompts": ("Line",),
    "sample_tokens": 3,
    "async_checkpoint": False,
    "sharding": "none",
    "max_time": "9h",
    "task_examples": 3,
    "task_files": "elsewhere",
    "tasks_every_steps": 7,
    "timeout_seconds": 60,
    "total_steps": 6,
}
OF_SHARDS = {"tokenizer", "validation_fraction"}  # facts of the prepared text, whatever the recipe says
LOCATIONS = {"run_name", "init_from", "data"}  # their content is compared, or not read again
# To compile takes long, and the others need files or programs: these are only compared.
COMPARED_ONLY = {"compile": True, "processes": 2, "tasks": ("hellaswag",), "trackers": ("wandb",)}


@pytest.fixture(scope="module")
def begun(recipe, tmp_path_factory):
    """A run of four steps. Do not change it."""
    directory = RunDirectory(tmp_path_factory.mktemp("begun") / "run")
    train_recipe(with_settings(recipe(), total_steps=4), directory)
    return directory


@pytest.fixture
def directory(begun, tmp_path):
    """A copy of the run of four steps."""
    return RunDirectory(shutil.copytree(begun.path, tmp_path / "run"))


def another(value: Any) -> Any:
    """A value of the same kind that differs as little as possible."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value * (1 + 2**-50) or 5e-324
    if isinstance(value, str):
        return value + "x"
    return (*value, "x") if isinstance(value, tuple) else 1


@pytest.fixture
def resume_refusal(refusal):
    """`resume_refusal(directory, recipe)`: the sentence with which resuming is refused."""
    return lambda directory, recipe=None: refusal(
        recipe or read_recipe_of(directory.path), directory.path, resume=True
    )


@pytest.mark.parametrize("name", FROZEN)
def test_changed_frozen_setting_is_named(directory, resume_refusal, name):
    """Also where the run's recipe was edited: the newest checkpoint has its own record of the settings."""
    before = read_recipe_of(directory.path)
    value = flatten(before)[name]
    changed = with_settings(before, **{name: another(value)})
    assert f" {name}={another(value)} (was {value})" in resume_refusal(directory, changed)
    if name not in OF_SHARDS | LOCATIONS:
        directory.recipe.write_text(to_toml(changed))
        message = resume_refusal(directory, changed)
        assert name in message or str(another(value)) in message


@pytest.mark.parametrize("name", sorted(RESUME_MUTABLE & set(OTHERWISE)))
def test_mutable_setting_may_change(directory, resume, name):
    resume(directory, **{"total_steps": 5, name: OTHERWISE[name]})
    steps = [line["step"] for line in directory.read_metrics()]
    assert steps == list(range(1, 7 if name == "total_steps" else 6))


def test_every_mutable_setting_is_tested():
    assert {*OTHERWISE, *COMPARED_ONLY, "total_tokens"} >= RESUME_MUTABLE


@pytest.mark.parametrize("name", COMPARED_ONLY)
def test_mutable_setting_is_accepted_by_comparison(directory, name):
    recipe = with_settings(read_recipe_of(directory.path), **{name: COMPARED_ONLY[name]})
    check_directory(recipe, directory, resume=True)
    with pytest.raises(ValueError, match="seed"):
        check_directory(with_settings(recipe, seed=1), directory, resume=True)


def test_total_tokens_may_replace_total_steps(directory, resume):
    resume(directory, total_tokens=5 * read_recipe_of(directory.path).batch.tokens_per_step)
    assert directory.is_finished(5)


def test_wrongly_mutable_setting_would_go_unnoticed(directory, resume, monkeypatch):
    """The negative control of the list of settings."""
    monkeypatch.setattr(recipe_module, "RESUME_MUTABLE", RESUME_MUTABLE | {"weight_decay"})
    resume(directory, total_steps=5, weight_decay=0.7)
    assert directory.is_finished(5)


def test_edited_recipe_would_go_unnoticed_without_the_checkpoint_s_record(directory, resume, monkeypatch):
    """The negative control of the checkpoint's record."""
    edited = with_settings(read_recipe_of(directory.path), weight_decay=0.7)
    directory.recipe.write_text(to_toml(edited))
    monkeypatch.setattr(resume_module, "check_settings", lambda *_: None)
    resume(directory, total_steps=5)
    assert directory.is_finished(5)


# How many files were read is told to people, and says nothing about the data.
FACTS = [field.name for field in dataclasses.fields(Manifest) if field.name not in FILE_COUNTS]


@pytest.mark.parametrize("name", FACTS)
def test_every_fact_of_the_data_is_compared(directory, resume_refusal, name):
    record = json.loads(directory.data.read_text())
    record[name] = another(record[name]) if not isinstance(record[name], dict | list) else {"x": 1}
    directory.data.write_text(json.dumps(record))
    assert f": {name} differ" in resume_refusal(directory)


@pytest.mark.parametrize("content", ["", "[]", "7", "{}", '{"a": 1}', "[" * 10_000])
def test_damaged_record_of_the_data_is_refused(directory, resume_refusal, content):
    directory.data.write_text(content)
    assert "dama" in resume_refusal(directory) or "differ" in resume_refusal(directory)


def test_another_tokenizer_in_the_run_is_refused_and_a_missing_one_written(directory, resume, resume_refusal):
    (directory.tokenizer / "tokenizer.json").unlink()
    (directory.tokenizer / "tokenizer.json").mkdir()
    assert str(directory.tokenizer) in resume_refusal(directory)
    shutil.rmtree(directory.tokenizer)
    build_tokenizer("characters", ["quite another text"]).save(directory.tokenizer)
    assert str(directory.tokenizer) in resume_refusal(directory)
    (directory.tokenizer / "tokenizer.json").write_text("{}")
    assert str(directory.tokenizer) in resume_refusal(directory)
    shutil.rmtree(directory.tokenizer)
    resume(directory)
    assert (directory.tokenizer / "tokenizer.json").is_file()


def test_recipe_of_another_package_is_refused(directory, resume_refusal):
    written, sound = directory.recipe.read_text(), read_recipe_of(directory.path)
    directory.recipe.write_text(written.replace("[model]", "[model]\nrotary = true"))
    assert "rotary" in resume_refusal(directory, sound)


def test_checkpoint_of_another_format_is_refused(directory, resume_refusal, capsys):
    for checkpoint in list_checkpoints(directory.checkpoints):
        state, written = checkpoint / "state.json", checkpoint / "MANIFEST.json"
        state.write_text(json.dumps({**json.loads(state.read_text()), "format": 99}))
        listed = json.loads(written.read_text())
        listed["files"]["state.json"] = file_digest(state)
        written.write_text(manifest(listed["files"], listed["format"]))
    assert str(directory.checkpoints) in resume_refusal(directory)
    assert "format 99" in capsys.readouterr().err
