"""Every tokenizer with every other's shards, model and run: each pair is refused wherever they could meet."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from overnight.data import DataConfig
from overnight.data.shards import load_prepared_tokenizer
from overnight.evaluation import EvaluateConfig
from overnight.evaluation import command as evaluation_command
from overnight.preparation.prepare import prepare_shards
from overnight.preparation.prepare_config import PrepareConfig
from overnight.recipe import Recipe, read_recipe_of
from overnight.run.train import train_recipe
from overnight.run_directory import RunDirectory
from overnight.training.schedule import ScheduleConfig

Build = Callable[..., Recipe]

# By name: the kind of tokenizer, and how many of the documents it learns from.
TOKENIZERS = {
    "all": ("characters", 40),
    "few": ("characters", 6),
    "270": ("bpe-270", 40),
    "271": ("bpe-271", 40),
}


@pytest.fixture(scope="module")
def folders(prepared, tmp_path_factory):
    """By tokenizer: a prepared folder of the same text."""
    root = tmp_path_factory.mktemp("tokenizers")
    for name, (tokenizer, documents) in TOKENIZERS.items():
        source = root / f"text-{name}"
        source.mkdir()
        for path in sorted(prepared.parent.glob("*.txt"))[:documents]:
            (source / path.name).write_text(path.read_text() + ("ÄÖÜ" if name == "few" else ""))
        config = PrepareConfig(source=str(source), out=str(root / name), tokenizer=tokenizer)
        prepare_shards(dataclasses.replace(config, validation_fraction=0.2, shard_tokens=1500))
    return {name: root / name for name in TOKENIZERS}


def three_steps(recipe: Build, folder: Path, **changes: object) -> Recipe:
    schedule = ScheduleConfig(total_steps=3, warmup_steps=1)
    return recipe(data=DataConfig(data=str(folder)), schedule=schedule, **changes)


@pytest.fixture(scope="module")
def runs(recipe, folders, tmp_path_factory):
    """By tokenizer: a finished run on its folder."""
    root = tmp_path_factory.mktemp("runs")
    found = {name: RunDirectory(root / name) for name in TOKENIZERS}
    for name, directory in found.items():
        train_recipe(three_steps(recipe, folders[name]), directory)
    return found


@pytest.mark.parametrize("tokenizer, shards", [*itertools.permutations(TOKENIZERS, 2)])
def test_another_tokenizers_shards_are_refused(folders, runs, recipe, tmp_path, tokenizer, shards):
    """With a folder's tokenizer exchanged; as initial weights; in an evaluation; when a run is resumed."""
    run, folder = runs[tokenizer], folders[shards]
    mixed = shutil.copytree(folder, tmp_path / "mixed")
    shutil.rmtree(mixed / "tokenizer")
    shutil.copytree(folders[tokenizer] / "tokenizer", mixed / "tokenizer")
    begun = read_recipe_of(run.path)
    swapped = dataclasses.replace(begun, data=dataclasses.replace(begun.data, data=str(folder)))
    edited = RunDirectory(shutil.copytree(run.path, tmp_path / "copy"))
    edited.recipe.write_text(edited.recipe.read_text().replace(str(folders[tokenizer]), str(folder)))
    new = RunDirectory(tmp_path / "new")
    for use, match in (
        (lambda: load_prepared_tokenizer(mixed), "is not the tokenizer that made the shards"),
        (lambda: train_recipe(three_steps(recipe, mixed), new), "is not the tokenizer that made the shards"),
        (lambda: train_recipe(three_steps(recipe, folder, init_from=str(run.path)), new), "--tokenizer"),
        (
            lambda: evaluation_command.run(
                EvaluateConfig(model=str(run.path), data=str(folder), device="cpu")
            ),
            "--tokenizer",
        ),
        (lambda: train_recipe(swapped, run, resume=True), "data="),
        (
            lambda: train_recipe(read_recipe_of(edited.path), edited, resume=True),
            "is not the data that|not the recipe of|vocab_size",
        ),
    ):
        with pytest.raises(ValueError, match=match):
            use()
    assert not new.path.exists()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_matching_tokenizer_is_accepted(folders, runs, recipe, tmp_path, name):
    """The control: the same without a swap."""
    tuned = three_steps(recipe, folders[name], init_from=str(runs[name].path))
    train_recipe(tuned, RunDirectory(tmp_path / "tuned"))
    evaluation_command.run(EvaluateConfig(model=str(runs[name].path), data=str(folders[name]), device="cpu"))
