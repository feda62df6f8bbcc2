from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from overnight.cli import main
from overnight.hardware import DEVICES, GB
from overnight.planning import PlanConfig
from overnight.planning import command as planning_command
from overnight.planning.command import (
    command_after_plan,
    find_known_device,
    plan_for_device,
    plan_here,
    planned_recipe,
)
from overnight.planning.estimate import StepCost
from overnight.planning.page import Plan, brief, dollars, plan_text, plan_to_json, size
from overnight.recipe import load_recipe
from overnight.recipe_options import list_options


def asked(name: str, **settings: Any) -> PlanConfig:
    return replace(PlanConfig(**vars(load_recipe(name))), **settings)


def elsewhere(name: str, device: str, **settings: Any) -> Plan:
    return plan_for_device(asked(name, device_type=device, **settings), name, find_known_device(device))


# ---------------------------------------------------------------- another machine


@pytest.mark.parametrize("device", [device.name for device in DEVICES if device.facts.fp32])
def test_every_device_with_a_rate_can_be_estimated(device: str) -> None:
    outlook = elsewhere("gpt2-124m", device)
    assert outlook.assumption is not None
    assert "ESTIMATE, not measured" in plan_text(outlook)
    found = plan_to_json(outlook)
    assert not found["measured"]
    slow, fast = found["tokens_per_second_range"]
    assert slow < found["tokens_per_second"] < fast
    rows, micro_batches = found["micro_batch_size"], found["micro_batches_per_step"]
    assert rows * micro_batches * 1024 == found["tokens_per_step"] == 524_288


def test_an_estimate_brackets_what_others_have_measured() -> None:
    """On one A100 llm.c's pull request 323, with PyTorch's lower; on one H200 modded-nanogpt's track 3."""
    for device, measured in (("a100-40gb", [115e3, 145e3]), ("h200", [488e3, 491e3])):
        slow, fast = plan_to_json(elsewhere("gpt2-124m", device))["tokens_per_second_range"]
        assert all(slow < tokens_per_second < fast for tokens_per_second in measured)


def test_a_run_of_ten_billion_tokens_costs_what_its_hours_cost() -> None:
    found = plan_to_json(elsewhere("gpt2-124m", "h200", dollars_per_hour=3.0))
    hours = found["seconds"] / 3600
    assert found["dollars"] == pytest.approx(3 * hours)
    assert found["dollars_per_billion_tokens"] == pytest.approx(3 * hours / 10, rel=0.01)
    trained = found["seconds_by_use"]["training"]
    assert trained == pytest.approx(found["total_tokens"] / found["tokens_per_second"])
    judged = 78 * 10_485_760  # before the first step, after each 250, and after the last
    assert found["seconds_by_use"]["evaluation"] == pytest.approx(judged / found["tokens_per_second"] / 3)
    ends_at = datetime.fromisoformat(found["ends_at"])
    assert (ends_at - datetime.now(UTC)).total_seconds() == pytest.approx(found["seconds"], abs=60)


def test_nothing_is_measured_for_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    from overnight.planning import measure

    monkeypatch.setattr(measure, "measure_step_costs", lambda *given: pytest.fail("measured"))
    elsewhere("gpt2-124m", "t4")


def test_the_precision_of_an_estimate_is_the_device_s() -> None:
    assert elsewhere("gpt2-124m", "t4").recipe.compute.precision == "fp16"
    assert elsewhere("gpt2-124m", "m1-max").recipe.compute.precision == "fp32"
    config = asked("gpt2-124m")
    in_bf16 = replace(config, compute=replace(config.compute, precision="bf16"))
    with pytest.raises(ValueError, match="precision=bf16: t4 does not multiply that .* choose fp16"):
        plan_for_device(in_bf16, "gpt2-124m", find_known_device("t4"))


