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
from overnight.recipe import Recipe, load_recipe, with_settings

COST = StepCost(
    micro_batch=0.5, update=0.08, start=40.0, evaluated_token=8e-6, sampled_token=2e-3, saved_byte=1e-9
)


def plan_config(name: str, **settings: Any) -> PlanConfig:
    """The configuration of `overnight plan NAME --SETTING VALUE ...`."""
    of_recipe = {setting: settings.pop(setting) for setting in flat_names(Recipe) if setting in settings}
    return PlanConfig(**vars(with_settings(load_recipe(name), **of_recipe)), **settings)


@pytest.fixture
def plan_for() -> Callable[..., Plan]:
    """plan_for(recipe, device type, **settings) -> its plan."""

    def plan(name: str, device_type: str, **settings: Any) -> Plan:
        return plan_recipe(plan_config(name, device_type=device_type, **settings), name)

    return plan
