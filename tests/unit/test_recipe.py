from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from overnight.config import from_toml, to_toml
from overnight.model.model_config import PRESETS
from overnight.recipe import RESUME_MUTABLE, Recipe, flatten, incompatible_settings, load_recipe, recipe_names


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_is_sound_and_named_after_its_file(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.run_name == name
    assert recipe.problems() == []
    assert from_toml(Recipe, to_toml(recipe), name) == recipe


@pytest.mark.parametrize("name", PRESETS)
def test_the_recipes_of_gpt2_and_gpt3_have_the_papers_sizes(name: str) -> None:
    assert dataclasses.replace(load_recipe(name).model, vocab_size=50257) == PRESETS[name]


@pytest.mark.parametrize(
    "name, learning_rate, tokens_per_step",
    [
        ("gpt3-125m", 6.0e-4, 0.5e6),
        ("gpt3-350m", 3.0e-4, 0.5e6),
        ("gpt3-760m", 2.5e-4, 0.5e6),
        ("gpt3-1.3b", 2.0e-4, 1e6),
        ("gpt3-2.7b", 1.6e-4, 1e6),
        ("gpt3-6.7b", 1.2e-4, 2e6),
        ("gpt3-13b", 1.0e-4, 2e6),
        ("gpt3-175b", 0.6e-4, 3.2e6),
    ],
)
def test_gpt3_recipes_have_table_2_1s_learning_rates_and_batches(
    name: str, learning_rate: float, tokens_per_step: float
) -> None:
    recipe = load_recipe(name)
    assert recipe.optimizer.peak_learning_rate == learning_rate
    assert recipe.batch.tokens_per_step == pytest.approx(tokens_per_step, rel=0.05)


def test_a_recipe_may_be_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine-1.5.toml"
    path.write_text("[schedule]\ntotal_steps = 3\n")
    assert load_recipe(str(path)).run_name == "mine-1.5"


def test_every_setting_is_either_science_or_may_change() -> None:
    settings = flatten(Recipe(run_name="x"))
    assert set(settings) >= RESUME_MUTABLE
    science = {"n_layer", "seed", "peak_learning_rate", "tokens_per_step", "data", "tokenizer", "precision"}
    assert not science & RESUME_MUTABLE


@pytest.mark.parametrize("name", sorted(flatten(Recipe(run_name="x"))))
def test_a_change_of_each_setting_is_seen_unless_it_may_change(name: str) -> None:
    before = Recipe(run_name="x")
    after = dataclasses.replace(before)
    for section in dataclasses.fields(Recipe):
        part = getattr(before, section.name)
        if section.name == name and not dataclasses.is_dataclass(part):
            after = dataclasses.replace(before, **{name: "changed"})
        elif dataclasses.is_dataclass(part) and hasattr(part, name):
            after = dataclasses.replace(
                before,
                **{section.name: dataclasses.replace(part, **{name: "changed"})},  # type: ignore[type-var]
            )
    assert bool(incompatible_settings(after, before)) == (name not in RESUME_MUTABLE)
