"""The command `overnight plan`: whether a run will fit, how long it takes, how much disk and money."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from overnight.batching import ROWS_AT_MOST, BatchPlan, estimate_rows_that_fit
from overnight.hardware import (
    DEVICES,
    Device,
    DeviceFacts,
    find_device,
    find_device_name,
    find_memory_bytes,
    find_peak_flops,
)
from overnight.memory import estimate_memory, find_ways_out, fits_into, largest_that_fits
from overnight.parallel import ComputeConfig
from overnight.settings import nearest, raise_problems
from overnight.stages.forecast import FORWARD_SHARE, Pace, count_work, find_sizes, find_text
from overnight.stages.options import list_options
from overnight.stages.outlook import Outlook, as_json
from overnight.stages.plan_page import as_text
from overnight.stages.recipe import Recipe, load_recipe
from overnight.stages.team import assemble_team, find_processes, share, with_sharding
from overnight.terminal import say

# What is assumed of a device that is not here: the share of its maker's peak that training reaches. The
# measurements it comes from are of 124M parameters in 16 bits: build-nanogpt, eager, 33 to 38% on A100 and
# H200; PyTorch compiled 32% on one A100 PCIe (llm.c, pull request 323) and 42% on one H200 (modded-nanogpt,
# records/track_3_optimization); llm.c 40% on 8 H100 (the same, records/track_1_short/2024-10-13_llmc) and
# 60% on 8 A100 (its scripts/run_gpt2_124M.sh). All by the count of `ModelConfig.flops_per_token`.
SHARES_OF_PEAK = (0.50, 0.40, 0.30)  # fast, likely, slow
ANCHORS = {
    "a100": "others measured 32% (PyTorch, one A100) to 60% (llm.c, eight)",
    "h100": "others measured 40% (llm.c, eight H100)",
    "h200": "others measured 42% (PyTorch, one H200)",
}
NO_ANCHOR = "no measurement of this device stands behind that"
UNKNOWN = Device("unknown", r"(?!)", DeviceFacts())


@dataclass(frozen=True, kw_only=True)
class PlanConfig(Recipe):
    """A recipe, as `overnight train` takes it, and what is asked about it."""

    on: str | None = None
    """Estimate for a device that is not here (h200, a100-80gb, t4) instead of measuring this machine."""
    machines: int = 1
    """How many machines, each with as many processes; the plan is then a prediction."""
    network: Literal["100g", "400g", "8x400g"] = "400g"
    """Between machines: an adapter of 100 or 400 Gb/s in each, or eight of 400 Gb/s."""
    dollars_per_hour: float | None = None
    """What a machine costs; the plan then says what the run costs."""
    seconds: float = 40.0
    """About how long to measure."""
    json: bool = False
    """Print one JSON object to standard output."""

    def problems(self) -> list[str]:
        """What is wrong with these values, one plain sentence each; [] if nothing."""
        found = super().problems()
        for name in ("dollars_per_hour", "seconds"):
            if (value := getattr(self, name)) is not None and not 0 < value < float("inf"):
                found.append(f"{name}={value} must be greater than 0")
        if self.on is not None and self.compute.device is not None:
            found.append(
                f"device={self.compute.device} is of this machine, on={self.on} of another: give one"
            )
        processes = self.compute.processes
        if self.on is not None and processes == "auto":
            found.append(
                f"processes=auto counts this machine's GPUs, and on={self.on} is another: give a number"
            )
        for name, count in (("machines", self.machines), ("processes", processes)):
            if isinstance(count, int) and count < 1:
                found.append(f"{name}={count} must be at least 1")
        return found


def run(config: PlanConfig, name: str) -> None:
    """Show the plan of the recipe `name`, changed as `config` has it. Nothing that is trained is kept."""
    raise_problems(config.problems(), f"recipe {config.run_name}")
    device = None if config.on is None else find_known_device(config.on)
    outlook = plan_here(config, name) if device is None else plan_elsewhere(config, name, device)
    if config.json:
        sys.stdout.write(json.dumps(as_json(outlook), indent=2) + "\n")
    else:
        say(as_text(outlook))
    say(f"\n{next_command(outlook, config)}")


def find_known_device(name: str) -> Device:
    """A row of the device table. Raises ValueError if there is none, or it holds no rate."""
    device = find_device(name)
    if device is None:
        several = [known for known in names_of_devices() if known.startswith(f"{name.lower()}-")]
        if len(several) > 1:
            raise ValueError(f"on={name} is several devices: choose {', '.join(several)}")
        raise ValueError(
            f"on={name} is not in the table of devices{nearest(name.lower(), names_of_devices())}"
        )
    if device.name not in names_of_devices():
        raise ValueError(
            f"on={name} can't be estimated: its maker has not published how fast it multiplies; "
            "run overnight plan on it, which measures"
        )
    return device


def names_of_devices() -> list[str]:
    """Those whose rates are published."""
    return [device.name for device in DEVICES if device.facts.fp32]


def as_recipe(config: PlanConfig) -> Recipe:
    """The recipe that is asked about."""
    return Recipe(**{field.name: getattr(config, field.name) for field in dataclasses.fields(Recipe)})


def plan_here(config: PlanConfig, name: str) -> Outlook:
    """The plan for this machine: measured, or only estimated if the model can't fit into its memory."""
    from overnight.stages.job import decide
    from overnight.world import count_processes, open_world

    device = open_world(config.compute.device).device
    processes = count_processes(config.compute.processes or 1, device)
    check_together(device, config.machines * processes)
    text = find_text(config.data, config.model.vocab_size)
    sizes = find_sizes(config, text.vocab_size)
    recipe, plan = decide(as_recipe(config), sizes, config.data, device, config.machines * processes)
    memory_bytes = find_memory_bytes(device) // (processes if device == "cpu" else 1)
    row = None if device == "cpu" else find_device(find_device_name(device)) or UNKNOWN
    team = assemble_team(config.machines, processes, row, config.network)
    team = with_sharding(team, recipe, plan, memory_bytes)
    peak = find_peak_flops(device, recipe.compute.precision or "fp32")
    outlook = Outlook(
        name=name,
        recipe=recipe,
        plan=plan,
        text=text,
        device_name=team.describe(find_device_name(device)),
        assumption=None,
        team=team,
        memory=team.estimate_memory(recipe.model, plan.rows_per_micro_batch, recipe.compute),
        device_memory_bytes=memory_bytes,
        fits=True,
        work=count_work(recipe, plan, text.validation_tokens),
        peak_flops=peak and peak * team.processes,
        disk_free_bytes=shutil.disk_usage(Path.cwd()).free,
        load_average=os.getloadavg()[0] if device == "cpu" else 0.0,
        dollars_per_hour=config.dollars_per_hour and config.dollars_per_hour * config.machines,
        made_at=datetime.now().astimezone(),
    )
    if outlook.needed_bytes > memory_bytes:
        return with_ways_out(outlook, memory_bytes)
    return measured(outlook, memory_bytes, config.seconds)


