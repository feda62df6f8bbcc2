from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from overnight.cli import main
from overnight.distributed import launcher
from overnight.distributed.world import World
from overnight.hardware import DEVICES, GB
from overnight.planning import command as planning_command
from overnight.planning import measure
from overnight.planning.command import command_after_plan, plan_recipe
from overnight.planning.page import plan_text, plan_to_json
from overnight.training import Compute

from .conftest import COST, SELECTIVE, PlanFor, PretendMachine, plan_config

# Another machine.


@pytest.mark.parametrize("device", [device.name for device in DEVICES if device.fp32])
def test_every_device_with_a_rate_can_be_estimated(plan_for: PlanFor, device: str) -> None:
    plan = plan_for("gpt2-124m", device, dollars_per_hour=3.0)
    assert "ESTIMATE, not measured" in plan_text(plan)
    found = plan_to_json(plan)
    assert not found["measured"]
    slow, fast = found["tokens_per_second_range"]
    assert slow < found["tokens_per_second"] < fast
    rows, micro_batches = found["micro_batch_size"], found["micro_batches_per_step"]
    assert rows * micro_batches * 1024 == found["tokens_per_step"] == 524_288
    trained, evaluated = found["total_tokens"], 78 * 10_485_760  # at the start, each 250 steps, at the end
    seconds = {"training": trained, "evaluation": evaluated / 3}
    for use, tokens in seconds.items():
        assert found["seconds_by_use"][use] == pytest.approx(tokens / found["tokens_per_second"])
    assert found["seconds"] == pytest.approx(sum(found["seconds_by_use"].values()))
    assert found["dollars"] == pytest.approx(3 * found["seconds"] / 3600)


@pytest.mark.parametrize("device, measured", [("a100-40gb", (115e3, 145e3)), ("h200", (488e3, 491e3))])
def test_estimates_include_published_measurements(
    plan_for: PlanFor, device: str, measured: tuple[float, float]
) -> None:
    """On one A100 llm.c's pull request 323, with PyTorch's lower; on one H200 modded-nanogpt's track 3."""
    slow, fast = plan_to_json(plan_for("gpt2-124m", device))["tokens_per_second_range"]
    assert all(slow < tokens_per_second < fast for tokens_per_second in measured)


@pytest.mark.parametrize(
    "device, precision, memory_gb", [("t4", "fp16", 16), ("m1-max", "fp32", None), ("h200", "bf16", 141)]
)
def test_estimate_has_native_precision_and_memory(
    plan_for: PlanFor, device: str, precision: str, memory_gb: int | None
) -> None:
    plan = plan_for("gpt2-124m", device)
    memory_bytes = memory_gb and memory_gb * GB
    assert (plan.resolved.compute.precision, plan.device_memory_bytes) == (precision, memory_bytes)
    assert plan.fits is (None if memory_gb is None else True)


