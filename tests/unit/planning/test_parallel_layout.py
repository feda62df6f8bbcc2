from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from overnight.distributed.world import World
from overnight.hardware import GB
from overnight.model.model_config import PRESETS
from overnight.planning import command as planning_command
from overnight.planning import measure
from overnight.planning.command import command_after_plan, plan_recipe
from overnight.planning.communication import predict_step, scale_cost
from overnight.planning.network import BETWEEN, ParallelLayout
from overnight.planning.page import plan_text
from overnight.planning.plan import Plan, plan_to_json
from overnight.training import Compute
from overnight.training.memory import estimate_memory, fits_into

from .conftest import COST, plan_config

PlanFor = Callable[..., Plan]
RAMP = {"batch_ramp_start_tokens": 131_072}  # rows enough for 64 processes in the first steps of gpt3-13b
SELECTIVE = {"activation_checkpointing": "selective"}


# The memory of each process.


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
    layout, resolved = plan.layout, plan.resolved
    assert layout.sharding == resolved.compute.sharding == "hsdp"
    rows = resolved.plan.micro_batch_size
    assert plan.memory == estimate_memory(resolved.model, rows, resolved.compute, 64, 8)
    needed = plan_to_json(plan)["needed_bytes_by_sharding"]
    assert [*needed] == ["none", "zero1", "hsdp"]
    assert needed["hsdp"] == plan.needed_bytes
    assert [fits_into(141 * GB, each) for each in needed.values()] == [False, False, True]


def test_requested_sharding_is_used(plan_for: PlanFor) -> None:
    plan = plan_for("gpt2-124m", "h100", processes=8, sharding="fsdp")
    assert (plan.layout.sharding, [*plan.needed_bytes_by_sharding]) == ("fsdp", ["fsdp"])
    assert plan.memory.gathered > 0
    tight = plan_for("gpt3-6.7b", "h100", processes=8, sharding="none")
    assert tight.fits is False
    assert tight.fit_options[0].options.startswith("--sharding fsdp ")
    config = plan_config("gpt3-6.7b", processes=8, device_type="h100", sharding="none")
    words = command_after_plan(tight, config)
    assert "--sharding fsdp" in words
    assert "--sharding none" not in words


def test_plan_suggests_several_gpus(plan_for: PlanFor) -> None:
    alone = plan_for("gpt3-13b", "h100")
    assert alone.fit_in_processes is not None
    assert alone.fit_in_processes.options == "--processes 4 --activation-checkpointing selective"
    assert plan_for("gpt3-13b", "h100", processes=4, **SELECTIVE).fits
    assert plan_for("gpt2-124m", "h100").fit_in_processes is None


# The speed of all processes together.


def test_single_process_has_no_communication(plan_for: PlanFor) -> None:
    plan = plan_for("gpt2-124m", "h100", processes=1)
    assert (plan.communication, plan.needed_bytes_by_sharding) == (None, {})
    assert plan.device_name == "one h100"
    assert scale_cost(plan.layout, plan.resolved.model, COST, 0.5) == COST


@pytest.mark.parametrize("sharding", ["none", "zero1"])
def test_communication_once_a_step_is_added_to_the_update(plan_for: PlanFor, sharding: Any) -> None:
    plan = plan_for("gpt2-124m", "h100", processes=8, sharding=sharding)
    cost = scale_cost(plan.layout, plan.resolved.model, COST, 0.5)
    step = predict_step(plan.resolved.model, plan.layout, 3, 3 * COST.micro_batch)
    update = COST.update if sharding == "none" else COST.update / 8
    assert cost.step(24) == pytest.approx(3 * 0.5 + update + step.communication_seconds_per_step)
    assert cost.evaluated_token == COST.evaluated_token / 8
    assert (cost.start, cost.saved_byte) == (COST.start, COST.saved_byte)


