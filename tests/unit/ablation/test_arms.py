"""The arms that a command line asks for. What is refused, and how, is in tests/run/test_commands.py."""

from __future__ import annotations

from typing import Any

import pytest

from overnight.ablation import AblationConfig
from overnight.ablation.arms import (
    LONGEST_NAME,
    SWITCHES,
    Arm,
    build_arms,
    keep_schedule,
    read_seeds,
    tuning_seed,
)
from overnight.model.model_config import ModelConfig
from overnight.recipe import Recipe, flatten, with_settings

OWN = vars(AblationConfig()).keys() - vars(Recipe()).keys()
MODERN = {"positions": "rotary", "qk_norm": True, "rotary_base": 5000.0, "optimizer": "muon"}
SMALL = with_settings(
    Recipe(run_name="small", model=ModelConfig(n_layer=2, n_head=2, n_embd=32)), total_steps=10
)


def arms_of(other: Recipe | None = None, **given: Any) -> list[Arm]:
    """The arms of a recipe, SMALL with the switches of `given`, named modern."""
    own = {name: given.pop(name) for name in OWN & given.keys()}
    config = AblationConfig(**vars(with_settings(SMALL, **given)), **own)
    return build_arms(config, "recipes/modern.toml", other)


def test_leaving_out_sets_back_to_gpt2() -> None:
    arms = arms_of(**MODERN, leave_out=("qk_norm,positions+rotary-base", "optimizer"))
    assert [arm.name for arm in arms] == [
        *("modern", "without-qk_norm", "without-positions-rotary_base", "without-optimizer")
    ]
    assert arms[1].changes_from(arms[0]) == {"qk_norm": (True, False)}
    changed = arms[2].changes_from(arms[0])
    assert changed == {"positions": ("rotary", "learned"), "rotary_base": (5000.0, 10000.0)}
    assert SWITCHES["optimizer"] == "adamw"


def test_adding_reads_values_as_options_do() -> None:
    words = (
        "positions=rotary,qk-norm=true",
        "optimizer=muon+matrix_learning_rate=2e+2+beta1=0.8",
        "logit_softcap=15",
    )
    arms = arms_of(add=words)
    changes = [{name: new for name, (_, new) in arm.changes_from(arms[0]).items()} for arm in arms[1:]]
    assert changes == [
        {"positions": "rotary"},
        {"qk_norm": True},
        {"optimizer": "muon", "matrix_learning_rate": 200.0, "beta1": 0.8},
        {"logit_softcap": 15.0},
    ]
    assert arms[3].name == "optimizer=muon-matrix_learning_rate=2e-2-beta1=0.8"


def test_long_names_fit_a_folder_and_stay_apart() -> None:
    settings = "positions=rotary+optimizer=muon+matrix_learning_rate=0.02+embedding_learning_rate=0.3+"
    settings += "scalar_learning_rate=0.02+beta1=0.8+weight_decay=0.05+epsilon=1e-10+max_grad_norm="
    arms = arms_of(add=(f"{settings}2", f"{settings}3"))
    names = [arm.name for arm in arms[1:]]
    assert all(len(name.encode()) <= LONGEST_NAME for name in names)
    assert len({name[: LONGEST_NAME - 9] for name in names}) == 1  # without the digest they would be one
    assert len({*names}) == 2


def test_baseline_is_first_and_control_repeats_it() -> None:
    arms = arms_of(SMALL, baseline="gpt2.toml", control=True, qk_norm=True)
    assert [arm.name for arm in arms] == ["gpt2", "modern", "control"]
    assert arms[2].recipe == arms[0].recipe
    assert {flatten(arm.recipe)["keep_checkpoints"] for arm in arms} == {1}


def test_arms_are_tuned_where_a_setting_has_a_meaning() -> None:
    tune = ("matrix_learning_rate=0.01,0.02", "peak_learning_rate=1e-3,2e-3,4e-3")
    arms = arms_of(add=("optimizer=muon",), tune=tune)
    assert [len(arm.grid) for arm in arms] == [3, 6]
    assert arms[1].grid[0] == {"matrix_learning_rate": 0.01, "peak_learning_rate": 1e-3}


def test_shape_of_a_schedule_is_kept_unless_it_is_given() -> None:
    whole = with_settings(
        SMALL, total_steps=1000, warmup_steps=100, learning_rate_decay="wsd", decay_steps=700
    )
    short = keep_schedule(with_settings(whole, total_tokens=100 * whole.batch.tokens_per_step), whole)
    assert (short.schedule.warmup_steps, short.schedule.decay_steps) == (10, 70)
    given = keep_schedule(with_settings(whole, total_steps=100, warmup_steps=5), whole)
    assert (given.schedule.warmup_steps, given.schedule.decay_steps) == (5, 70)
    assert keep_schedule(whole, whole) == whole


@pytest.mark.parametrize(
    ("given", "seeds", "tuned"),
    [("3", (1337, 1338, 1339), 1336), ("7,5", (7, 5), 4), ("0,1", (0, 1), 2)],
)
def test_seeds(given: str, seeds: tuple[int, ...], tuned: int) -> None:
    found = read_seeds(AblationConfig(run_name="x", seeds=given))
    assert found == seeds
    assert tuning_seed(found) == tuned
    assert tuned not in seeds
