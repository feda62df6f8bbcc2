"""The recipes that come with the package: sound, short, and equal to the papers they follow."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest

from overnight.config import from_toml, to_toml
from overnight.model.presets import PRESETS
from overnight.recipe import Recipe, flatten, load_recipe, recipe_names
from overnight.training.batch import BatchPlan, plan_batches
from overnight.training.schedule import learning_rate_multiplier

RECIPES = Path(__file__).parents[1] / "src/overnight/recipes"

# GPT-3 paper, table 2.1, copied a second time: batch in tokens as printed, learning rate.
GPT3_BATCH_AND_RATE = {
    "125m": (0.5e6, 6.0e-4),
    "350m": (0.5e6, 3.0e-4),
    "760m": (0.5e6, 2.5e-4),
    "1.3b": (1e6, 2.0e-4),
    "2.7b": (1e6, 1.6e-4),
    "6.7b": (2e6, 1.2e-4),
    "13b": (2e6, 1.0e-4),
    "175b": (3.2e6, 0.6e-4),
}


def repeated_defaults(recipe: str) -> list[str]:
    """The settings in a recipe's text that have their default value."""
    defaults = flatten(Recipe())
    sections = {field.name for field in fields(Recipe)}
    written = {}
    for name, value in tomllib.loads(recipe).items():
        written.update(value if name in sections and isinstance(value, dict) else {name: value})
    return [name for name, value in written.items() if defaults[name] == value]


def test_every_recipe_is_listed() -> None:
    assert recipe_names() == sorted(path.stem for path in RECIPES.glob("*.toml"))
    assert set(PRESETS) <= set(recipe_names())


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_is_sound_and_states_its_promise(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.problems() == []
    assert recipe.run_name == name
    assert from_toml(Recipe, to_toml(recipe), name) == recipe
    text = (RECIPES / f"{name}.toml").read_text(encoding="utf-8")
    head = text.split("\n\n")[0]
    assert all(line.startswith("# ") for line in head.splitlines())
    assert "Promises:" in head
    assert repeated_defaults(text) == []


def test_repeated_default_is_found() -> None:
    assert repeated_defaults("seed = 1337\n[model]\nn_layer = 12\nn_head = 2\n") == ["seed", "n_layer"]


@pytest.mark.parametrize("name", PRESETS)
def test_recipe_has_published_size(name: str) -> None:
    assert replace(load_recipe(name).model, vocab_size=50257) == PRESETS[name]


@pytest.mark.parametrize("name", GPT3_BATCH_AND_RATE)
def test_gpt3_recipe_follows_table(name: str) -> None:
    recipe = load_recipe(f"gpt3-{name}")
    batch, rate = GPT3_BATCH_AND_RATE[name]
    assert recipe.batch.tokens_per_step == pytest.approx(batch, rel=0.05)
    assert recipe.batch.tokens_per_step % recipe.model.context_length == 0
    assert recipe.optimizer.peak_learning_rate == pytest.approx(rate)
    assert recipe.schedule.total_tokens == 300_000_000_000
    assert recipe.batch.batch_ramp_start_tokens == 32 * 1024
    assert 4e9 <= (recipe.batch.batch_ramp_tokens or 0) <= 12e9


def gpt3_schedule(name: str) -> tuple[BatchPlan, Callable[[float], float]]:
    """The steps of a GPT-3 recipe; its learning rate, as a share of the peak, by full steps done."""
    recipe = load_recipe(f"gpt3-{name}")
    plan = plan_batches(recipe.batch, recipe.model.context_length, rows_that_fit=16)
    length = plan.full_steps_before(plan.steps_for(recipe.schedule.total_tokens or 0))
    return plan, lambda position: learning_rate_multiplier(position, length, recipe.schedule)


def papers_rate(tokens: int) -> float:
    """GPT-3's learning rate after `tokens` tokens, as a share of its peak (appendix B)."""
    done = min(1.0, max(0.0, (tokens - 375e6) / (260e9 - 375e6)))
    return min(tokens / 375e6, 0.55 + 0.45 * math.cos(math.pi * done))


@pytest.mark.parametrize("name", GPT3_BATCH_AND_RATE)
def test_gpt3_recipe_has_papers_rate_while_batch_grows(name: str) -> None:
    plan, rates = gpt3_schedule(name)
    steps = [*range(0, 20_000, 20), *range(20_000, plan.steps_for(300_000_000_000), 500)]
    papers = [papers_rate(plan.tokens_before(step + 1)) for step in steps]
    assert [rates(plan.full_steps_before(step + 1) - 1) for step in steps] == pytest.approx(papers, abs=0.01)
    by_steps = max(abs(rates(step) - rate) for step, rate in zip(steps, papers, strict=True))
    assert by_steps > 0.5  # negative control: counting a ramp's first steps as full ones
    for tokens, least, most in [(365e6, 0, 0.99), (375e6, 1, 1), (255e9, 0.1005, 1), (260e9, 0.1, 0.1)]:
        after = rates(plan.full_steps_before(plan.steps_for(int(tokens)) + 1) - 1)
        assert least - 1e-6 < after < most + 1e-6, "warmup and decay end at the paper's tokens"
