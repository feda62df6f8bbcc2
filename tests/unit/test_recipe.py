"""The recipes of the package, settings under their old names, what may change on resuming, and options."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from overnight.cli import main
from overnight.config import field_types, flat_names, from_toml
from overnight.data import DataConfig
from overnight.options import from_arguments
from overnight.recipe import (
    RESUME_MUTABLE,
    Recipe,
    Resolved,
    changed_options,
    flatten,
    incompatible_settings,
    load_recipe,
    recipe_names,
)
from overnight.run import command as run_command
from overnight.run.setup import resolve
from overnight.training import Compute
from overnight.training.memory import Resources

DEFAULT = Recipe(run_name="x")


def test_recipe_may_be_a_file(tmp_path):
    path = tmp_path / "mine-1.5.toml"
    for mark in (b"", b"\xef\xbb\xbf"):
        path.write_bytes(mark + b"[schedule]\ntotal_steps = 3\n")
        recipe = load_recipe(str(path))
        assert (recipe.run_name, recipe.schedule.total_steps) == ("mine-1.5", 3)


@pytest.mark.parametrize("name", sorted(flatten(DEFAULT)))
def test_changed_setting_is_noticed_unless_it_may_change(name):
    before = flatten(DEFAULT)
    changed = incompatible_settings(before | {name: "changed"}, before)
    assert changed == ([] if name in RESUME_MUTABLE else [f"{name}=changed (was {before[name]})"])


def test_settings_that_decide_what_is_learned_may_not_change():
    assert {*flatten(DEFAULT)} >= RESUME_MUTABLE
    decisive = {"n_layer", "seed", "peak_learning_rate", "tokens_per_step", "data", "tokenizer", "precision"}
    assert not decisive & RESUME_MUTABLE


# Old name, new name, an old value in TOML and on the command line, the present value.
RENAMED: list[tuple[str, str, str, list[str], Any]] = [
    ("rows_per_micro_batch", "micro_batch_size", "4", ["4"], 4),
    ("ramp_from_tokens_per_step", "batch_ramp_start_tokens", "64", ["64"], 64),
    ("ramp_tokens", "batch_ramp_tokens", "99", ["99"], 99),
    ("recompute", "activation_checkpointing", '"block"', ["block"], "block"),
    ("head", "loss", '"whole"', ["whole"], "full"),
    ("head", "loss", '"chunked"', ["chunked"], "chunked"),
    ("bitwise", "deterministic_reduce", "true", [], True),
    ("save_in_background", "async_checkpoint", "true", [], True),
    ("stop_after", "max_time", '"7h50m"', ["7h50m"], "7h50m"),
    ("start_from", "init_from", '"gpt2"', ["gpt2"], "gpt2"),
    ("from", "init_from", '"gpt2"', ["gpt2"], "gpt2"),
    ("shuffle_tokens", "shuffle_window", "6000", ["6000"], 6000),
    ("spike_deviations", "spike_sigma", "4.0", ["4.0"], 4.0),
    ("attention", "attention", '"plain"', ["plain"], "math"),
    ("sharding", "sharding", '"optimizer"', ["optimizer"], "zero1"),
    ("sharding", "sharding", '"full"', ["full"], "fsdp"),
    ("sharding", "sharding", '"hybrid"', ["hybrid"], "hsdp"),
]


def options(*words: str) -> Recipe:
    return from_arguments(Recipe, words, prog="overnight train", about="", default=DEFAULT)


@pytest.mark.parametrize("old, new, in_toml, words, value", RENAMED)
def test_old_names_and_values_are_read(old, new, in_toml, words, value, capsys):
    section = flat_names(Recipe)[new]
    head = f"[{section}]\n" if section else ""
    expected = {**flatten(DEFAULT), new: value}
    assert flatten(from_toml(Recipe, f'run_name = "x"\n{head}{old} = {in_toml}\n', "r")) == expected
    assert flatten(options(f"--{old}", *words)) == expected
    assert (value if old == new else "--" + new.replace("_", "-")) in capsys.readouterr().err
    assert flatten(options(f"--{old.replace('_', '-')}" + "".join(f"={word}" for word in words))) == expected
    assert Recipe.RENAMED.settings({old: words[0] if isinstance(value, str) else value}) == {new: value}


def test_every_old_name_is_tested():
    assert {old for old, new, *_ in RENAMED if old != new} == {*Recipe.RENAMED.names} - {"sources"}
    tested = {(new, words[0]) for _, new, _, words, value in RENAMED if words and words[0] != str(value)}
    renamed = {(name, old) for name, values in Recipe.RENAMED.values.items() for old in values}
    assert renamed == tested


def test_old_mixture_and_negated_switches_are_read(capsys):
    toml = '[data]\nsources = [{path = "a", weight = 0.7}]\n'
    assert from_toml(Recipe, toml, "r").data == options("--sources", "a=0.7").data
    assert not options("--no-save-in-background").checkpoints.async_checkpoint
    assert "--no-async-checkpoint" in capsys.readouterr().err


def test_unknown_old_value_is_refused():
    with pytest.raises(ValueError, match="loss"):
        from_toml(Recipe, '[compute]\nhead = "half"\n', "r")


@pytest.mark.parametrize("name", recipe_names())
def test_resolved_recipe_leaves_nothing_open(name):
    """Only settings for which None means off stay None."""
    recipe = load_recipe(name)
    compute = Compute(device="cuda", precision="bf16", compile=True, attention="fused", loss="full")
    model = dataclasses.replace(recipe.model, vocab_size=50257)
    resources = Resources("cuda", 10**15, 4, 4)
    resolved = resolve(recipe, model, DataConfig(data="data/x", tokenizer="gpt2"), compute, resources)
    assert not [each for each in vars(resolved).values() if each is None]
    assert not [each for each in vars(resolved.compute).values() if each is None]
    decided = ("vocab_size", "device", "precision", "compile", "attention", "loss", "micro_batch_size")
    settings = flatten(resolved.recipe)
    assert not [setting for setting in (*decided, "total_steps") if settings[setting] is None]
    assert settings["total_tokens"] is None
    assert settings["total_steps"] == resolved.total_steps
    assert not [field for field, kind in field_types(Resolved).items() if "None" in str(kind)]
    again = resolve(resolved.recipe, model, resolved.recipe.data, compute, resources)
    assert again == resolved


@pytest.fixture
def parse(monkeypatch):
    """The recipe that `overnight train` makes of words."""
    found: list[Recipe] = []
    monkeypatch.setattr(run_command, "run", lambda recipe, resumed: found.append(recipe))

    def read(*words):
        assert main(["train", *words]) == 0
        return found.pop()

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
