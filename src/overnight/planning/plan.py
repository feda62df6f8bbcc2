"""A plan: the resolved recipe, its machine, and figures that follow from a measured or an assumed speed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property

from overnight.hardware import measure_matmul_flops, native_precision
from overnight.planning import measure
from overnight.planning.estimate import (
    FORWARD_SHARE,
    CostRange,
    RunCounts,
    StepCost,
    TokenCounts,
    count_run,
    possible_micro_batches,
    predict_disk,
    predict_seconds,
)
from overnight.planning.network import (
    OVERLAP,
    Communication,
    ParallelLayout,
    predict_communication,
    scale_cost,
)
from overnight.recipe import Resolved
from overnight.training import Sharding
from overnight.training.memory import (
    FitOption,
    MemoryEstimate,
    Resources,
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
NOT_PUBLISHED = "no published measurement of this device"
TOO_LARGE = "the model is too large to be measured in one process"
LONGEST_MICRO_BATCH = 0.5  # seconds; with longer ones a quick forecast times no steps
QUICK_SECONDS = 2.0
CPU_SHARE_OF_MATMUL = 0.85  # 88 to 92% were measured for GPT-2 124M


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Speed, duration and price of a run, under the names of the JSON output."""

    tokens_per_second: float
    """Tokens per second of the steps alone."""
    tokens_per_second_range: tuple[float, float]
    """(slow, fast)."""
    step_seconds: float
    micro_batch_seconds: float
    update_seconds: float
    mfu: float | None
    """Model FLOPs utilization; None if the device's peak is not published."""
    seconds_by_use: dict[str, float]
    seconds: float
    seconds_range: tuple[float, float]
    """(fast, slow)."""
    ends_at: str | None
    """ISO time at which a run that starts now ends; None beyond datetime's range."""
    dollars: float | None
    dollars_per_billion_tokens: float | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The resolved recipe, its machine, and what was found there; all other figures follow from these."""

    name: str
    """The recipe's name, as the user gave it."""
    resolved: Resolved
    text: TokenCounts
    layout: ParallelLayout
    needed_bytes_by_sharding: dict[Sharding, int]
    """Memory of one process with each sharding considered, the chosen one last; {} for one process."""
    device_name: str
    """All devices, as text."""
    device_memory_bytes: int | None
    """Memory available to one process; None for a device of another machine that shares its memory."""
    peak_flops: float | None
    """Published peak FLOP/s of one device in the recipe's precision."""
    disk_free_bytes: int | None
    """Free bytes on the disk; None for another machine."""
    load_average: float
    """Load average of the last minute from other programs; 0 if the run computes on a GPU."""
    dollars_per_hour: float | None
    """Price of all machines."""
    fits: bool | None
    """True if the run fits; None if the device's memory is unknown."""
    fit_options: tuple[FitOption, ...] = ()
    """Options that make it fit, if it does not."""
    fit_in_processes: FitOption | None = None
    """The number of GPUs of one machine that it fits into, up to eight, if it does not fit into one."""
    largest_fitting: tuple[str, int] | None = None
    """The largest published model that fits, and its bytes, if this one does not."""
    assumption: str | None
    """What an estimate is based on; None if the machine was measured."""
    measured: measure.MeasuredMemory = measure.MeasuredMemory()
    """What one process took here, if it was measured."""
    costs: CostRange | None = None
    """Measured or assumed costs of one process; None if there are none."""

    @property
    def counts(self) -> RunCounts:
        """Number of each operation in the run."""
        return count_run(self.resolved, self.text.validation_tokens)

    @property
    def memory(self) -> MemoryEstimate:
        """Memory of one process."""
        resolved = self.resolved
        rows = resolved.plan.micro_batch_size
        return self.layout.estimate_memory(resolved.model, rows, resolved.compute, resolved.recipe.optimizer)

    @property
    def needed_bytes(self) -> int:
        """Estimated memory of one process."""
        return self.memory.together + self.measured.process_memory_bytes

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a full step, after any batch ramp."""
        return self.resolved.plan.stages[-1].micro_batches

    @property
    def disk_bytes(self) -> dict[str, int]:
        """Bytes on the disk, by use."""
        return predict_disk(self.resolved.recipe, self.counts, self.text)

    @property
    def new_disk_bytes(self) -> dict[str, int]:
        """The bytes of `disk_bytes` that are still to be written."""
        return {
            use: count for use, count in self.disk_bytes.items() if use != "shards" or not self.text.folder
        }

    @cached_property
    def forecast(self) -> Forecast | None:
        """Speed and duration; None if no speed was measured or assumed."""
        return None if self.costs is None else self.forecast_with(self.costs)

    def forecast_with(self, costs: CostRange) -> Forecast:
        """Speed and duration, from the costs of one process."""
        layout, resolved, counts, batch = self.layout, self.resolved, self.counts, self.resolved.recipe.batch
        costs = [
            scale_cost(layout, resolved.model, cost, overlap)
            for cost, overlap in zip(costs, OVERLAP, strict=True)
        ]
        fast, likely, slow = (batch.tokens_per_step / cost.step(self.micro_batches) for cost in costs)
        shortest, seconds, longest = (sum(predict_seconds(counts, cost).values()) for cost in costs)
        peak_flops = self.peak_flops and self.peak_flops * layout.processes
        dollars = None if self.dollars_per_hour is None else seconds / 3600 * self.dollars_per_hour
        return Forecast(
            tokens_per_second=likely,
            tokens_per_second_range=(slow, fast),
            step_seconds=costs[1].step(self.micro_batches),
            micro_batch_seconds=costs[1].micro_batch,
            update_seconds=costs[1].update,
            mfu=likely * resolved.model.flops_per_token() / peak_flops if peak_flops else None,
            seconds_by_use=predict_seconds(counts, costs[1]),
            seconds=seconds,
            seconds_range=(shortest, longest),
            ends_at=time_after(seconds),
            dollars=dollars,
            dollars_per_billion_tokens=None if dollars is None else dollars / counts.tokens * 1e9,
        )

    @cached_property
    def communication(self) -> Communication | None:
        """Communication of a step; None for a single process, and if it is unknown."""
        if self.costs is None:
            return None
        memory_bytes = self.device_memory_bytes or 0
        return predict_communication(self.layout, self.resolved, self.costs[1], memory_bytes)


def time_after(seconds: float) -> str | None:
    """The ISO time in `seconds` from now; None beyond datetime's range."""
    try:
        return (datetime.now().astimezone() + timedelta(seconds=seconds)).isoformat(timespec="seconds")
    except OverflowError:
        return None


