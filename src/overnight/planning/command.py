"""The command `overnight plan`: whether a run will fit, how long it takes, how much disk and money."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
import sys
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from overnight.config import nearest, raise_problems
from overnight.distributed.machine import count_cores
from overnight.distributed.world import count_processes, open_world
from overnight.hardware import (
    DEVICES,
    Device,
    DeviceFacts,
    find_device,
    find_device_name,
    find_memory_bytes,
    find_peak_flops,
    measure_matmul_flops,
    native_precision,
)
from overnight.model.model_config import ModelConfig
from overnight.planning import PlanConfig, measure
from overnight.planning.estimate import (
    FORWARD_SHARE,
    StepCost,
    TokenCounts,
    count_run,
    find_token_counts,
    model_config_of,
    predict_disk,
    predict_seconds,
)
from overnight.planning.measure import measure_step_costs
from overnight.planning.network import (
    ParallelLayout,
    choose_parallel_layout,
    find_processes,
    scale_costs,
    with_sharding,
)
from overnight.planning.page import Plan, plan_text, plan_to_json
from overnight.recipe import Recipe, Resolved, load_recipe
from overnight.recipe_options import list_options
from overnight.run.setup import resolve
from overnight.terminal import echo
from overnight.training import Compute, ComputeConfig
from overnight.training.batch import ROWS_AT_MOST, BatchPlan
from overnight.training.compute import resolve_compute
from overnight.training.memory import (
    USABLE_FRACTION,
    Resources,
    estimate_memory,
    fits_into,
    largest_that_fits,
    suggest_fits,
)

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


def run(config: PlanConfig, name: str) -> None:
    """Show the plan of the recipe `name`, changed as `config` has it. Nothing that is trained is kept."""
    raise_problems(config.problems(), f"recipe {config.run_name}")
    device = None if config.device_type is None else find_known_device(config.device_type)
    outlook = plan_here(config, name) if device is None else plan_for_device(config, name, device)
    if config.json:
        sys.stdout.write(json.dumps(plan_to_json(outlook), indent=2) + "\n")
    else:
        echo(plan_text(outlook))
    echo(f"\n{command_after_plan(outlook, config)}")


def find_known_device(name: str) -> Device:
    """A row of the device table. Raises ValueError if there is none, or it holds no rate."""
    device = find_device(name)
    if device is None:
        several = [known for known in names_of_devices() if known.startswith(f"{name.lower()}-")]
        if len(several) > 1:
            raise ValueError(f"device_type={name} is several devices: choose {', '.join(several)}")
        raise ValueError(
            f"device_type={name} is not in the table of devices{nearest(name.lower(), names_of_devices())}"
        )
    if device.name not in names_of_devices():
        raise ValueError(
            f"device_type={name} can't be estimated: its maker has not published how fast it multiplies; "
            "run overnight plan on it, which measures"
        )
    return device


def names_of_devices() -> list[str]:
    """Those whose rates are published."""
    return [device.name for device in DEVICES if device.facts.fp32]


def planned_recipe(config: PlanConfig) -> Recipe:
    """The recipe that is asked about."""
    return Recipe(**{field.name: getattr(config, field.name) for field in dataclasses.fields(Recipe)})


def plan_here(config: PlanConfig, name: str) -> Plan:
    """The plan for this machine: measured, or only estimated if the model can't fit into its memory."""
    device = open_world(config.compute.device).device
    processes = count_processes(config.compute.processes or 1, device)
    check_together(device, config.machines * processes)
    text = find_token_counts(config.data, config.model.vocab_size)
    sizes = model_config_of(config, text.vocab_size)
    memory_bytes = find_memory_bytes(device) // (processes if device == "cpu" else 1)
    resources = Resources(device, memory_bytes, config.machines * processes, processes)
    compute = resolve_compute(config.compute, device)
    resolved = resolve(planned_recipe(config), sizes, config.data, compute, resources)
    recipe, plan = resolved.recipe, resolved.plan
    row = None if device == "cpu" else find_device(find_device_name(device)) or UNKNOWN
    team = choose_parallel_layout(config.machines, processes, row, config.network)
    team = with_sharding(team, resolved, memory_bytes)
    peak = find_peak_flops(device, resolved.compute.precision)
    outlook = Plan(
        name=name,
        resolved=resolved,
        text=text,
        device_name=team.describe(find_device_name(device)),
        assumption=None,
        team=team,
        memory=team.estimate_memory(recipe.model, plan.micro_batch_size, resolved.compute),
        device_memory_bytes=memory_bytes,
        fits=True,
        work=count_run(recipe, plan, text.validation_tokens),
        peak_flops=peak and peak * team.processes,
        disk_free_bytes=shutil.disk_usage(Path.cwd()).free,
        load_average=os.getloadavg()[0] if device == "cpu" else 0.0,
        dollars_per_hour=config.dollars_per_hour and config.dollars_per_hour * config.machines,
        made_at=datetime.now().astimezone(),
    )
    if outlook.needed_bytes > memory_bytes:
        return with_fit_options(outlook, memory_bytes)
    return measured(outlook, memory_bytes, config.seconds)