@pytest.mark.parametrize(
    "name, settings, suggested",
    [
        ("gpt2-1558m", {"device_type": "rtx-4090"}, "gpt2-774m --device-type rtx-4090"),
        (
            "gpt2-350m",
            {"device_type": "t4", "micro_batch_size": 64},
            "gpt2-350m --micro-batch-size 4 --device-type t4",
        ),
        (
            "gpt3-6.7b",
            {"device_type": "h100", "processes": 8, "sharding": "none"},
            "gpt3-6.7b --processes 8 --sharding fsdp --micro-batch-size 2 --device-type h100",
        ),
    ],
)
def test_suggested_plan_fits(
    plan_for: PlanFor,
    capsys: pytest.CaptureFixture[str],
    name: str,
    settings: dict[str, Any],
    suggested: str,
) -> None:
    plan = plan_for(name, **settings)
    assert (plan.fits, plan.forecast) == (False, None)
    model, *_ = suggested.split()
    assert model in plan_text(plan)
    assert command_after_plan(plan, plan_config(name, **settings)) == f"next: overnight plan {suggested}"
    assert main(["plan", *suggested.split(), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fits"]


def test_plan_suggests_several_gpus(plan_for: PlanFor) -> None:
    alone = plan_for("gpt3-13b", "h100")
    assert alone.fit_in_processes is not None
    assert alone.fit_in_processes.options == "--processes 4 --activation-checkpointing selective"
    assert plan_for("gpt3-13b", "h100", processes=4, **SELECTIVE).fits


# This machine.


def test_model_that_can_t_fit_here_is_not_measured(
    plan_for: PlanFor, pretend_machine: PretendMachine
) -> None:
    pretend_machine(find_memory_bytes=2 * GB)
    plan = plan_for("gpt3-6.7b", device="cpu")
    assert plan.fits is False
    assert "How fast?" not in plan_text(plan)
    assert plan_to_json(plan)["needed_bytes"] > 6.6e9 * 16


@pytest.fixture
def two_gpus(pretend_machine: PretendMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine seems to have two A100 of 80 GB; nothing can be computed on them."""
    pretend_machine(
        open_world=World(rank=0, size=1, device="cuda"),
        count_processes=2,
        find_device_name="NVIDIA A100-SXM4-80GB",
        find_memory_bytes=80 * GB,
    )

    def resolve(config: Any, device: str) -> Compute:
        level = config.activation_checkpointing
        compute = {"precision": "bf16", "compile": True, "attention": "fused", "loss": "full"}
        return Compute(device=device, activation_checkpointing=level, **compute)  # type: ignore[arg-type]

    monkeypatch.setattr(planning_command, "resolve_compute", resolve)


@pytest.fixture
def made_up_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The measurement takes no time and always finds the same."""
    memory = measure.MeasuredMemory(0, 40 * GB, 41 * GB)
    monkeypatch.setattr(
        measure,
        "measure_step_costs",
        lambda resolved, *_: measure.Measurement([COST] * 3, resolved, memory),
    )


def test_one_process_is_measured_and_the_others_predicted(two_gpus: None, made_up_costs: None) -> None:
    config = plan_config("gpt2-124m", processes="auto")
    plan = plan_recipe(config, "gpt2-124m")
    assert "measured here and now with one process" in plan_text(plan)
    found = plan_to_json(plan)
    assert (found["measured"], found["device_name"]) == (True, "2 x NVIDIA A100-SXM4-80GB")
    assert found["link_within"]["name"] == "NVLink 3"
    computing = found["micro_batches_per_step"] // 2 * COST.micro_batch + COST.update
    assert found["compute_seconds_per_step"] == pytest.approx(computing)
    assert found["step_seconds"] == pytest.approx(computing + found["communication_seconds_per_step"])
    assert found["mfu"] == pytest.approx(found["tokens_per_second"] * 855.4e6 / (2 * 312e12), rel=1e-3)
    assert (found["peak_memory_bytes"], found["evaluation_peak_memory_bytes"]) == (40 * GB, 41 * GB)
    assert command_after_plan(plan, config) == "next: overnight train gpt2-124m --processes auto"


def test_model_too_large_for_one_gpu_is_estimated(two_gpus: None, plan_for: PlanFor) -> None:
    settings = {"processes": 2, "machines": 4, **SELECTIVE}
    plan = plan_for("gpt3-6.7b", **settings)
    assert plan.fits
    assert plan.layout.sharding in {"fsdp", "hsdp"}
    assert "too large to be measured" in str(plan.assumption)
    assert plan.forecast is not None


def test_next_command_for_several_machines_is_torchrun(two_gpus: None, made_up_costs: None) -> None:
    config = plan_config("gpt2-124m", processes=2, machines=4, **SELECTIVE)
    words = command_after_plan(plan_recipe(config, "gpt2-124m"), config)
    assert "torchrun --nnodes 4 --nproc-per-node 2 " in words
    assert words.endswith("-m overnight train gpt2-124m --activation-checkpointing selective")


def test_processes_on_this_cpu_share_its_memory(pretend_machine: PretendMachine, made_up_costs: None) -> None:
    pretend_machine(find_memory_bytes=8 * GB)
    plan = plan_recipe(plan_config("quickstart", processes=2, device="cpu"), "quickstart")
    assert plan.device_memory_bytes == 4 * GB
    assert plan.device_name.startswith("2 processes on ")
    assert "efficiency_range" not in plan_to_json(plan)
    assert "How well together?" not in plan_text(plan)


# The command.


def test_json_goes_to_standard_output_alone(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    cluster = "gpt2-1558m --n-layer 6 --processes 8 --machines 4 --network 8x400g"
    assert main(["plan", *cluster.split(), "--device-type", "H100", "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert (found["recipe"], found["parameters"]) == ("gpt2-1558m", 266_497_600)
    assert (found["all_processes"], found["processes"], found["machines"]) == (32, 8, 4)
    assert found["link_between"]["name"] == "8 x 400 Gb/s"
    assert f"next: on that machine `overnight plan {cluster}`, which measures" in err
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    "words, complaint",
    [
        ("gpt2-124m --device-type m3-max", "device_type=m3-max"),
        ("gpt2-124m --device-type t4 --precision bf16", "precision=bf16: t4 .* choose fp16"),
        ("gpt2-124m --device-type h200 --device cpu", "device=cpu.*device_type=h200"),
        ("gpt2-124m --device-type h100 --processes auto", "processes=auto.*device_type=h100"),
        ("gpt2-124m --device-type h100 --processes 0", "processes=0"),
        ("gpt2-124m --device-type h100 --processes 3", "3 processes"),
        ("gpt2-124m --device-type m1 --processes 2", "processes=2"),
        ("gpt2-124m --dollars-per-hour=nan", "dollars_per_hour=nan"),
        ("gpt2-124m --seconds=-3", "seconds=-3.0"),
        ("shakespeare-char-cpu", "overnight prepare shakespeare --tokenizer characters"),
    ],
)
def test_wrong_use_is_one_sentence(
    words: str, complaint: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *words.split()]) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert re.search(complaint, sentence)
    assert list(here.iterdir()) == []


def test_plan_is_measured_with_the_allocator_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    restarted: list[list[str]] = []
    monkeypatch.setattr(launcher, "restart_with_large_pages", restarted.append)
    for verb in ("train", "plan"):
        monkeypatch.setattr(sys, "argv", ["overnight", verb, "no-such-recipe"])
        assert main() == 2
    assert restarted == [["train", "no-such-recipe"], ["plan", "no-such-recipe"]]


@pytest.mark.parametrize("sharding", ["fsdp", "hsdp"])
def test_sharding_of_muon_is_refused_as_a_run_refuses_it(sharding, capsys):
    words = ["plan", "gpt2-124m", "--device-type", "h100", "--processes", "8", "--sharding", sharding]
    assert main([*words, "--optimizer", "muon"]) == 2
    assert f"optimizer=muon updates whole matrices, and sharding={sharding}" in capsys.readouterr().err
    assert main(words) == 0, "AdamW's is not"
