from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from overnight.cli import main
from overnight.hardware import GB
from overnight.planning import PlanConfig
from overnight.planning import command as planning_command
from overnight.planning.command import (
    command_after_plan,
    find_known_device,
    plan_for_device,
    plan_here,
    with_costs,
)
from overnight.planning.estimate import StepCost
from overnight.planning.network import (
    BETWEEN,
    ParallelLayout,
    choose_parallel_layout,
    predict_step,
    scale_cost,
)
from overnight.planning.page import Plan, plan_text, plan_to_json
from overnight.recipe import load_recipe
from overnight.training.memory import choose_sharding, estimate_memory, fits_into

PACE = StepCost(
    micro_batch=0.5, update=0.08, start=40.0, evaluated_token=8e-6, sampled_token=2e-3, saved_byte=1e-9
)
SLOWEST = 131_072  # tokens of gpt3-13b's first steps, where 64 processes are to share them


def asked(name: str, processes: int | str | None = 8, **settings: Any) -> PlanConfig:
    config = PlanConfig(**vars(load_recipe(name)))
    compute = {
        key: settings.pop(key)
        for key in ("sharding", "activation_checkpointing", "device")
        if key in settings
    }
    if "batch_ramp_start_tokens" in settings:
        ramp = settings.pop("batch_ramp_start_tokens")
        config = replace(config, batch=replace(config.batch, batch_ramp_start_tokens=ramp))
    return replace(config, compute=replace(config.compute, processes=processes, **compute), **settings)


def elsewhere(name: str, device: str, processes: int | None = 8, **settings: Any) -> Plan:
    config = asked(name, processes, device_type=device, **settings)
    return plan_for_device(config, name, find_known_device(device))


# ---------------------------------------------------------------- what each holds


@pytest.mark.parametrize("device", ["h100", "h200", "a100-80gb"])
@pytest.mark.parametrize("machines", [1, 8])
@pytest.mark.parametrize("name", ["gpt2-1558m", "gpt3-13b"])
def test_the_large_models_are_trainable_on_paper(name: str, machines: int, device: str) -> None:
    """13B on eight GPUs of 80 GB as it stands is not; the page says what makes it so, and that is so."""
    more = {"batch_ramp_start_tokens": SLOWEST} if (name, machines) == ("gpt3-13b", 8) else {}
    outlook = elsewhere(name, device, machines=machines, **more)
    if not outlook.fits:
        assert (name, machines) == ("gpt3-13b", 1)
        assert "--activation_checkpointing selective" in outlook.ways_out[0].options
        outlook = elsewhere(name, device, activation_checkpointing="selective")
    assert outlook.fits
    found = plan_to_json(outlook)
    assert found["needed_bytes"] < 0.9 * found["device_memory_bytes"]
    assert found["all_processes"] == 8 * machines
    assert found["micro_batches_per_step"] % found["all_processes"] == 0
    worst, best = found["efficiency_range"]
    assert 0 < worst <= best <= 1
    slow, fast = found["tokens_per_second_range"]
    assert slow < found["tokens_per_second"] < fast


def test_the_sharding_is_the_one_that_training_chooses() -> None:
    outlook = elsewhere("gpt3-13b", "h200", machines=8, batch_ramp_start_tokens=SLOWEST)
    team, recipe, rows = outlook.team, outlook.recipe, outlook.plan.micro_batch_size
    assert outlook.device_memory_bytes == 141 * GB
    assert team.sharding == choose_sharding(recipe.model, rows, recipe.compute, 141 * GB, 64, 8) == "hybrid"
    compute = replace(recipe.compute, sharding="hybrid")
    assert outlook.memory == estimate_memory(recipe.model, rows, compute, 64, 8)
    assert plan_to_json(outlook)["needed_bytes_by_sharding"]["hybrid"] == outlook.needed_bytes
    shown = plan_text(outlook)
    assert "What do 64 divide?" in shown
    assert "hybrid  the same, within each machine; the" in shown
    for sharding, needed in team.tried.items():
        answer = "fits" if fits_into(141 * GB, needed) else "does not fit"
        assert any(f"sharding {sharding} " in line and line.endswith(answer) for line in shown.splitlines())