def check_together(device: str, processes: int) -> None:
    """Raise ValueError if such devices can't train together."""
    if processes > 1 and device.partition(":")[0] not in {"cpu", "cuda"}:
        raise ValueError(f"{processes} processes train together on NVIDIA GPUs or a CPU, not on {device}")


def measured(outlook: Plan, memory_bytes: int, seconds: float) -> Plan:
    """`outlook` with what one process of the team does here, measured, and what follows for all of them.

    Only estimated where the whole model does not fit into one device.
    """
    recipe, team = outlook.recipe, outlook.team
    whole = estimate_memory(recipe.model, outlook.plan.micro_batch_size, outlook.compute)
    if team.processes > 1 and not fits_into(memory_bytes, whole.together):
        return estimated(outlook, "the model is too large to be measured with one of them")
    found = measure_step_costs(outlook.resolved, seconds, team.processes)
    if found is None:
        return with_fit_options(outlook, memory_bytes)
    trial, resolved = found
    plan = resolved.plan
    is_whole = team.sharding == "none"
    outlook = dataclasses.replace(
        outlook,
        resolved=resolved,
        memory=team.estimate_memory(recipe.model, plan.micro_batch_size, resolved.compute),
        process_memory_bytes=trial.process_memory_bytes,
        peak_memory_bytes=trial.peak_memory_bytes if is_whole else None,
        evaluation_peak_memory_bytes=trial.evaluation_peak_memory_bytes if is_whole else None,
        work=count_run(recipe, plan, outlook.text.validation_tokens),
    )
    return with_costs(outlook, trial.paces())


def plan_for_device(config: PlanConfig, name: str, device: Device) -> Plan:
    """The plan for a device of the table: an estimate, and nothing is measured."""
    processes = config.compute.processes or 1
    assert isinstance(processes, int)
    text = find_token_counts(config.data, config.model.vocab_size)
    compute, memory_bytes = assumed_compute(config.compute, device), device.facts.memory_bytes
    check_together(compute.device, config.machines * processes)
    model = model_config_of(config, text.vocab_size)
    resources = Resources(compute.device, memory_bytes or 0, config.machines * processes, processes)
    resolved = resolve(planned_recipe(config), model, config.data, compute, resources)
    recipe, plan = resolved.recipe, resolved.plan
    team = choose_parallel_layout(config.machines, processes, device, config.network)
    team = with_sharding(team, resolved, memory_bytes)
    precision = compute.precision
    peak = 1e12 * (getattr(device.facts, precision) or 0)
    memory = team.estimate_memory(recipe.model, plan.micro_batch_size, compute)
    outlook = Plan(
        name=name,
        resolved=resolved,
        text=text,
        device_name=f"one {device.name}" if team.processes == 1 else team.describe(device.name),
        assumption=describe_assumption(device.name, peak, precision),
        team=team,
        memory=memory,
        device_memory_bytes=memory_bytes,
        fits=fits_into(memory_bytes, memory.together) if memory_bytes else None,
        work=count_run(recipe, plan, text.validation_tokens),
        peak_flops=peak * team.processes,
        dollars_per_hour=config.dollars_per_hour and config.dollars_per_hour * config.machines,
        made_at=datetime.now().astimezone(),
    )
    if outlook.fits is False:
        assert memory_bytes is not None
        return with_fit_options(outlook, memory_bytes)
    return estimated(outlook)