def check_together(device: str, processes: int) -> None:
    """Raise ValueError if such devices can't train together."""
    if processes > 1 and device.partition(":")[0] not in {"cpu", "cuda"}:
        raise ValueError(f"{processes} processes train together on NVIDIA GPUs or a CPU, not on {device}")


def measured(outlook: Outlook, memory_bytes: int, seconds: float) -> Outlook:
    """`outlook` with what one process of the team does here, measured, and what follows for all of them.

    Only estimated where the whole model does not fit into one device.
    """
    recipe, team = outlook.recipe, outlook.team
    whole = estimate_memory(recipe.model, outlook.plan.rows_per_micro_batch, recipe.compute)
    if team.processes > 1 and not fits_into(memory_bytes, whole.together):
        return estimated(outlook, "the model is too large to be measured with one of them")
    from overnight.stages.trial import measure

    found = measure(recipe, outlook.plan, seconds, team.processes)
    if found is None:
        return with_ways_out(outlook, memory_bytes)
    trial, plan = found
    is_whole = team.sharding == "none"
    outlook = dataclasses.replace(
        outlook,
        plan=plan,
        memory=team.estimate_memory(recipe.model, plan.rows_per_micro_batch, recipe.compute),
        process_memory_bytes=trial.process_memory_bytes,
        peak_memory_bytes=trial.peak_memory_bytes if is_whole else None,
        evaluation_peak_memory_bytes=trial.evaluation_peak_memory_bytes if is_whole else None,
        work=count_work(recipe, plan, outlook.text.validation_tokens),
    )
    return with_paces(outlook, trial.paces())