def test_communication_of_every_micro_batch_overlaps_or_not(plan_for: PlanFor) -> None:
    plan = plan_for("gpt2-1558m", "h100", processes=8, sharding="fsdp")
    layout, model = plan.layout, plan.resolved.model
    seconds = predict_step(model, layout, 1, 0.5).communication_seconds_per_step
    full, half, none = (scale_cost(layout, model, COST, overlap).step(16) for overlap in (1.0, 0.5, 0.0))
    assert full == pytest.approx(2 * max(0.5, seconds) + 0.01)
    assert none == pytest.approx(2 * (0.5 + seconds) + 0.01)
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
    plan = plan_for("gpt3-13b", "h100", micro_batch_size=1, **settings)
    assert plan.communication is not None
    assert plan.communication.faster_options == "--micro-batch-size 2"
    faster = plan_for("gpt3-13b", "h100", micro_batch_size=2, **settings)
    seconds = plan_to_json(faster)["step_seconds"]
    assert seconds == pytest.approx(plan.communication.faster_step_seconds)
    assert seconds < 0.95 * plan_to_json(plan)["step_seconds"]
    assert faster.communication is not None
    assert faster.communication.faster_options is None, "a process has no more rows in the first steps"


def test_activation_checkpointing_takes_longer(plan_for: PlanFor) -> None:
    plain, again = (
        plan_to_json(plan_for("gpt2-1558m", "h100", processes=8, activation_checkpointing=level))
        for level in ("none", "block")
    )
    assert 1.2 < again["compute_seconds_per_step"] / plain["compute_seconds_per_step"] < 4 / 3


# This machine.


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine seems to have two A100 of 80 GB; nothing can be computed on them."""
    compute = Compute(device="cuda", precision="bf16", compile=True, attention="fused", loss="full")
    for name, value in {
        "open_world": World(rank=0, size=1, device="cuda"),
        "count_processes": 2,
        "find_device_name": "NVIDIA A100-SXM4-80GB",
        "find_memory_bytes": 80 * GB,
    }.items():
        monkeypatch.setattr(planning_command, name, lambda *_, value=value: value)
    monkeypatch.setattr(
        planning_command,
        "resolve_compute",
        lambda config, _: replace(compute, activation_checkpointing=config.activation_checkpointing),
    )


def test_one_process_is_measured_and_the_others_predicted(
    two_gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    cost = COST._replace(micro_batch=0.45, update=0.1)

    def measured(resolved: Any, *_: object) -> measure.Measurement:
        return measure.Measurement([cost] * 3, resolved, 0, 40 * GB, 41 * GB)

    monkeypatch.setattr(measure, "measure_step_costs", measured)
    config = plan_config("gpt2-124m", processes="auto")
    plan = plan_recipe(config, "gpt2-124m")
    assert plan.assumption is None
    assert plan.device_name == "2 x NVIDIA A100-SXM4-80GB"
    found = plan_to_json(plan)
    assert found["link_within"]["name"] == "NVLink 3"
    each = found["micro_batches_per_step"] // 2
    assert found["compute_seconds_per_step"] == pytest.approx(each * 0.45 + 0.1)
    communication = found["communication_seconds_per_step"]
    assert found["step_seconds"] == pytest.approx(each * 0.45 + 0.1 + communication)
    assert found["peak_memory_bytes"] == 40 * GB
    assert command_after_plan(plan, config) == "next: overnight train gpt2-124m --processes auto"


def test_model_too_large_for_one_gpu_is_estimated(two_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "measure_step_costs", lambda *_: pytest.fail("measured"))
    config = plan_config("gpt3-6.7b", processes=2, machines=4, **SELECTIVE)
    plan = plan_recipe(config, "gpt3-6.7b")
    assert plan.fits
    assert plan.layout.sharding in {"fsdp", "hsdp"}
    assert "too large to be measured" in str(plan.assumption)
    assert plan.forecast is not None
    words = command_after_plan(replace(plan, assumption=None), config)
    assert "torchrun --nnodes 4 --nproc-per-node 2 " in words
    assert words.endswith("-m overnight train gpt3-6.7b --activation-checkpointing selective")


def test_processes_on_this_cpu_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning_command, "find_memory_bytes", lambda _: 8 * GB)
    monkeypatch.setattr(
        measure,
        "measure_step_costs",
        lambda resolved, *_: measure.Measurement([COST] * 3, resolved, 0, None, None),
    )
    plan = plan_recipe(plan_config("quickstart", processes=2, device="cpu"), "quickstart")
    assert plan.device_memory_bytes == 4 * GB
    assert plan.device_name.startswith("2 processes on ")
    assert "efficiency_range" not in plan_to_json(plan)
    assert "How well together?" not in plan_text(plan)
