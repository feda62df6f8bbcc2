"""What a run was begun with is what it goes on with: whatever differs is named, but for a stated list."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from overnight import recipe as recipe_module
from overnight.config import flat_names, from_toml, to_toml
from overnight.recipe import RESUME_MUTABLE, Recipe, flatten
from overnight.run import resume, train
from overnight.run_directory import RunDirectory
from overnight.tokenizer.open_tokenizer import build_tokenizer

Build = Callable[..., Recipe]
SCIENCE = sorted(set(flat_names(Recipe)) - RESUME_MUTABLE)

# A sound other value of each setting that may change.
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
TOLD_BY_SHARDS = {"tokenizer", "validation_fraction"}  # of prepared text, whatever the recipe says
PLACES = {"run_name", "init_from", "data"}  # what lies there is compared itself, or not read again
# These are only compared here: to compile takes long, and the others need files or programs.
BY_OTHER_TESTS = {"compile": True, "processes": 2, "tasks": ("hellaswag",), "trackers": ("wandb",)}


@pytest.fixture(scope="module")
def begun(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps, never changed: copy it."""
    return tmp_path_factory.mktemp("begun") / "run"


@pytest.fixture
def directory(begun: Path, recipe: Build, tmp_path: Path) -> RunDirectory:
    """A copy of a run that has done four steps."""
    if not begun.exists():
        small = recipe()
        schedule = dataclasses.replace(small.schedule, total_steps=4)
        train.run(dataclasses.replace(small, schedule=schedule), RunDirectory(begun))
    shutil.copytree(begun, tmp_path / "run")
    return RunDirectory(tmp_path / "run")


def reread(directory: RunDirectory) -> Recipe:
    """The recipe as `overnight train --resume` reads it."""
    return from_toml(Recipe, directory.recipe.read_text(encoding="utf-8"), "recipe.toml")


def changed(recipe: Recipe, name: str, value: Any) -> Recipe:
    section = flat_names(Recipe)[name]
    if section is None:
        return dataclasses.replace(recipe, **{name: value})
    part = dataclasses.replace(getattr(recipe, section), **{name: value})
    return dataclasses.replace(recipe, **{section: part})


def another(value: Any) -> Any:
    """A value of the same kind that differs as little as may be."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value * (1 + 2**-50) or 5e-324
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, tuple):
        return (*value, "x")
    return 1


def refusal(directory: RunDirectory, recipe: Recipe | None = None) -> str:
    """The sentence with which going on is refused; nothing of the run was changed by then."""
    before = identity(directory)
    with pytest.raises(ValueError, match=".") as error:
        train.run(recipe or reread(directory), directory, resume=True)
    assert "\n" not in str(error.value)
    assert identity(directory) == before
    return str(error.value)


def identity(directory: RunDirectory) -> dict[Path, str]:
    files = [path for path in directory.path.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("name", SCIENCE)
def test_every_setting_that_may_not_change_is_named(directory: RunDirectory, name: str) -> None:
    before = reread(directory)
    value = flatten(before)[name]
    said = refusal(directory, changed(before, name, another(value)))
    assert f" {name}={another(value)} (was {value})" in said


def test_the_list_of_what_may_change_is_whole() -> None:
    assert {*OTHERWISE, *BY_OTHER_TESTS, "total_tokens"} >= RESUME_MUTABLE


@pytest.mark.parametrize("name", BY_OTHER_TESTS)
def test_nor_does_what_takes_long_or_needs_others(directory: RunDirectory, name: str) -> None:
    """Only asked here whether the run is still its own."""
    resume.check_directory(changed(reread(directory), name, BY_OTHER_TESTS[name]), directory, resume=True)


@pytest.mark.parametrize("name", sorted(RESUME_MUTABLE & set(OTHERWISE)))
def test_what_may_change_does_not_stop_a_run(directory: RunDirectory, name: str) -> None:
    before = reread(directory)
    longer = changed(before, "total_steps", 5)
    train.run(changed(longer, name, OTHERWISE[name]), directory, resume=True)
    steps = [line["step"] for line in directory.read_metrics()]
    assert steps == list(range(1, 7 if name == "total_steps" else 6))


def test_a_length_in_tokens_may_take_the_place_of_one_in_steps(directory: RunDirectory) -> None:
    before = reread(directory)
    tokens = changed(changed(before, "total_steps", None), "total_tokens", 5 * before.batch.tokens_per_step)
    train.run(tokens, directory, resume=True)
    assert directory.is_finished(5)


def test_a_change_that_is_overlooked_is_caught(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: were one setting more on the list, the run would go on otherwise, silently."""
    monkeypatch.setattr(recipe_module, "RESUME_MUTABLE", RESUME_MUTABLE | {"weight_decay"})
    otherwise = changed(changed(reread(directory), "total_steps", 5), "weight_decay", 0.7)
    train.run(otherwise, directory, resume=True)
    assert directory.is_finished(5)