def test_a_sharding_that_is_asked_for_is_taken() -> None:
    outlook = elsewhere("gpt2-124m", "h100", sharding="full")
    assert (outlook.team.sharding, outlook.team.is_asked) == ("full", True)
    assert "weights, gradients, moments (FSDP2); as asked" in " ".join(plan_text(outlook).split())
    assert outlook.memory.gathered > 0
    tight = elsewhere("gpt3-6.7b", "h100", sharding="none")
    assert tight.fits is False
    assert tight.ways_out[0].options.startswith("--sharding fsdp ")
    words = command_after_plan(tight, asked("gpt3-6.7b", device_type="h100", sharding="none"))
    assert "--sharding fsdp" in words
    assert "--sharding none" not in words
    assert words.endswith("--device-type h100")


def test_what_does_not_fit_into_one_is_told_how_many_it_takes() -> None:
    alone = elsewhere("gpt3-13b", "h100", None)
    assert alone.several is not None
    assert alone.several.options == "--processes 4 --activation_checkpointing selective"
    four = elsewhere("gpt3-13b", "h100", 4, activation_checkpointing="selective")
    assert four.fits
    assert "--processes 4 --activation_checkpointing selective" in plan_text(alone)
    assert elsewhere("gpt2-124m", "h100", None).several is None


# ---------------------------------------------------------------- how fast they are together


def test_one_process_is_as_fast_as_it_is() -> None:
    outlook = elsewhere("gpt2-124m", "h100", 1)
    assert outlook.shared is None
    assert outlook.team == replace(ParallelLayout(), cluster=outlook.team.cluster)
    assert outlook.paces == elsewhere("gpt2-124m", "h100", None).paces
    assert "divide?" not in plan_text(outlook)
    assert ParallelLayout().describe("NVIDIA H200") == "NVIDIA H200"


@pytest.mark.parametrize("sharding", ["none", "optimizer"])
def test_what_is_said_once_a_step_is_added_once_a_step(sharding: Any) -> None:
    outlook = elsewhere("gpt2-124m", "h100", sharding=sharding)
    team, model = outlook.team, outlook.recipe.model
    assert team.cluster is not None
    pace = scale_cost(team, model, PACE, 0.5)
    said = predict_step(model, sharding, team.cluster, 3, 3 * PACE.micro_batch).communication_seconds
    update = PACE.update if sharding == "none" else PACE.update / 8
    assert pace.step(24) == pytest.approx(3 * 0.5 + update + said)
    assert pace.evaluated_token == PACE.evaluated_token / 8
    assert (pace.start, pace.saved_byte) == (PACE.start, PACE.saved_byte)


def test_what_is_said_in_every_micro_batch_is_hidden_or_is_not() -> None:
    outlook = elsewhere("gpt2-1558m", "h100", sharding="full")
    team, model = outlook.team, outlook.recipe.model
    assert team.cluster is not None
    said = predict_step(model, "full", team.cluster, 1, 0.5).communication_seconds
    hidden, half, bare = (scale_cost(team, model, PACE, part).step(16) for part in (1.0, 0.5, 0.0))
    assert hidden == pytest.approx(2 * max(0.5, said) + 0.01)
    assert bare == pytest.approx(2 * (0.5 + said) + 0.01)
    assert half == pytest.approx((hidden + bare) / 2)


def test_processes_on_a_cpu_share_its_cores() -> None:
    team = choose_parallel_layout(1, 4, None, "400g")
    pace = scale_cost(team, load_recipe("quickstart").model, PACE, 0.5)
    assert pace.micro_batch == PACE.micro_batch, "four at a time, each four times as slow"
    assert pace.update == 4 * PACE.update
    two = scale_cost(choose_parallel_layout(2, 4, None, "400g"), load_recipe("quickstart").model, PACE, 0.5)
    assert two.micro_batch == PACE.micro_batch / 2