def estimated(outlook: Plan, why: str = "") -> Plan:
    """`outlook` with paces that are only supposed; without any where no peak of the device is published."""
    if outlook.peak_flops is None:
        return dataclasses.replace(outlook, assumption=why)
    peak, recipe = outlook.peak_flops / outlook.team.processes, outlook.recipe
    supposed = describe_assumption("", peak, recipe.compute.precision or "fp32")
    fast, likely, slow = (assumed_cost(recipe, outlook.plan, peak * share) for share in SHARES_OF_PEAK)
    outlook = dataclasses.replace(outlook, assumption=outlook.assumption or f"{why}: {supposed}")
    return with_costs(outlook, (fast, likely, slow))


def with_costs(outlook: Plan, paces: tuple[StepCost, StepCost, StepCost]) -> Plan:
    """`outlook` with the paces of one process, and what its team makes of them."""
    if outlook.team.processes == 1:
        return dataclasses.replace(outlook, paces=paces)
    shared = scale_costs(outlook.team, outlook.resolved, paces, outlook.device_memory_bytes)
    return dataclasses.replace(outlook, paces=shared.paces, shared=shared)


def assumed_compute(config: ComputeConfig, device: Device) -> Compute:
    """What `overnight train` would decide there. Raises ValueError for a precision that it lacks."""
    precision = config.precision or device.facts.native
    if not getattr(device.facts, precision):
        raise ValueError(
            f"precision={precision}: {device.name} does not multiply that in hardware; "
            f"choose {device.facts.native}"
        )
    is_apple = device.facts.memory_bytes is None
    return Compute(
        device="mps" if is_apple else "cuda",
        precision=precision,
        compile=not is_apple if config.compile is None else config.compile,
        attention=config.attention or "fused",
        loss=config.loss or "full",
        activation_checkpointing=config.activation_checkpointing,
        sharding=config.sharding or "none",
        deterministic_reduce=config.deterministic_reduce,
    )


