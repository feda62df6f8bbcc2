"""Every tokenizer with every other's shards, model and run: each pair is refused wherever they could meet."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from overnight.config import from_toml
from overnight.data import DataConfig
from overnight.data.shards import load_prepared_tokenizer
from overnight.evaluation import EvaluateConfig
from overnight.evaluation import command as evaluation_command
from overnight.preparation.prepare import prepare
from overnight.preparation.prepare_config import PrepareConfig
from overnight.recipe import Recipe
from overnight.run import train
from overnight.run_directory import RunDirectory

Build = Callable[..., Recipe]

# By name: how the text is made into ids, and how much of it is seen while learning to.
TOKENIZERS = {
    "all": ("characters", 40),
    "few": ("characters", 6),
    "270": ("bpe-270", 40),
    "271": ("bpe-271", 40),
}
PAIRS = list(itertools.permutations(TOKENIZERS, 2))


@pytest.fixture(scope="module")
def folders(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By tokenizer: a prepared folder of the same text."""
    root = tmp_path_factory.mktemp("tokenizers")
    found = {}
    for name, (tokenizer, documents) in TOKENIZERS.items():
        source = root / f"text-{name}"
        source.mkdir()
        for path in sorted(prepared.parent.glob("*.txt"))[:documents]:
            text = path.read_text()
            (source / path.name).write_text(text + ("ÄÖÜ" if name == "few" else ""))
        out = str(root / name)
        prepare(
            PrepareConfig(
                source=str(source), out=out, tokenizer=tokenizer, validation_fraction=0.2, shard_tokens=1500
            )
        )
        found[name] = root / name
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs lie; each is made by whichever test needs it first."""
    return tmp_path_factory.mktemp("runs")


def trained(name: str, recipe: Build, folders: dict[str, Path], runs: Path) -> RunDirectory:
    directory = RunDirectory(runs / name)
    if not directory.exists():
        train.run(on(recipe, folders[name]), directory)
    return directory


def on(recipe: Build, folder: Path, **changes: object) -> Recipe:
    small = recipe(data=DataConfig(data=str(folder)), **changes)
    return dataclasses.replace(small, schedule=dataclasses.replace(small.schedule, total_steps=3))


@pytest.mark.parametrize("tokenizer, shards", PAIRS)
def test_shards_and_a_tokenizer_that_did_not_make_them(
    folders: dict[str, Path], recipe: Build, tmp_path: Path, tokenizer: str, shards: str
) -> None:
    folder = tmp_path / "mixed"
    shutil.copytree(folders[shards], folder)
    shutil.rmtree(folder / "tokenizer")
    shutil.copytree(folders[tokenizer] / "tokenizer", folder / "tokenizer")
    with pytest.raises(ValueError, match="is not the tokenizer that made the shards"):
        load_prepared_tokenizer(folder)
    with pytest.raises(ValueError, match="is not the tokenizer that made the shards"):
        train.run(on(recipe, folder), RunDirectory(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("tokenizer, shards", PAIRS)
def test_a_model_and_shards_of_another_tokenizer(
    folders: dict[str, Path], runs: Path, recipe: Build, tmp_path: Path, tokenizer: str, shards: str
) -> None:
    """Begun from it, judged on them, and gone on with."""
    run = trained(tokenizer, recipe, folders, runs)
    other = on(recipe, folders[shards], init_from=str(run.path))
    with pytest.raises(ValueError, match="reads another: prepare the text with --tokenizer"):
        train.run(other, RunDirectory(tmp_path / "tuned"))
    with pytest.raises(ValueError, match="prepare that text with --tokenizer"):
        evaluation_command.run(EvaluateConfig(model=str(run.path), data=str(folders[shards]), device="cpu"))
    begun = from_toml(Recipe, run.recipe.read_text(), "recipe.toml")
    swapped = dataclasses.replace(begun, data=dataclasses.replace(begun.data, data=str(folders[shards])))
    with pytest.raises(ValueError, match="belongs to another recipe: data="):
        train.run(swapped, run, resume=True)
    in_its_place = tmp_path / "copy"
    shutil.copytree(run.path, in_its_place)
    recipe_file = in_its_place / "recipe.toml"
    recipe_file.write_text(recipe_file.read_text().replace(str(folders[tokenizer]), str(folders[shards])))
    unseen = from_toml(Recipe, recipe_file.read_text(), "recipe.toml")
    with pytest.raises(ValueError, match="is not what .* was trained on|belongs|vocab_size"):
        train.run(unseen, RunDirectory(in_its_place), resume=True)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_what_belongs_together_is_not_refused(
    folders: dict[str, Path], runs: Path, recipe: Build, tmp_path: Path, name: str
) -> None:
    """The control: the same without a swap."""
    run = trained(name, recipe, folders, runs)
    tuned = on(recipe, folders[name], init_from=str(run.path))
    train.run(tuned, RunDirectory(tmp_path / "tuned"))
    evaluation_command.run(EvaluateConfig(model=str(run.path), data=str(folders[name]), device="cpu"))
