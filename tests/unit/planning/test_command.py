from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from overnight.cli import main
from overnight.distributed import launcher as machine
from overnight.hardware import DEVICES, GB
from overnight.planning import command as planning_command
from overnight.planning import measure
from overnight.planning.command import command_after_plan, plan_recipe
from overnight.planning.page import plan_text
from overnight.planning.plan import Plan, plan_to_json

from .conftest import plan_config

PlanFor = Callable[..., Plan]


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


def test_nothing_is_measured_for_another_machine(plan_for: PlanFor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "measure_step_costs", lambda *_: pytest.fail("measured"))
    plan_for("gpt2-124m", "t4")


@pytest.mark.parametrize("device, precision", [("t4", "fp16"), ("m1-max", "fp32"), ("h200", "bf16")])
def test_estimate_uses_the_native_precision(plan_for: PlanFor, device: str, precision: str) -> None:
    assert plan_for("gpt2-124m", device).resolved.compute.precision == precision


def test_plan_suggests_smaller_model(plan_for: PlanFor) -> None:
    plan = plan_for("gpt2-1558m", "rtx-4090")
    assert (plan.fits, plan.forecast) == (False, None)
    assert plan.largest_fitting is not None
    assert plan.largest_fitting[0] == "gpt2-774m"
    assert "gpt2-774m" in plan_text(plan)
    config = plan_config("gpt2-1558m", device_type="rtx-4090")
    assert command_after_plan(plan, config).endswith("plan gpt2-774m --device-type rtx-4090")


def test_plan_suggests_options_that_fit(plan_for: PlanFor) -> None:
    assert plan_for("gpt2-350m", "t4").fits
    tight = plan_for("gpt2-350m", "t4", micro_batch_size=64)
    assert tight.fits is False
    assert all(option.needed_bytes < 16 * GB for option in tight.fit_options)
    config = plan_config("gpt2-350m", device_type="t4", micro_batch_size=64)
    options = tight.fit_options[0].options
    expected = f"next: overnight plan gpt2-350m {options} --device-type t4"
    assert command_after_plan(tight, config) == expected
    assert main(["plan", *expected.split()[3:], "--json"]) == 0


def test_memory_of_an_apple_chip_is_unknown(plan_for: PlanFor) -> None:
    plan = plan_for("quickstart", "m1")
    assert (plan.fits, plan.device_memory_bytes) == (None, None)


# This machine.


def test_model_that_can_t_fit_here_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "measure_step_costs", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(planning_command, "find_memory_bytes", lambda _: 2 * GB)
    plan = plan_recipe(plan_config("gpt3-6.7b", device="cpu"), "gpt3-6.7b")
    assert plan.fits is False
    assert "How fast?" not in plan_text(plan)
    assert plan_to_json(plan)["needed_bytes"] > 6.6e9 * 16


def test_measured_plan(plan_for: PlanFor) -> None:
    """With made-up measurements."""
    plan = plan_for("gpt2-124m", "h200")
    plan.assumption, plan.peak_memory_bytes, plan.load_average = None, 41 * GB, 1.5
    shown = plan_text(plan)
    assert "measured here and now" in shown
    assert "load average 1.5" in shown
    found = plan_to_json(plan)
    assert found["measured"]
    assert found["mfu"] == pytest.approx(found["tokens_per_second"] * 855.4e6 / 989e12, rel=1e-3)
    assert command_after_plan(plan, plan_config("gpt2-124m")) == "next: overnight train gpt2-124m"


# The command.


def test_json_goes_to_standard_output_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    cluster = "gpt2-1558m --n-layer 6 --processes 8 --machines 4 --network 8x400g"
    assert main(["plan", *cluster.split(), "--device-type", "H100", "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert (found["recipe"], found["parameters"]) == ("gpt2-1558m", 266_497_600)
    assert (found["all_processes"], found["processes"], found["machines"]) == (32, 8, 4)
    assert found["link_between"]["name"] == "8 x 400 Gb/s"
    assert f"next: on that machine, overnight plan {cluster}, which measures" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words, complaint",
    [
        ("gpt2-124m --device-type h20", "device_type=h20 .* h200"),
        ("gpt2-124m --device-type a100", "device_type=a100 .* a100-pcie-80gb, a100-80gb"),
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
    words: str,
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", *words.split()]) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert re.search(complaint, sentence)
    assert list(tmp_path.iterdir()) == []


def test_plan_is_measured_with_the_allocator_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    restarted: list[list[str]] = []
    monkeypatch.setattr(machine, "restart_with_large_pages", restarted.append)
    for verb in ("train", "plan"):
        monkeypatch.setattr(sys, "argv", ["overnight", verb, "no-such-recipe"])
        assert main() == 2
    assert restarted == [["train", "no-such-recipe"], ["plan", "no-such-recipe"]]