def test_the_figures_of_a_page_are_of_one_mind() -> None:
    found = plan_to_json(elsewhere("gpt2-1558m", "h100", machines=8, network="100g"))
    computed, said = found["compute_seconds_per_step"], found["communication_seconds_per_step"]
    assert not found["communication_overlaps"]
    assert found["efficiency_range"] == pytest.approx([computed / (computed + said)] * 2)
    assert found["step_seconds"] == pytest.approx(computed + said)
    assert found["tokens_per_second"] == pytest.approx(found["tokens_per_step"] / found["step_seconds"])
    assert found["mfu"] == pytest.approx(0.4 * found["efficiency_range"][0])
    assert found["efficiency_range_by_network"].keys() == {"400 Gb/s", "8 x 400 Gb/s"}
    faster = found["efficiency_range_by_network"]["8 x 400 Gb/s"][0]
    assert faster > 2 * found["efficiency_range"][0]
    other = plan_to_json(elsewhere("gpt2-1558m", "h100", machines=8, network="8x400g"))
    assert other["efficiency_range"][0] == faster
    assert other["link_between"]["source"] == BETWEEN["8x400g"].source


def test_eight_machines_cost_eight_times_as_much_an_hour() -> None:
    one, eight = (
        plan_to_json(elsewhere("gpt2-1558m", "h100", machines=machines, dollars_per_hour=24.0))
        for machines in (1, 8)
    )
    for found, machines in ((one, 1), (eight, 8)):
        assert found["dollars"] == pytest.approx(machines * 24 * found["seconds"] / 3600)
    assert eight["dollars"] > one["dollars"], "what is said costs, too"


def test_more_rows_at_once_are_advised_where_weights_are_gathered() -> None:
    outlook = elsewhere("gpt3-13b", "h100", activation_checkpointing="selective")
    assert outlook.shared is not None
    assert outlook.shared.faster is not None
    options, seconds = outlook.shared.faster
    assert options == "--micro-batch-size 2"
    config = asked("gpt3-13b", device_type="h100", activation_checkpointing="selective")
    config = replace(config, batch=replace(config.batch, micro_batch_size=2))
    told = plan_for_device(config, "gpt3-13b", find_known_device("h100"))
    assert plan_to_json(told)["step_seconds"] == pytest.approx(seconds)
    assert seconds < 0.95 * plan_to_json(outlook)["step_seconds"]
    assert told.shared is not None
    assert told.shared.faster is None, "a process has no more rows in the first steps"
    assert "would be faster" in plan_text(outlook)


def test_recomputing_takes_longer() -> None:
    plain, again = (
        plan_to_json(elsewhere("gpt2-1558m", "h100", activation_checkpointing=activation_checkpointing))
        for activation_checkpointing in ("none", "block")
    )
    assert 1.2 < again["compute_seconds_per_step"] / plain["compute_seconds_per_step"] < 4 / 3


@pytest.mark.parametrize("network", ["100g", "400g", "8x400g"])
@pytest.mark.parametrize("sharding", ["none", "optimizer", "full", "hybrid"])
@pytest.mark.parametrize("name", ["gpt2-124m", "gpt3-13b"])
def test_a_page_is_80_columns_wide(name: str, sharding: str, network: str) -> None:
    more = {"batch_ramp_start_tokens": SLOWEST} if name == "gpt3-13b" else {}
    outlook = elsewhere(name, "h200", machines=8, sharding=sharding, network=network, **more)
    shown = plan_text(outlook)
    assert max(map(len, shown.splitlines())) <= 80
    if outlook.fits:
        assert "PREDICTION" in shown
        assert BETWEEN[network].source.split(",")[0] in " ".join(shown.split())
    assert json.loads(json.dumps(plan_to_json(outlook)))["machines"] == 8