def test_what_does_not_fit_is_told_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    outlook = elsewhere("gpt2-1558m", "rtx-4090")
    assert (outlook.fits, outlook.paces) == (False, None)
    assert outlook.smaller is not None
    assert outlook.smaller[0] == "gpt2-774m"
    shown = plan_text(outlook)
    assert "Does it fit?" in shown
    assert "gpt2-774m, one row at once" in shown
    assert command_after_plan(outlook, asked("gpt2-1558m", device_type="rtx-4090")).endswith(
        "plan gpt2-774m --device-type rtx-4090"
    )
    squeezed = elsewhere("gpt2-350m", "t4")
    assert squeezed.fits
    tight = asked("gpt2-350m", device_type="t4")
    tight = replace(tight, batch=replace(tight.batch, micro_batch_size=64))
    outlook = plan_for_device(tight, "gpt2-350m", find_known_device("t4"))
    assert outlook.fits is False
    assert all(way.needed_bytes < 16 * GB for way in outlook.ways_out)
    assert (
        command_after_plan(outlook, tight)
        == f"next: overnight plan gpt2-350m {outlook.ways_out[0].options} --device-type t4"
    )


def test_an_apple_chip_s_memory_is_its_machine_s() -> None:
    outlook = elsewhere("quickstart", "m1")
    assert (outlook.fits, outlook.device_memory_bytes) == (None, None)
    assert "shares the memory of its machine" in plan_text(outlook)


@pytest.mark.parametrize("device", ["h200", "t4", "m1", "rtx-4090"])
@pytest.mark.parametrize("name", ["gpt2-124m", "gpt3-175b", "quickstart"])
def test_a_page_is_80_columns_wide_and_json_is_json(name: str, device: str) -> None:
    outlook = elsewhere(name, device, dollars_per_hour=0.5)
    assert max(map(len, plan_text(outlook).splitlines())) <= 80
    assert json.loads(json.dumps(plan_to_json(outlook)))["recipe"] == name


# ---------------------------------------------------------------- this machine


def test_what_can_t_fit_here_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    from overnight.planning import measure

    monkeypatch.setattr(measure, "measure_step_costs", lambda *given: pytest.fail("measured"))
    monkeypatch.setattr(planning_command, "find_memory_bytes", lambda device: 2 * GB)
    config = asked("gpt3-6.7b")
    outlook = plan_here(replace(config, compute=replace(config.compute, device="cpu")), "gpt3-6.7b")
    assert outlook.fits is False
    assert "How fast?" not in plan_text(outlook)
    assert plan_to_json(outlook)["needed_bytes"] > 6.6e9 * 16


