"""Options that turn one recipe into another."""

from __future__ import annotations

import pytest

from overnight.cli import main
from overnight.recipe import Recipe, changed_options, load_recipe, recipe_names
from overnight.run import command as run_command


@pytest.fixture
def parse(monkeypatch):
    """The recipe that `overnight train` makes of words."""

    def read(*words):
        found: list[Recipe] = []
        monkeypatch.setattr(run_command, "run", lambda recipe, resumed: found.append(recipe))
        assert main(["train", *words]) == 0
        return found[0]

    return read


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--seed", "7", "--n_layer=3"],
        ["--total-tokens", "1_000_000"],
        ["--total-steps=10", "--warmup-steps=1"],
        ["--deterministic_reduce"],
        ["--compile", "False"],
        ["--compile=True"],
        ["--evaluate-every-steps", "None"],
        ["--mixture", "data/a=b=0.5", "s3://c/d=1.5"],
        ["--sample-prompts", "", "it's $HOME", "two\nlines"],
        ["--sample-prompts"],
        ["--trackers", "tensorboard", "wandb"],
        ["--run-name=-x", "--init-from", "gpt2"],
        ["--peak-learning-rate", "1e-05", "--dropout", "0"],
        ["--sharding", "full", "--precision", "bf16"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("name", ["gpt2-124m", "gpt3-125m", "shakespeare-char"])
def test_options_are_read_back_as_the_recipe(name, words, parse):
    wanted = parse(name, *words)
    options = changed_options(wanted, load_recipe(name))
    assert bool(options) is bool(words)
    assert parse(name, *options) == wanted


@pytest.mark.parametrize("original", ["gpt2-124m", "quickstart"])
@pytest.mark.parametrize("name", recipe_names())
def test_recipe_becomes_any_other_by_options(name, original, parse):
    wanted = load_recipe(name)
    assert parse(original, *changed_options(wanted, load_recipe(original))) == wanted


def test_left_out_setting_stays(parse):
    wanted, original = parse("gpt2-124m", "--seed=7", "--deterministic_reduce"), load_recipe("gpt2-124m")
    assert changed_options(wanted, original, {"deterministic_reduce"}) == ["--seed", "7"]