# ---------------------------------------------------------------- this machine


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with two A100 of 80 GB, as far as a plan looks; nothing can be computed on them."""
    from overnight.distributed import world
    from overnight.run import setup

    here = world.World(rank=0, size=1, device="cuda")
    monkeypatch.setattr(world, "open_world", lambda device: here)
    monkeypatch.setattr(world, "count_processes", lambda asked, device: 2)
    monkeypatch.setattr(planning_command, "find_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(planning_command, "find_peak_flops", lambda device, precision: 312e12)
    for module in (planning_command, setup):
        monkeypatch.setattr(module, "find_memory_bytes", lambda device: 80 * GB)
    monkeypatch.setattr(setup, "resolve_compute", lambda config, device: resolved(config))


def resolved(config: Any) -> Any:
    return replace(config, device="cuda", precision="bf16", compile=True, attention="fused", loss="full")


def test_what_one_of_them_does_is_measured_and_the_rest_is_predicted(
    two_gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from overnight.planning import measure

    measured = measure.Trial(
        micro_batches=2,
        step_seconds=(1.0, 1.0, 1.0),
        update_seconds=0.1,
        start_seconds=30.0,
        evaluated_token_seconds=1e-6,
        sampled_token_seconds=1e-3,
        saved_byte_seconds=1e-9,
        peak_memory_bytes=40 * GB,
        evaluation_peak_memory_bytes=41 * GB,
        process_memory_bytes=0,
    )
    monkeypatch.setattr(
        measure, "measure_step_costs", lambda recipe, plan, seconds, processes: (measured, plan)
    )
    outlook = plan_here(asked("gpt2-124m", "auto"), "gpt2-124m")
    assert outlook.assumption is None
    assert outlook.device_name == "2 x NVIDIA A100-SXM4-80GB"
    found = plan_to_json(outlook)
    assert found["link_within"]["name"] == "NVLink 3"
    each = found["micro_batches_per_step"] // 2
    assert found["compute_seconds_per_step"] == pytest.approx(each * 0.45 + 0.1)
    assert found["step_seconds"] == pytest.approx(each * 0.45 + 0.1 + found["communication_seconds_per_step"])
    assert found["peak_memory_bytes"] == 40 * GB
    assert "with one process; of several, a PREDICTION" in plan_text(outlook)
    assert (
        command_after_plan(outlook, asked("gpt2-124m", "auto"))
        == "next: overnight train gpt2-124m --processes auto"
    )


def test_what_is_too_large_for_one_of_them_is_estimated(
    two_gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from overnight.planning import measure

    monkeypatch.setattr(measure, "measure_step_costs", lambda *given: pytest.fail("measured"))
    config = asked("gpt3-6.7b", 2, machines=4, activation_checkpointing="selective")
    outlook = plan_here(config, "gpt3-6.7b")
    assert outlook.fits
    assert outlook.team.sharding in {"full", "hybrid"}
    assert outlook.assumption is not None
    assert outlook.assumption.startswith("the model is too large to be measured with one of them: 40%")
    assert outlook.paces is not None
    outlook = replace(outlook, assumption=None)
    words = command_after_plan(outlook, config)
    assert "torchrun --nnodes 4 --nproc-per-node 2 " in words
    assert words.endswith("-m overnight train gpt3-6.7b --activation_checkpointing selective")


def test_processes_on_this_cpu_divide_its_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(planning_command, "find_memory_bytes", lambda device: 8 * GB)
    monkeypatch.setattr(
        planning_command, "measured", lambda outlook, memory_bytes, seconds: with_costs(outlook, (PACE,) * 3)
    )
    outlook = plan_here(asked("quickstart", 2, device="cpu"), "quickstart")
    assert outlook.device_memory_bytes == 4 * GB
    assert outlook.device_name.startswith("2 processes on ")
    shown = plan_text(outlook)
    assert "not counted: they share one CPU" in shown
    assert "How well together?" not in shown
    assert "efficiency_range" not in plan_to_json(outlook)


# ---------------------------------------------------------------- the command


def test_the_command_knows_machines(capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "gpt2-1558m",
        "--device-type",
        "h100",
        "--processes",
        "8",
        "--machines",
        "4",
        "--network",
        "8x400g",
    ]
    assert main(["plan", *words, "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert (found["all_processes"], found["processes"], found["machines"]) == (32, 8, 4)
    assert found["link_between"]["name"] == "8 x 400 Gb/s"
    assert "overnight plan gpt2-1558m --processes 8 --machines 4 --network 8x400g, which measures" in err


@pytest.mark.parametrize(
    "words, complaint",
    [
        (["--device-type=h100", "--machines=0"], "machines=0 must be at least 1"),
        (["--device-type=h100", "--processes=0"], "processes=0 must be at least 1"),
        (
            ["--device-type=h100", "--processes=auto"],
            "processes=auto counts this machine's GPUs, and device_type=h100 is another",
        ),
        (["--device-type=h100", "--processes=3"], "can't be divided among 3 processes"),
        (
            ["--device-type=m1", "--processes=2"],
            "2 processes train together on NVIDIA GPUs or a CPU, not on mps",
        ),
        (["--device-type=h100", "--processes=2", "--network=10g"], "network"),
    ],
    ids=" ".join,
)
def test_wrong_use_is_one_plain_sentence(
    words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "gpt2-124m", *words]) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert complaint in sentence