def plan_elsewhere(config: PlanConfig, name: str, device: Device) -> Outlook:
    """The plan for a device of the table: an estimate, and nothing is measured."""
    from overnight.stages.job import settle

    processes = config.compute.processes or 1
    assert isinstance(processes, int)
    text = find_text(config.data, config.model.vocab_size)
    compute, memory_bytes = suppose_compute(config.compute, device), device.facts.memory_bytes
    check_together(compute.device or "", config.machines * processes)
    model = find_sizes(config, text.vocab_size)
    rows = estimate_rows_that_fit(model, memory_bytes, "cuda") if memory_bytes else 1
    asked = dataclasses.replace(as_recipe(config), model=model, compute=compute)
    recipe, plan = settle(asked, rows, config.machines * processes)
    team = assemble_team(config.machines, processes, device, config.network)
    team = with_sharding(team, recipe, plan, memory_bytes)
    precision = compute.precision or "fp32"
    peak = 1e12 * (getattr(device.facts, precision) or 0)
    memory = team.estimate_memory(recipe.model, plan.rows_per_micro_batch, compute)
    outlook = Outlook(
        name=name,
        recipe=recipe,
        plan=plan,
        text=text,
        device_name=f"one {device.name}" if team.processes == 1 else team.describe(device.name),
        assumption=describe_assumption(device.name, peak, precision),
        team=team,
        memory=memory,
        device_memory_bytes=memory_bytes,
        fits=fits_into(memory_bytes, memory.together) if memory_bytes else None,
        work=count_work(recipe, plan, text.validation_tokens),
        peak_flops=peak * team.processes,
        dollars_per_hour=config.dollars_per_hour and config.dollars_per_hour * config.machines,
        made_at=datetime.now().astimezone(),
    )
    if outlook.fits is False:
        assert memory_bytes is not None
        return with_ways_out(outlook, memory_bytes)
    return estimated(outlook)


def estimated(outlook: Outlook, why: str = "") -> Outlook:
    """`outlook` with paces that are only supposed; without any where no peak of the device is published."""
    if outlook.peak_flops is None:
        return dataclasses.replace(outlook, assumption=why)
    peak, recipe = outlook.peak_flops / outlook.team.processes, outlook.recipe
    supposed = describe_assumption("", peak, recipe.compute.precision or "fp32")
    fast, likely, slow = (suppose_pace(recipe, outlook.plan, peak * share) for share in SHARES_OF_PEAK)
    outlook = dataclasses.replace(outlook, assumption=outlook.assumption or f"{why}: {supposed}")
    return with_paces(outlook, (fast, likely, slow))


def with_paces(outlook: Outlook, paces: tuple[Pace, Pace, Pace]) -> Outlook:
    """`outlook` with the paces of one process, and what its team makes of them."""
    if outlook.team.processes == 1:
        return dataclasses.replace(outlook, paces=paces)
    shared = share(outlook.team, outlook.recipe, outlook.plan, paces, outlook.device_memory_bytes)
    return dataclasses.replace(outlook, paces=shared.paces, shared=shared)