def test_what_was_measured_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page of a machine that was measured, from figures made up."""
    outlook = elsewhere("gpt2-124m", "h200")
    pace = StepCost(
        micro_batch=0.125, update=0.01, start=40.0, evaluated_token=1e-6, sampled_token=2e-3, saved_byte=1e-9
    )
    measured = replace(
        outlook, assumption=None, paces=(pace, pace, pace), peak_memory_bytes=41 * GB, load_average=1.5
    )
    shown = plan_text(measured)
    for words in ("measured here and now", "41.0 GB  while training", "10.0 ms  AdamW", "compilation"):
        assert words in shown, words
    assert "load average 1.5 before: measure in quiet" in shown
    found = plan_to_json(measured)
    assert found["step_seconds"] == pytest.approx(8 * 0.125 + 0.01)
    assert found["tokens_per_second"] == pytest.approx(524_288 / found["step_seconds"])
    assert found["mfu"] == pytest.approx(found["tokens_per_second"] * 855.4e6 / 989e12, rel=1e-3)
    assert found["seconds"] == pytest.approx(sum(found["seconds_by_use"].values()))
    assert command_after_plan(measured, asked("gpt2-124m")) == "next: overnight train gpt2-124m"


# ---------------------------------------------------------------- the command


def test_the_next_command_repeats_what_was_changed() -> None:
    config = asked("gpt2-124m", seed=7)
    config = replace(
        config,
        model=replace(config.model, n_layer=6),
        schedule=replace(config.schedule, total_steps=None, total_tokens=1_000_000),
        samples=replace(config.samples, sample_prompts=("Hello, you", "x")),
    )
    assert sorted(list_options(planned_recipe(config), load_recipe("gpt2-124m"))) == [
        ["--n-layer", "6"],
        ["--sample-prompts", "Hello, you", "x"],
        ["--seed", "7"],
        ["--total-tokens", "1000000"],
    ]
    assert list_options(load_recipe("quickstart"), load_recipe("quickstart")) == []


def test_json_goes_to_standard_output_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "gpt2-124m", "--device-type", "A100-80GB", "--json", "--n_layer=6"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["recipe"] == "gpt2-124m"
    assert found["parameters"] == 81_912_576  # distilgpt2's
    assert "next: on that machine, overnight plan gpt2-124m --n-layer 6" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words, complaint",
    [
        ([], "overnight plan needs a recipe: gpt2-124m"),
        (["gpt2-125m"], "there is no recipe gpt2-125m; did you mean"),
        (
            ["gpt2-124m", "--device-type", "h20"],
            "device_type=h20 is not in the table of devices; did you mean h200?",
        ),
        (
            ["gpt2-124m", "--device-type", "a100"],
            "device_type=a100 is several devices: choose a100-pcie-80gb, a100-80gb",
        ),
        (
            ["gpt2-124m", "--device-type", "m3-max"],
            "device_type=m3-max can't be estimated: its maker has not published",
        ),
        (
            ["gpt2-124m", "--device-type", "h200", "--device", "cpu"],
            "device=cpu is of this machine, device_type=h200 of another",
        ),
        (["gpt2-124m", "--dollars-per-hour=0"], "dollars_per_hour=0.0 must be greater than 0"),
        (["gpt2-124m", "--dollars-per-hour=nan"], "dollars_per_hour=nan must be greater than 0"),
        (["gpt2-124m", "--seconds=-3"], "seconds=-3.0 must be greater than 0"),
        (["gpt2-124m", "--dolars=3"], "no option --dolars; did you mean dollars-per-hour?"),
        (["gpt2-124m", "--n_head=5"], "n_embd=768 does not divide among n_head=5"),
        (
            ["gpt2-124m", "--device-type=h200", "--tokens_per_step=1000"],
            "tokens_per_step=1000 is not a whole number",
        ),
        (["shakespeare-char-cpu"], "overnight prepare shakespeare --tokenizer characters"),
    ],
    ids=" ".join,
)
def test_wrong_use_is_one_plain_sentence(
    words: list[str],
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", *words]) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert complaint in sentence
    assert list(tmp_path.iterdir()) == []


def test_a_plan_is_measured_under_the_conditions_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from overnight.distributed import machine

    restarted: list[list[str]] = []
    monkeypatch.setattr(machine, "restart_with_large_pages", restarted.append)
    for verb in ("train", "plan"):
        monkeypatch.setattr(sys, "argv", ["overnight", verb, "no-such-recipe"])
        assert main() == 2
    assert restarted == [["train", "no-such-recipe"], ["plan", "no-such-recipe"]]


@pytest.mark.parametrize(
    "shown, words",
    [
        (size(0), "0 kB"),
        (size(149_400), "149 kB"),
        (size(14_900_000), "14.9 MB"),
        (size(999_600_000), "1.00 GB"),
        (size(141 * GB), "141 GB"),
        (brief(0.0123), "12.3 ms"),
        (brief(0.4), "400 ms"),
        (brief(75), "1 min 15 s"),
        (dollars(0.03124), "$0.0312"),
        (dollars(3.1), "$3.10"),
        (dollars(31_200), "$31,200"),
    ],
)
def test_figures_are_readable(shown: str, words: str) -> None:
    assert shown == words
    assert re.fullmatch(r"[$\d.,]+( \w+)*", shown)
