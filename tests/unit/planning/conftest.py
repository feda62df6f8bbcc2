"""Plans of shipped recipes with changed settings, on machines that this one only seems to be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from overnight.config import flat_names
from overnight.planning import PlanConfig, measure
from overnight.planning import command as planning_command
from overnight.planning.command import plan_recipe
from overnight.planning.estimate import StepCost
from overnight.planning.plan import Plan
from overnight.recipe import Recipe, load_recipe, with_settings

COST = StepCost(
    micro_batch=0.45, update=0.08, start=40.0, evaluated_token=8e-6, sampled_token=2e-3, saved_byte=1e-9
)
SELECTIVE = {"activation_checkpointing": "selective"}


def plan_config(name: str, **settings: Any) -> PlanConfig:
    """The configuration of `overnight plan NAME --SETTING VALUE ...`."""
    of_recipe = {setting: settings.pop(setting) for setting in flat_names(Recipe) if setting in settings}
    return PlanConfig(**vars(with_settings(load_recipe(name), **of_recipe)), **settings)


PlanFor = Callable[..., Plan]


@pytest.fixture
def plan_for(monkeypatch: pytest.MonkeyPatch) -> PlanFor:
    """plan_for(recipe, device type, **settings) -> its plan, for which nothing may be measured."""
    monkeypatch.setattr(measure, "measure_step_costs", lambda *_: pytest.fail("measured"))

    def plan(name: str, device_type: str | None = None, **settings: Any) -> Plan:
        return plan_recipe(plan_config(name, device_type=device_type, **settings), name)

    return plan


PretendMachine = Callable[..., None]


@pytest.fixture
def pretend_machine(monkeypatch: pytest.MonkeyPatch) -> PretendMachine:
    """pretend_machine(name=value, ...): these functions of planning.command return these values."""

    def pretend(**values: Any) -> None:
        for name, value in values.items():
            monkeypatch.setattr(planning_command, name, lambda *_, value=value: value)

    return pretend
