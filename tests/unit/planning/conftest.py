"""Plans of shipped recipes with changed settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from overnight.config import flat_names
from overnight.planning import PlanConfig
from overnight.planning.command import plan_recipe
from overnight.planning.estimate import StepCost
from overnight.planning.plan import Plan
from overnight.recipe import Recipe, load_recipe

COST = StepCost(
    micro_batch=0.5, update=0.08, start=40.0, evaluated_token=8e-6, sampled_token=2e-3, saved_byte=1e-9
)


def plan_config(name: str, **settings: Any) -> PlanConfig:
    """The configuration of `overnight plan NAME --SETTING VALUE ...`."""
    values = vars(load_recipe(name)).copy()
    sections = flat_names(Recipe)
    for setting, value in settings.items():
        if section := sections.get(setting):
            values[section] = type(values[section])(**{**vars(values[section]), setting: value})
        else:
            values[setting] = value
    return PlanConfig(**values)


@pytest.fixture
def plan_for() -> Callable[..., Plan]:
    """plan_for(recipe, device type, **settings) -> its plan."""

    def plan(name: str, device_type: str, **settings: Any) -> Plan:
        return plan_recipe(plan_config(name, device_type=device_type, **settings), name)

    return plan