def assumed_cost(recipe: Recipe, plan: BatchPlan, flops: float) -> StepCost:
    """The pace of a device that does so many operations a second, and more where some are done twice."""
    model = recipe.model
    again = model.executed_flops_per_token(
        recipe.compute.activation_checkpointing
    ) / model.executed_flops_per_token("none")
    token = model.flops_per_token() / flops
    trained = again * token
    micro_batch = trained * plan.micro_batch_size * plan.tokens_per_row
    return StepCost(
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


def with_fit_options(outlook: Plan, memory_bytes: int) -> Plan:
    """`outlook` of a model that does not fit, with what would."""
    recipe, team = outlook.recipe, outlook.team
    compute = dataclasses.replace(outlook.compute, sharding=team.sharding)
    smallest = recipe.batch.batch_ramp_start_tokens or recipe.batch.tokens_per_step
    rows = smallest // recipe.model.context_length // team.processes
    possible = [count for count in range(1, min(rows, ROWS_AT_MOST) + 1) if rows % count == 0]
    group = (team.processes, team.processes_per_machine)
    return dataclasses.replace(
        outlook,
        fits=False,
        ways_out=tuple(suggest_fits(recipe.model, compute, possible, memory_bytes, *group)),
        several=find_processes(team, outlook.resolved, memory_bytes),
        smaller=largest_that_fits(compute, memory_bytes, *group),
    )


def command_after_plan(outlook: Plan, config: PlanConfig) -> str:
    """What one would want to do now."""
    changed = [shlex.join(words) for words in list_options(planned_recipe(config), load_recipe(outlook.name))]
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
        options = (
            [outlook.name, *changed, *only[:-1]] if config.device_type else [outlook.name, *changed, *only]
        )
        return f"next: on that machine, overnight plan {' '.join(options)}, which measures"
    if config.machines > 1:
        trained = [option for option in changed if not option.startswith("--processes")]
        each = outlook.team.processes_per_machine
        start = f"torchrun --nnodes {config.machines} --nproc-per-node {each} --rdzv-backend c10d"
        words = " ".join([start, "--rdzv-endpoint HOST:29500 -m overnight train", outlook.name, *trained])
        return f"next: on each machine, HOST being the first, {words}"
    return " ".join(["next: overnight train", outlook.name, *changed])


# ---------------------------------------------------------------- memory, disk and time of a whole recipe on this machine, as `overnight plan` reckons them,


LONGEST_MICRO_BATCH = 0.5  # seconds, above which steps are not measured but reckoned
MEASURED_SECONDS = 2.0
BUSY = 1.5  # of a load average, for each core: this command is one of those counted
SHARE_ON_CPU = 0.85  # of its large products: 88 to 92% were measured of GPT-2 124M (README.md)


class ResourceEstimate(NamedTuple):
    """A whole recipe with everything decided, and what it needs."""

    resolved: Resolved
    team: ParallelLayout
    device_name: str
    needed_bytes: int
    """Of memory, in each process."""
    usable_bytes: int
    disk_bytes: dict[str, int]
    """What is not on the disk yet, by what it holds."""
    free_bytes: int


def estimate_resources(
    recipe: Recipe, sizes: ModelConfig, text: TokenCounts, device: str
) -> ResourceEstimate:
    """What a run would decide and need on `device`. Raises ValueError as a run would."""
    processes = count_processes(recipe.compute.processes or 1, device)
    check_together(device, processes)
    memory_bytes = find_memory_bytes(device) // (processes if device == "cpu" else 1)
    resources = Resources(device, memory_bytes, processes, processes)
    resolved = resolve(recipe, sizes, recipe.data, resolve_compute(recipe.compute, device), resources)
    decided, plan = resolved.recipe, resolved.plan
    device_name = find_device_name(device)
    row = None if device == "cpu" else find_device(device_name) or UNKNOWN
    team = with_sharding(choose_parallel_layout(1, processes, row, "400g"), resolved, memory_bytes)
    memory = team.estimate_memory(decided.model, plan.micro_batch_size, resolved.compute)
    disk = predict_disk(decided, count_run(decided, plan, text.validation_tokens), text)
    return ResourceEstimate(
        resolved=resolved,
        team=team,
        device_name=team.describe(device_name),
        needed_bytes=memory.together,
        usable_bytes=int(USABLE_FRACTION * memory_bytes),
        disk_bytes={name: count for name, count in disk.items() if name != "shards" or text.folder is None},
        free_bytes=shutil.disk_usage(Path.cwd()).free,
    )


def predict_time(seen: ResourceEstimate, text: TokenCounts) -> tuple[float, str]:
    """(seconds, what that rests on): a few steps where they are short, not compiled; else arithmetic."""
    recipe, plan = seen.resolved.recipe, seen.resolved.plan
    device, precision = seen.resolved.compute.device, seen.resolved.compute.precision
    work = count_run(recipe, plan, text.validation_tokens)
    native = device != "cpu" or precision == native_precision(device)  # else emulated, a hundred times slower
    flops = measure_matmul_flops(device, precision if native else "fp32", repeats=3)
    tokens = plan.micro_batch_size * plan.tokens_per_row
    seconds = tokens * recipe.model.flops_per_token() / flops
    found = None
    if seconds < LONGEST_MICRO_BATCH:
        compute = dataclasses.replace(seen.resolved.compute, compile=False)
        eager = dataclasses.replace(seen.resolved, compute=compute)
        found = measure.measure_step_costs(eager, MEASURED_SECONDS, seen.team.processes)
    if found is not None:
        paces, rests_on = found[0].paces(), "from a few steps, not compiled"
        load = os.getloadavg()[0] if device == "cpu" else 0.0
        rests_on = (
            rests_on if load < BUSY * (count_cores() or 1) else f"others are busy here: load {load:.1f}"
        )
    else:
        reached = SHARE_ON_CPU if device == "cpu" else max(SHARES_OF_PEAK)
        pace = assumed_cost(recipe, plan, reached * flops)
        paces = (pace, pace, pace)
        rests_on = (
            f"at {reached:.0%} of what it multiplies" if native else f"or more: {precision} is emulated here"
        )
    if seen.team.processes > 1:
        paces = scale_costs(seen.team, seen.resolved, paces, None).paces
    return sum(predict_seconds(work, paces[1]).values()), rests_on