@pytest.mark.parametrize("name", [name for name in SCIENCE if name not in TOLD_BY_SHARDS | PLACES])
def test_a_setting_edited_in_the_run_s_recipe_is_named(directory: RunDirectory, name: str) -> None:
    """Of what the newest checkpoint was trained by, the checkpoint itself has the record."""
    before = reread(directory)
    otherwise = another(flatten(before)[name])
    directory.recipe.write_text(to_toml(changed(before, name, otherwise)))
    with pytest.raises(ValueError, match=rf"\b{name}\b|{re.escape(str(otherwise))}"):
        train.run(reread(directory), directory, resume=True)


def test_without_the_record_an_edited_recipe_goes_on(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control."""
    directory.recipe.write_text(to_toml(changed(reread(directory), "weight_decay", 0.7)))
    monkeypatch.setattr(train, "check_settings", lambda *_: None)
    train.run(changed(reread(directory), "total_steps", 5), directory, resume=True)
    assert directory.is_finished(5)


# ---------------------------------------------------------------- data, tokenizer, formats


def facts() -> list[str]:
    from overnight.data.shards import Manifest

    return [field.name for field in dataclasses.fields(Manifest)]


@pytest.mark.parametrize("name", facts())
def test_every_fact_of_the_data_is_compared(directory: RunDirectory, name: str) -> None:
    told = json.loads(directory.data.read_text())
    told[name] = another(told[name]) if not isinstance(told[name], dict | list) else {"x": 1}
    directory.data.write_text(json.dumps(told))
    assert f"is not what {directory.path} was trained on: other {name};" in refusal(directory)


@pytest.mark.parametrize("content", ["", "[]", "7", "{}", '{"a": 1}', "[" * 10_000])
def test_a_damaged_record_of_the_data_is_told(directory: RunDirectory, content: str) -> None:
    directory.data.write_text(content)
    said = refusal(directory)
    assert "data.json is damaged" in said or "is not what" in said


def test_another_tokenizer_in_the_run_is_refused_and_a_missing_one_written(directory: RunDirectory) -> None:
    shutil.rmtree(directory.tokenizer)
    build_tokenizer("characters", ["quite another text"]).save(directory.tokenizer)
    assert "tokenizer is not the tokenizer that" in refusal(directory)
    (directory.tokenizer / "tokenizer.json").write_text("{}")
    assert "tokenizer is not the tokenizer that" in refusal(directory)
    shutil.rmtree(directory.tokenizer)
    train.run(reread(directory), directory, resume=True)
    assert (directory.tokenizer / "tokenizer.json").is_file()


def test_a_recipe_of_another_package_is_told(directory: RunDirectory) -> None:
    written = directory.recipe.read_text()
    directory.recipe.write_text(written.replace("[model]", "[model]\nrotary = true"))
    with pytest.raises(ValueError, match="rotary is not a setting"):
        reread(directory)
    sound = from_toml(Recipe, written, "recipe.toml")
    assert "rotary is not a setting" in refusal(directory, sound)


def test_a_checkpoint_of_another_format_is_told(
    directory: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    from overnight.training.checkpoint.format import file_digest, list_checkpoints, manifest

    for checkpoint in list_checkpoints(directory.checkpoints):
        state, told_in = checkpoint / "state.json", checkpoint / "MANIFEST.json"
        state.write_text(json.dumps({**json.loads(state.read_text()), "format": 99}))
        told = json.loads(told_in.read_text())
        told["files"]["state.json"] = file_digest(state)
        told_in.write_text(manifest(told["files"], told["format"]))
    assert "no checkpoint in" in refusal(directory)
    assert "has format 99, this overnight reads" in capsys.readouterr().err