def suppose_compute(config: ComputeConfig, device: Device) -> ComputeConfig:
    """What `overnight train` would decide there. Raises ValueError for a precision that it lacks."""
    precision = config.precision or device.facts.native
    if not getattr(device.facts, precision):
        raise ValueError(
            f"precision={precision}: {device.name} does not multiply that in hardware; "
            f"choose {device.facts.native}"
        )
    is_apple = device.facts.memory_bytes is None
    return dataclasses.replace(
        config,
        device="mps" if is_apple else "cuda",
        precision=precision,
        compile=not is_apple if config.compile is None else config.compile,
        attention=config.attention or "fused",
        head=config.head or "whole",
    )


def suppose_pace(recipe: Recipe, plan: BatchPlan, flops: float) -> Pace:
    """The pace of a device that does so many operations a second, and more where some are done twice."""
    model = recipe.model
    again = model.executed_flops_per_token(recipe.compute.recompute) / model.executed_flops_per_token("none")
    token = model.flops_per_token() / flops
    trained = again * token
    micro_batch = trained * plan.rows_per_micro_batch * plan.tokens_per_row
    return Pace(
        micro_batch=micro_batch,
        update=0.0,
        start=0.0,
        evaluated_token=FORWARD_SHARE * token,
        sampled_token=0.0,
        saved_byte=0.0,
    )


def describe_assumption(device_name: str, peak: float, precision: str) -> str:
    """What an estimate rests on, and how far it is to be trusted."""
    slow, likely, fast = sorted(SHARES_OF_PEAK)
    behind = next((words for name, words in ANCHORS.items() if device_name.startswith(name)), NO_ANCHOR)
    return (
        f"{likely:.0%} ({slow:.0%} to {fast:.0%}) of the published {peak / 1e12:,.4g} TFLOP/s in "
        f"{precision}; {behind}"
    )


def with_ways_out(outlook: Outlook, memory_bytes: int) -> Outlook:
    """`outlook` of a model that does not fit, with what would."""
    recipe, team = outlook.recipe, outlook.team
    compute = dataclasses.replace(recipe.compute, sharding=team.sharding)
    smallest = recipe.batch.ramp_from_tokens_per_step or recipe.batch.tokens_per_step
    rows = smallest // recipe.model.context_length // team.processes
    possible = [count for count in range(1, min(rows, ROWS_AT_MOST) + 1) if rows % count == 0]
    group = (team.processes, team.processes_per_machine)
    return dataclasses.replace(
        outlook,
        fits=False,
        ways_out=tuple(find_ways_out(recipe.model, compute, possible, memory_bytes, *group)),
        several=find_processes(team, recipe, memory_bytes),
        smaller=largest_that_fits(compute, memory_bytes, *group),
    )


def next_command(outlook: Outlook, config: PlanConfig) -> str:
    """What one would want to do now."""
    changed = [shlex.join(words) for words in list_options(as_recipe(config), load_recipe(outlook.name))]
    asked = [f"--{name} {getattr(config, name)}" for name in ("machines", "network", "on")]
    only = [words for words in asked if not words.endswith((" 1", " 400g", " None"))]
    if outlook.fits is False:
        if outlook.ways_out:
            way = outlook.ways_out[0].options
            kept = [option for option in changed if option.split()[0] not in way.split()]
            return " ".join(["next: overnight plan", outlook.name, *kept, way, *only])
        processes = [option for option in changed if option.startswith("--processes")]
        smaller = outlook.smaller[0] if outlook.smaller else "quickstart"
        return " ".join(["next: overnight plan", smaller, *processes, *only])
    if outlook.assumption:
        options = [outlook.name, *changed, *only[:-1]] if config.on else [outlook.name, *changed, *only]
        return f"next: on that machine, overnight plan {' '.join(options)}, which measures"
    if config.machines > 1:
        trained = [option for option in changed if not option.startswith("--processes")]
        each = outlook.team.processes_per_machine
        start = f"torchrun --nnodes {config.machines} --nproc-per-node {each} --rdzv-backend c10d"
        words = " ".join([start, "--rdzv-endpoint HOST:29500 -m overnight train", outlook.name, *trained])
        return f"next: on each machine, HOST being the first, {words}"
    return " ".join(["next: overnight train", outlook.name, *changed])
