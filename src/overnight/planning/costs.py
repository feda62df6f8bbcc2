"""The speed of a plan: measured here, or assumed from the device's published peak."""

from __future__ import annotations

import dataclasses
from typing import Literal

from overnight.hardware import measure_matmul_flops, native_precision
from overnight.planning import measure
from overnight.planning.estimate import FORWARD_SHARE, StepCost, count_run, possible_micro_batches
from overnight.planning.plan import Plan
from overnight.recipe import Resolved
from overnight.training.memory import (
    FitOption,
    estimate_memory,
    fits_into,
    largest_that_fits,
    suggest_fits,
    try_shardings,
)

# MFU assumed for a device of another machine. Published for 124M parameters in 16 bits: build-nanogpt, eager,
# 33 to 38% on A100 and H200; PyTorch compiled 32% on one A100 PCIe (llm.c, pull request 323) and 42% on one
# H200 (modded-nanogpt, records/track_3_optimization); llm.c 40% on 8 H100 (the same,
# records/track_1_short/2024-10-13_llmc) and 60% on 8 A100 (its scripts/run_gpt2_124M.sh). All by the count of
# `ModelConfig.flops_per_token`.
ASSUMED_MFU = (0.50, 0.40, 0.30)  # fast, likely, slow
PUBLISHED = {
    "a100": "others measured 32% (PyTorch, one A100) to 60% (llm.c, eight)",
    "h100": "others measured 40% (llm.c, eight H100)",
    "h200": "others measured 42% (PyTorch, one H200)",
}
CHECKPOINTING: tuple[Literal["selective", "block"], ...] = ("selective", "block")
NOT_PUBLISHED = "no published measurement of this device"
LONGEST_MICRO_BATCH = 0.5  # seconds; with longer ones a quick forecast times no steps
QUICK_SECONDS = 2.0
CPU_SHARE_OF_MATMUL = 0.85  # 88 to 92% were measured for GPT-2 124M


def add_measured_costs(plan: Plan, seconds: float) -> None:
    """Measure the costs of one process here, and fill in what follows for all of them.

    The costs are assumed if the model does not fit into one device.
    """
    layout, resolved = plan.layout, plan.resolved
    whole = estimate_memory(resolved.model, resolved.plan.micro_batch_size, resolved.compute)
    if layout.processes > 1 and not fits_into(plan.device_memory_bytes or 0, whole.together):
        return add_assumed_costs(plan, "the model is too large to be measured in one process: ")
    found = measure.measure_step_costs(resolved, seconds, layout.processes)
    if found is None:
        return add_fit_options(plan)
    plan.resolved = resolved = found.resolved
    plan.counts = count_run(resolved, plan.text.validation_tokens)
    plan.memory = layout.estimate_memory(resolved.model, resolved.plan.micro_batch_size, resolved.compute)
    plan.process_memory_bytes = found.process_memory_bytes
    if layout.sharding == "none":  # otherwise one of several processes needs less than measured
        plan.peak_memory_bytes = found.peak_memory_bytes
        plan.evaluation_peak_memory_bytes = found.evaluation_peak_memory_bytes
    return plan.add_forecast(found.costs)


def add_assumed_costs(plan: Plan, reason: str = "") -> None:
    """Fill in the figures that follow from an assumed MFU, if the device's peak is published."""
    if plan.peak_flops is None:
        plan.assumption = reason.removesuffix(": ")
        return
    precision = plan.resolved.compute.precision
    plan.assumption = plan.assumption or reason + describe_assumption("", plan.peak_flops, precision)
    plan.add_forecast([assumed_cost(plan.resolved, plan.peak_flops * share) for share in ASSUMED_MFU])


def assumed_cost(resolved: Resolved, flops: float) -> StepCost:
    """The costs of a device that computes `flops` of a model's FLOPs a second."""
    model, plan = resolved.model, resolved.plan
    executed = model.executed_flops_per_token(resolved.compute.activation_checkpointing)
    recomputation = executed / model.executed_flops_per_token("none")
    token = model.flops_per_token() / flops
    return StepCost(
        micro_batch=recomputation * token * plan.micro_batch_size * plan.tokens_per_row,
        update=0.0,
        start=0.0,
        evaluated_token=FORWARD_SHARE * token,
        sampled_token=0.0,
        saved_byte=0.0,
    )


def describe_assumption(device_name: str, peak_flops: float, precision: str) -> str:
    """The basis of an estimate, with published measurements, as text."""
    slow, likely, fast = sorted(ASSUMED_MFU)
    published = (words for name, words in PUBLISHED.items() if device_name.startswith(name))
    return (
        f"{likely:.0%} ({slow:.0%} to {fast:.0%}) of the published {peak_flops / 1e12:,.4g} TFLOP/s in "
        f"{precision}; {next(published, NOT_PUBLISHED)}"
    )


def add_fit_options(plan: Plan) -> None:
    """Fill in options with which a model fits that does not fit as configured."""
    resolved, layout, memory_bytes = plan.resolved, plan.layout, plan.device_memory_bytes or 0
    possible = possible_micro_batches(resolved, layout.processes)
    group = (layout.processes, layout.processes_per_machine)
    plan.fits = False
    plan.fit_options = tuple(suggest_fits(resolved.model, resolved.compute, possible, memory_bytes, *group))
    if layout.processes == 1 and not layout.is_on_cpu:
        plan.fit_in_processes = find_processes(resolved, memory_bytes)
    plan.largest_fitting = largest_that_fits(resolved.compute, memory_bytes, *group)


def find_processes(resolved: Resolved, memory_bytes: int) -> FitOption | None:
    """The fewest GPUs of one machine, up to eight, whose memory is enough for a model too large for one."""
    before = resolved.compute
    for level in (before.activation_checkpointing, *CHECKPOINTING):
        compute = dataclasses.replace(before, activation_checkpointing=level)
        for count in (2, 4, 8):
            *_, needed = try_shardings(resolved.model, 1, compute, memory_bytes, count, count).values()
            if fits_into(memory_bytes, needed):
                option = f" --activation-checkpointing {level}" if compute != before else ""
                return FitOption(f"--processes {count}{option}", needed)
    return None


def quick_forecast(plan: Plan) -> tuple[float, str]:
    """(seconds of the run, what they are based on), within seconds and without compiling.

    Times a few steps if they are short, otherwise the device's matrix products.
    """
    resolved, batch = plan.resolved, plan.resolved.plan
    device, precision = resolved.compute.device, resolved.compute.precision
    native = device != "cpu" or precision == native_precision(device)  # emulation is a hundred times slower
    flops = measure_matmul_flops(device, precision if native else "fp32", repeats=3)
    tokens = batch.micro_batch_size * batch.tokens_per_row
    if tokens * resolved.model.flops_per_token() / flops < LONGEST_MICRO_BATCH:
        found = measure.measure_step_costs(resolved, QUICK_SECONDS, plan.layout.processes, compiled=False)
        if found is not None:
            return plan.forecast_with(found.costs).seconds, "from a few steps, not compiled"
    share = CPU_SHARE_OF_MATMUL if device == "cpu" else max(ASSUMED_MFU)
    cost = assumed_cost(resolved, share * flops)
    basis = f"at {share:.0%} of the speed of a matrix product"
    if not native:
        basis = f"or more: {precision} is emulated here"
    return plan.forecast_with([cost] * 3).seconds, basis
