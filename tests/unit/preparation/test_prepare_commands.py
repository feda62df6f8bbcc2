from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from overnight.data import DataConfig, MixtureSource
from overnight.preparation.prepare_commands import JobText, find_recipe_texts, with_folders
from overnight.recipe import load_recipe


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a text, one that is prepared, and a tokenizer."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("text")
    (tmp_path / "data/ready").mkdir(parents=True)
    (tmp_path / "data/ready/manifest.json").touch()
    (tmp_path / "mine.json").touch()
    return tmp_path


PREPARE = ("overnight", "prepare")


@pytest.mark.parametrize(
    "config, folder, command",
    [
        (DataConfig(data="python-docs"), "data/python-docs", ("python-docs",)),
        (
            DataConfig(data="shakespeare", tokenizer="characters", validation_fraction=0.2),
            "data/shakespeare-characters",
            ("shakespeare", "--tokenizer", "characters", "--validation-fraction", "0.2"),
        ),
        (
            DataConfig(data="notes.txt", tokenizer="bpe-300"),
            "data/notes-bpe-300",
            ("notes.txt", "--tokenizer", "bpe-300"),
        ),
        (
            DataConfig(data="data/fineweb-edu"),
            "data/fineweb-edu",
            ("fineweb-edu", "--subset", "sample-100BT"),
        ),
        (
            DataConfig(data="/big/openwebtext"),
            "/big/openwebtext",
            ("openwebtext", "--out", "/big/openwebtext"),
        ),
    ],
)
def test_command_that_prepares_a_text(config: DataConfig, folder: str, command: tuple[str, ...]) -> None:
    """The recipe's first lines name the subset of FineWeb-Edu; the rest is `train`'s own preparation."""
    assert find_recipe_texts(config, "gpt2-1558m", with_files=True) == (JobText(folder, PREPARE + command),)


@pytest.mark.parametrize("data", ["data/ready", "data/unknown", "s3://bucket/fineweb-edu"])
def test_other_folders_have_no_command(data: str) -> None:
    assert find_recipe_texts(DataConfig(data=data), "quickstart", with_files=True) == (JobText(data),)


@pytest.mark.parametrize(
    "config, is_named",
    [
        (DataConfig(data="notes.txt"), False),
        (DataConfig(data="shakespeare", tokenizer="mine.json"), False),
        (DataConfig(data="shakespeare"), True),
    ],
)
def test_another_machine_prepares_only_named_sources(config: DataConfig, is_named: bool) -> None:
    (at_home,), (away,) = (find_recipe_texts(config, "quickstart", with_files=each) for each in (True, False))
    assert at_home.prepare
    assert away == (at_home if is_named else JobText(at_home.folder))


def test_mixture_has_several_texts() -> None:
    sources = (MixtureSource(path="notes.txt", weight=0.75), MixtureSource(path="s3://b/c", weight=0.25))
    config = DataConfig(mixture=sources)
    texts = find_recipe_texts(config, "quickstart", with_files=False)
    assert texts == (JobText("data/notes", (), 0.75), JobText("s3://b/c", (), 0.25))
    recipe = with_folders(dataclasses.replace(load_recipe("quickstart"), data=config), texts)
    folders = [(source.path, source.weight) for source in recipe.data.mixture]
    assert folders == [("data/notes", 0.75), ("s3://b/c", 0.25)]


def test_recipe_file_names_its_command(here: Path) -> None:
    (here / "mine.toml").write_text("# Mine:\n#   overnight prepare openwebtext --tokens 10M\n[data]\n")
    found = find_recipe_texts(DataConfig(data="data/openwebtext"), "mine.toml", with_files=True)
    assert found == (JobText("data/openwebtext", (*PREPARE, "openwebtext", "--tokens", "10M")),)
