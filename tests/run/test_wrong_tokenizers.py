"""Every tokenizer with every other's shards, model and run: each pair is refused wherever they could meet."""

from __future__ import annotations

import itertools
import shutil
from functools import partial

import pytest

from overnight.data import DataConfig, MixtureSource
from overnight.data.shards import load_prepared_tokenizer
from overnight.evaluation import EvaluateConfig
from overnight.evaluation import command as evaluation_command
from overnight.preparation.prepare import require_tokenizer
from overnight.recipe import read_recipe_of, with_settings
from overnight.run.train import train_recipe
from overnight.run_directory import RunDirectory

# By name: the kind of tokenizer, and how many of the documents it learns from.
TOKENIZERS = {
    "all": ("characters", 40),
    "few": ("characters", 6),
    "270": ("bpe-270", 40),
    "271": ("bpe-271", 40),
}


@pytest.fixture(scope="module")
def folders(prepared, prepare_texts, tmp_path_factory):
    """By tokenizer: a prepared folder of the same text."""
    root = tmp_path_factory.mktemp("tokenizers")
    texts = [path.read_text() for path in sorted(prepared.parent.glob("*.txt"))]
    return {
        name: prepare_texts(
            root / name,
            [text + "ÄÖÜ" * (name == "few") for text in texts[:documents]],
            tokenizer=tokenizer,
        )
        for name, (tokenizer, documents) in TOKENIZERS.items()
    }


@pytest.fixture(scope="module")
def three_steps(recipe):
    """`three_steps(folder, **settings)`: a recipe on it."""
    return lambda folder, **settings: with_settings(
        recipe(), data=str(folder), total_steps=3, warmup_steps=1, **settings
    )


@pytest.fixture(scope="module")
def runs(three_steps, folders, tmp_path_factory):
    """By tokenizer: a finished run on its folder."""
    root = tmp_path_factory.mktemp("runs")
    found = {name: RunDirectory(root / name) for name in TOKENIZERS}
    for name, directory in found.items():
        train_recipe(three_steps(folders[name]), directory)
    return found


def evaluate_on(run, folder):
    evaluation_command.run(EvaluateConfig(model=str(run.path), data=str(folder), device="cpu"))


@pytest.mark.parametrize("tokenizer, shards", [*itertools.permutations(TOKENIZERS, 2)])
def test_another_tokenizers_shards_are_refused(folders, runs, three_steps, tmp_path, tokenizer, shards):
    """With a folder's tokenizer exchanged; as initial weights; in an evaluation; when a run is resumed."""
    run, folder = runs[tokenizer], folders[shards]
    mixed = shutil.copytree(folder, tmp_path / "mixed")
    shutil.rmtree(mixed / "tokenizer")
    shutil.copytree(folders[tokenizer] / "tokenizer", mixed / "tokenizer")
    begun = read_recipe_of(run.path)
    edited = RunDirectory(shutil.copytree(run.path, tmp_path / "copy"))
    edited.recipe.write_text(edited.recipe.read_text().replace(str(folders[tokenizer]), str(folder)))
    new = RunDirectory(tmp_path / "new")
    exchanged = "is not the tokenizer that made the shards"
    another_run = "is not the data that|not the recipe of|vocab_size"
    for use, match in (
        (partial(load_prepared_tokenizer, mixed), exchanged),
        (partial(train_recipe, three_steps(mixed), new), exchanged),
        (partial(train_recipe, three_steps(folder, init_from=run.path), new), "--tokenizer"),
        (partial(evaluate_on, run, folder), "--tokenizer"),
        (partial(train_recipe, with_settings(begun, data=folder), run, resume=True), "data="),
        (partial(train_recipe, read_recipe_of(edited.path), edited, resume=True), another_run),
    ):
        with pytest.raises(ValueError, match=match):
            use()
    assert not new.path.exists()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_matching_tokenizer_is_accepted(folders, runs, three_steps, tmp_path, name):
    """The control: the same without a swap."""
    tuned = three_steps(folders[name], init_from=runs[name].path)
    train_recipe(tuned, RunDirectory(tmp_path / "tuned"))
    evaluate_on(runs[name], folders[name])


@pytest.mark.parametrize("wanted, shards", [*itertools.product(TOKENIZERS, TOKENIZERS)])
def test_tokenizer_that_is_asked_for_is_the_folders(folders, wanted, shards):
    """By name, and by a folder that holds it; two of the same name differ by the folder alone."""
    folder, asked = str(folders[shards]), str(folders[wanted] / "tokenizer")
    mixture = (MixtureSource(path=folder, weight=1.0),)
    name = TOKENIZERS[wanted][0]
    for config, is_same in (
        (DataConfig(data=folder, tokenizer=asked), wanted == shards),
        (DataConfig(mixture=mixture, tokenizer=asked), wanted == shards),
        (DataConfig(data=folder, tokenizer=name), name == TOKENIZERS[shards][0]),
    ):
        if is_same:
            require_tokenizer(config)
        else:
            with pytest.raises(ValueError, match="was prepared with the tokenizer") as error:
                require_tokenizer(config)
            assert folder in str(error.value)
            assert config.tokenizer in str(error.value)