def with_assumed_costs(plan: Plan) -> Plan:
    """The plan with what follows from an assumed MFU; without it if the device's peak is not published."""
    if plan.peak_flops is None:
        return plan
    costs = [assumed_cost(plan.resolved, plan.peak_flops * share) for share in ASSUMED_MFU]
    return dataclasses.replace(plan, costs=costs)


def with_measured_costs(plan: Plan, seconds: float) -> Plan:
    """The plan with what follows for all processes from the costs of one, measured here.

    The costs are assumed if the model does not fit into one device.
    """
    layout, resolved, flops = plan.layout, plan.resolved, plan.peak_flops
    rows, optimizer = resolved.plan.micro_batch_size, resolved.recipe.optimizer
    whole = estimate_memory(resolved.model, rows, resolved.compute, optimizer=optimizer)
    if layout.processes > 1 and not fits_into(plan.device_memory_bytes or 0, whole.together):
        basis = f": {describe_assumption('', flops, resolved.compute.precision)}" if flops else ""
        return with_assumed_costs(dataclasses.replace(plan, assumption=TOO_LARGE + basis))
    found = measure.measure_step_costs(resolved, seconds, layout.processes)
    if found is None:
        return with_fit_options(plan)
    memory = found.memory
    if layout.sharding != "none":  # one of several processes needs less than measured
        memory = measure.MeasuredMemory(memory.process_memory_bytes)
    return dataclasses.replace(plan, resolved=found.resolved, measured=memory, costs=found.costs)


def assumed_cost(resolved: Resolved, flops: float) -> StepCost:
    """The costs of a device that computes `flops` of a model's FLOPs a second."""
    model, plan = resolved.model, resolved.plan
    executed = model.executed_flops_per_token(resolved.compute.activation_checkpointing)
    recomputation = executed / model.executed_flops_per_token("none")
    token = model.flops_per_token() / flops
    return StepCost(
        micro_batch=recomputation * token * plan.micro_batch_size * plan.tokens_per_row,
        evaluated_token=FORWARD_SHARE * token,
    )


def describe_assumption(device_name: str, peak_flops: float, precision: str) -> str:
    """The basis of an estimate, with published measurements, as text."""
    slow, likely, fast = sorted(ASSUMED_MFU)
    published = (words for name, words in PUBLISHED.items() if device_name.startswith(name))
    return (
        f"{likely:.0%} ({slow:.0%} to {fast:.0%}) of the published {peak_flops / 1e12:,.4g} TFLOP/s in "
        f"{precision}; {next(published, NOT_PUBLISHED)}"
    )


def with_fit_options(plan: Plan) -> Plan:
    """The plan of a model that does not fit as configured, with the options and the model that would."""
    resolved, layout, memory_bytes = plan.resolved, plan.layout, plan.device_memory_bytes or 0
    possible = possible_micro_batches(resolved, layout.processes)
    optimizer = resolved.recipe.optimizer
    device, group = resolved.compute.device, (layout.processes, layout.processes_per_machine)
    resources = Resources(device, memory_bytes, *group)
    is_alone = layout.processes == 1 and not layout.is_on_cpu
    return dataclasses.replace(
        plan,
        fits=False,
        fit_options=tuple(suggest_fits(resolved.model, resolved.compute, possible, resources, optimizer)),
        fit_in_processes=find_processes(resolved, memory_bytes) if is_alone else None,
        largest_fitting=largest_that_fits(resolved.compute, resources, optimizer),
    )


def find_processes(resolved: Resolved, memory_bytes: int) -> FitOption | None:
    """The fewest GPUs of one machine, up to eight, whose memory is enough for a model too large for one."""
    before, optimizer = resolved.compute, resolved.recipe.optimizer
    for level in (before.activation_checkpointing, "selective", "block"):
        compute = dataclasses.replace(before, activation_checkpointing=level)
        for count in (2, 4, 8):
            resources = Resources(compute.device, memory_bytes, count, count)
            *_, needed = try_shardings(resolved.model, 1, compute, resources, optimizer).values()
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
        eager = dataclasses.replace(resolved, compute=dataclasses.replace(resolved.compute, compile=False))
        found = measure.measure_step_costs(eager, QUICK_SECONDS, plan.layout.processes)
        if found is not None:
            return plan.forecast_with(found.costs).seconds, "from a few steps, not compiled"
    share = CPU_SHARE_OF_MATMUL if device == "cpu" else max(ASSUMED_MFU)
    cost = assumed_cost(resolved, share * flops)
    basis = f"at {share:.0%} of the speed of a matrix product"
    if not native:
        basis = f"or more: {precision} is emulated here"
    return plan.forecast_with([cost] * 3).seconds, basis
