"""The command `overnight plan`: whether a run fits, how long it takes, how much disk and money it needs."""

from __future__ import annotations

import json
import os
import shutil
import sys
from typing import NamedTuple

from overnight.config import nearest, raise_problems
from overnight.distributed.world import World, count_processes, open_world
from overnight.hardware import (
    DEVICES,
    Device,
    find_device,
    find_device_name,
    find_memory_bytes,
)
from overnight.planning import PlanConfig
from overnight.planning.estimate import TokenCounts, find_token_counts, model_config_of
from overnight.planning.network import build_parallel_layout, compare_shardings
from overnight.planning.page import plan_text, plan_to_json
from overnight.planning.plan import (
    Plan,
    describe_assumption,
    with_assumed_costs,
    with_fit_options,
    with_measured_costs,
)
from overnight.recipe import list_options, load_recipe, plain_recipe
from overnight.run.setup import resolve
from overnight.terminal import echo, join_words, quote
from overnight.training import Compute
from overnight.training.compute import complete_compute, resolve_compute
from overnight.training.memory import Resources, fits_into
from overnight.training.sharding import unsupported_reasons

UNKNOWN = Device("unknown", r"(?!)")


def run(config: PlanConfig, name: str) -> None:
    """Print the plan of the recipe `name` with the settings in `config`. Trained weights are discarded."""
    raise_problems(config.problems(), f"recipe {config.run_name}")
    plan = plan_recipe(config, name)
    if config.json:
        sys.stdout.write(json.dumps(plan_to_json(plan), indent=2) + "\n")
    else:
        echo(plan_text(plan))
    echo(f"\n{command_after_plan(plan, config)}")


def plan_recipe(config: PlanConfig, name: str) -> Plan:
    """The plan, measured on this machine or estimated for another device."""
    plan = estimate_plan(config, name)
    if plan.fits is False:
        return with_fit_options(plan)
    return with_assumed_costs(plan) if config.device_type else with_measured_costs(plan, config.seconds)


class Target(NamedTuple):
    """The machine of a plan; one of several equal ones if there are several."""

    device: Device | None
    """Its row of the device table; None for a CPU."""
    device_name: str
    compute: Compute
    processes: int
    memory_bytes: int | None
    """Memory of one process."""


def estimate_plan(config: PlanConfig, name: str, text: TokenCounts | None = None) -> Plan:
    """The plan before any step is timed: what is decided, the memory, the disk and the counts.

    `text` is looked up if it is None. Raises ValueError as the run would.
    """
    text = text or find_token_counts(config.data, config.model.vocab_size)
    is_here = config.device_type is None
    target = local_target(config) if is_here else published_target(config)
    processes = config.machines * target.processes
    if processes > 1 and target.compute.device.partition(":")[0] not in {"cpu", "cuda"}:
        raise ValueError(f"processes={processes} needs NVIDIA GPUs or a CPU, not {target.compute.device}")
    resources = Resources(target.compute.device, target.memory_bytes or 0, processes, target.processes)
    sizes = model_config_of(config, text.vocab_size)
    resolved = resolve(plain_recipe(config), sizes, config.data, target.compute, resources)
    sharding = resolved.compute.sharding if processes > 1 else "none"
    together = World(
        rank=0,
        size=processes,
        device=target.compute.device,
        local_size=target.processes,
        is_distributed=True,
    )
    reasons = unsupported_reasons(resolved.compute, together)
    raise_problems(reasons, f"recipe {config.run_name}")
    layout = build_parallel_layout(target.device, config.network, resources, sharding)
    rows = resolved.plan.micro_batch_size
    memory = layout.estimate_memory(sizes, rows, resolved.compute, resolved.recipe.optimizer)
    precision = resolved.compute.precision
    peak_flops = target.device and target.device.peak_flops(precision)
    one = "" if is_here or processes > 1 else "one "
    return Plan(
        name=name,
        resolved=resolved,
        text=text,
        layout=layout,
        needed_bytes_by_sharding=compare_shardings(resolved, resources),
        device_name=one + layout.describe(target.device_name),
        device_memory_bytes=target.memory_bytes,
        peak_flops=peak_flops,
        disk_free_bytes=shutil.disk_usage(".").free if is_here else None,
        load_average=os.getloadavg()[0] if target.device is None else 0.0,
        dollars_per_hour=config.dollars_per_hour and config.dollars_per_hour * config.machines,
        fits=_fits(memory.together, target.memory_bytes, is_here=is_here),
        assumption=None if is_here else describe_assumption(target.device_name, peak_flops or 0, precision),
    )


