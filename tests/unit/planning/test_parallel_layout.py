"""The memory and the speed of several processes."""

from __future__ import annotations

from typing import Any

import pytest

from overnight.hardware import GB
from overnight.model.presets import PRESETS
from overnight.planning.network import BETWEEN, ParallelLayout, predict_step, scale_cost
from overnight.planning.page import plan_text, plan_to_json
from overnight.training.memory import estimate_memory, fits_into

from .conftest import COST, SELECTIVE, PlanFor

RAMP = {"batch_ramp_start_tokens": 131_072}  # rows enough for 64 processes in the first steps of gpt3-13b


@pytest.mark.parametrize("device", ["h100", "h200", "a100-80gb"])
@pytest.mark.parametrize("machines", [1, 8])
@pytest.mark.parametrize("name", ["gpt2-1558m", "gpt3-13b"])
def test_plan_shows_how_large_models_fit(plan_for: PlanFor, name: str, machines: int, device: str) -> None:
    more = RAMP if (name, machines) == ("gpt3-13b", 8) else {}
    plan = plan_for(name, device, processes=8, machines=machines, **more)
    if not plan.fits:
        assert (name, machines) == ("gpt3-13b", 1)
        assert "--activation-checkpointing selective" in plan.fit_options[0].options
        plan = plan_for(name, device, processes=8, **SELECTIVE)
    assert plan.fits
    found = plan_to_json(plan)
    assert found["needed_bytes"] < 0.9 * found["device_memory_bytes"]
    assert found["all_processes"] == 8 * machines
    assert found["micro_batches_per_step"] % found["all_processes"] == 0
    worst, best = found["efficiency_range"]
    assert 0 < worst <= best <= 1
    slow, fast = found["tokens_per_second_range"]
    assert slow < found["tokens_per_second"] < fast


def test_plan_has_the_sharding_of_training(plan_for: PlanFor) -> None:
    plan = plan_for("gpt3-13b", "h200", processes=8, machines=8, **RAMP)
    resolved = plan.resolved
    assert plan.layout.sharding == resolved.compute.sharding == "hsdp"
    rows = resolved.plan.micro_batch_size
    assert plan.memory == estimate_memory(resolved.model, rows, resolved.compute, 64, 8)
    needed = plan_to_json(plan)["needed_bytes_by_sharding"]
    assert {name: fits_into(141 * GB, each) for name, each in needed.items()} == {
        "none": False,
        "zero1": False,
        "hsdp": True,
    }
    assert needed["hsdp"] == plan.needed_bytes


def test_requested_sharding_is_used(plan_for: PlanFor) -> None:
    plan = plan_for("gpt2-124m", "h100", processes=8, sharding="fsdp")
    assert (plan.layout.sharding, [*plan.needed_bytes_by_sharding]) == ("fsdp", ["fsdp"])
    assert plan.memory.gathered > 0


def test_single_process_has_no_communication(plan_for: PlanFor) -> None:
    plan = plan_for("gpt2-124m", "h100", processes=1)
    assert (plan.communication, plan.needed_bytes_by_sharding) == (None, {})
    assert plan.device_name == "one h100"
    assert scale_cost(plan.layout, plan.resolved.model, COST, 0.5) == COST


@pytest.mark.parametrize("sharding", ["none", "zero1"])
def test_communication_once_a_step_is_added_to_the_update(plan_for: PlanFor, sharding: Any) -> None:
    plan = plan_for("gpt2-124m", "h100", processes=8, sharding=sharding)
    model, layout = plan.resolved.model, plan.layout
    seconds = predict_step(model, layout, 3, 3 * COST.micro_batch).communication_seconds_per_step
    update = COST.update if sharding == "none" else COST.update / 8
    assert scale_cost(layout, model, COST, 0.5) == COST._replace(
        micro_batch=COST.micro_batch / 8,
        update=pytest.approx(update + seconds),
        evaluated_token=COST.evaluated_token / 8,
    )