def _fits(needed_bytes: int, memory_bytes: int | None, *, is_here: bool) -> bool | None:
    """True if the estimate fits; None if the memory is unknown. On this machine the full memory counts."""
    if memory_bytes is None:
        return None
    return needed_bytes <= memory_bytes if is_here else fits_into(memory_bytes, needed_bytes)


def local_target(config: PlanConfig) -> Target:
    """This machine. Raises ValueError for a device that it lacks."""
    device = open_world(config.compute.device).device
    processes = count_processes(config.compute.processes or 1, device)
    device_name = find_device_name(device)
    return Target(
        device=None if device == "cpu" else find_device(device_name) or UNKNOWN,
        device_name=device_name,
        compute=resolve_compute(config.compute, device),
        processes=processes,
        memory_bytes=find_memory_bytes(device) // (processes if device == "cpu" else 1),
    )


def published_target(config: PlanConfig) -> Target:
    """A device of the table, with what `overnight train` would choose there.

    Raises ValueError for an unknown device, and for a precision that it lacks.
    """
    device, asked = find_known_device(config.device_type or ""), config.compute
    precision = asked.precision or device.native
    if not getattr(device, precision):
        raise ValueError(
            f"precision={precision}: {device.name} has no hardware for it; choose {device.native}"
        )
    is_apple = device.memory_bytes is None
    return Target(
        device=device,
        device_name=device.name,
        compute=complete_compute(asked, "mps" if is_apple else "cuda", precision, compiles=not is_apple),
        processes=int(asked.processes or 1),
        memory_bytes=device.memory_bytes,
    )


def find_known_device(name: str) -> Device:
    """A row of the device table. Raises ValueError if there is none, or if it has no rate."""
    device = find_device(name)
    known = [device.name for device in DEVICES if device.fp32]
    if device is None:
        several = [each for each in known if each.startswith(f"{name.lower()}-")]
        if len(several) > 1:
            raise ValueError(f"device_type={name} is ambiguous: choose {', '.join(several)}")
        raise ValueError(f"device_type={name} is not in the table of devices{nearest(name.lower(), known)}")
    if device.name not in known:
        raise ValueError(
            f"device_type={name} can't be estimated: its maker has not published its peak rate; "
            "run overnight plan on that device, which measures"
        )
    return device


def command_after_plan(plan: Plan, config: PlanConfig) -> str:
    """The next command to run."""
    options = list_options(plain_recipe(config), load_recipe(plan.name))
    name, changed = quote(plan.name), [join_words(words) for words in options]
    if plan.fits is False:
        recipe, kept = name, changed
        if plan.fit_options:
            option = plan.fit_options[0].options
            kept = [*(each for each in changed if each.split()[0] not in option.split()), option]
        else:
            recipe = plan.largest_fitting[0] if plan.largest_fitting else "quickstart"
            kept = [each for each in changed if each.startswith("--processes")]
        own = _own_options(config, "machines", "network", "device_type")
        return " ".join(["next: overnight plan", recipe, *kept, *own])
    if plan.assumption:
        words = " ".join([name, *changed, *_own_options(config, "machines", "network")])
        return f"next: on that machine `overnight plan {words}`, which measures"
    if config.machines > 1:
        trained = [option for option in changed if not option.startswith("--processes")]
        start = f"torchrun --nnodes {config.machines} --nproc-per-node {plan.layout.processes_per_machine}"
        rendezvous = "--rdzv-backend c10d --rdzv-endpoint HOST:29500 -m overnight train"
        words = " ".join([start, rendezvous, name, *trained])
        return f"next: on each machine, HOST being the first, {words}"
    return " ".join(["next: overnight train", name, *changed])


def _own_options(config: PlanConfig, *names: str) -> list[str]:
    """Those of these settings of the plan that are not left at their default."""
    values = {name: getattr(config, name) for name in names}
    changed = {name: value for name, value in values.items() if value != getattr(PlanConfig, name)}
    return [f"--{name.replace('_', '-')} {quote(str(value))}" for name, value in changed.items()]