def test_communication_of_every_micro_batch_overlaps_or_not(plan_for: PlanFor) -> None:
    plan = plan_for("gpt2-1558m", "h100", processes=8, sharding="fsdp")
    layout, model = plan.layout, plan.resolved.model
    seconds = predict_step(model, layout, 1, 0.45).communication_seconds_per_step
    full, half, none = (scale_cost(layout, model, COST, overlap).step(16) for overlap in (1.0, 0.5, 0.0))
    assert full == pytest.approx(2 * max(0.45, seconds) + 0.01)
    assert none == pytest.approx(2 * (0.45 + seconds) + 0.01)
    assert half == pytest.approx((full + none) / 2)


@pytest.mark.parametrize("machines", [1, 2])
def test_processes_on_a_cpu_share_its_cores(machines: int) -> None:
    """Four at a time, each four times as slow."""
    layout = ParallelLayout(machines=machines, processes_per_machine=4)
    cost = scale_cost(layout, PRESETS["gpt2-124m"], COST, 0.5)
    assert (cost.micro_batch, cost.update) == (COST.micro_batch / machines, 4 * COST.update)


def test_figures_of_a_cluster_agree(plan_for: PlanFor) -> None:
    cluster = {"processes": 8, "machines": 8, "dollars_per_hour": 24.0}
    plan = plan_for("gpt2-1558m", "h100", network="100g", **cluster)
    assert all(question in plan_text(plan) for question in ("How well together?", "How much money?"))
    found = plan_to_json(plan)
    assert found["dollars"] == pytest.approx(8 * 24 * found["seconds"] / 3600)
    compute, communication = found["compute_seconds_per_step"], found["communication_seconds_per_step"]
    assert not found["communication_overlaps"]
    assert found["efficiency_range"] == pytest.approx([compute / (compute + communication)] * 2)
    assert found["step_seconds"] == pytest.approx(compute + communication)
    assert found["tokens_per_second"] == pytest.approx(found["tokens_per_step"] / found["step_seconds"])
    assert found["mfu"] == pytest.approx(0.4 * found["efficiency_range"][0])
    networks = found["efficiency_range_by_network"]
    assert networks.keys() == {"400 Gb/s", "8 x 400 Gb/s"}
    assert networks["8 x 400 Gb/s"][0] > 2 * found["efficiency_range"][0]
    other = plan_to_json(plan_for("gpt2-1558m", "h100", network="8x400g", **cluster))
    assert other["efficiency_range"][0] == networks["8 x 400 Gb/s"][0]
    assert other["link_between"]["source"] == BETWEEN["8x400g"].source
    alone = plan_to_json(plan_for("gpt2-1558m", "h100", processes=8, dollars_per_hour=24.0))
    assert alone["dollars"] < found["dollars"], "communication has its price"


@pytest.mark.parametrize(
    "device, link", [("h100", "NVLink 4"), ("v100-16gb", "NVLink 2"), ("h100-pcie", "PCIe"), ("t4", "PCIe")]
)
def test_devices_without_nvlink_use_pcie(plan_for: PlanFor, device: str, link: str) -> None:
    assert plan_for("gpt2-124m", device, processes=2).layout.within.name == link


def test_plan_suggests_larger_micro_batches_with_fsdp(plan_for: PlanFor) -> None:
    settings = {"processes": 8, "sharding": "fsdp", **SELECTIVE}
    small, larger = (
        plan_to_json(plan_for("gpt3-13b", "h100", micro_batch_size=rows, **settings)) for rows in (1, 2)
    )
    assert small["faster_options"] == "--micro-batch-size 2"
    assert larger["step_seconds"] == pytest.approx(small["faster_step_seconds"])
    assert larger["step_seconds"] < 0.95 * small["step_seconds"]
    assert larger["faster_options"] is None, "a process has no more rows in the first steps"


def test_activation_checkpointing_takes_longer(plan_for: PlanFor) -> None:
    plain, again = (
        plan_to_json(plan_for("gpt2-1558m", "h100", processes=8, activation_checkpointing=level))
        for level in ("none", "block")
    )
    assert 1.2 < again["compute_seconds_per_step"] / plain["compute_seconds_per_step"] < 4 / 3
