"""Several processes that train together: their memory, and the cost of a step scaled to all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from overnight.hardware import Device
from overnight.model.model_config import ModelConfig
from overnight.planning.estimate import CostRange, StepCost
from overnight.planning.network import BETWEEN, Cluster, StepPrediction, find_link_within, predict_step
from overnight.recipe import Resolved
from overnight.training import Compute, Sharding
from overnight.training.batch import ROWS_AT_MOST, BatchPlan
from overnight.training.memory import (
    FitOption,
    MemoryEstimate,
    Resources,
    estimate_memory,
    fits_into,
    try_shardings,
)

SMALLEST_GAIN = 0.95  # of a step's time: options that save less are not suggested
ACTIVATION_CHECKPOINTING: tuple[Literal["selective", "block"], ...] = ("selective", "block")
OVERLAP = (1.0, 0.5, 0.0)  # fast, likely, slow: the share of communication assumed to overlap, where it can


@dataclass(frozen=True, kw_only=True)
class ParallelLayout:
    """The processes that a plan is for; a single one as well."""

    machines: int = 1
    processes_per_machine: int = 1
    cluster: Cluster | None = None
    """None on a CPU, where the cost of communication is unknown."""
    sharding: Sharding = "none"
    needed_bytes_by_sharding: dict[Sharding, int] = field(default_factory=dict)
    """Memory of one process with each sharding that was considered; the chosen one is last."""
    is_sharding_requested: bool = False
    """Whether the recipe sets the sharding."""

    @property
    def processes(self) -> int:
        """On all machines together."""
        return self.machines * self.processes_per_machine

    @property
    def processes_per_device(self) -> int:
        """Each process has its own GPU; the processes of one machine share its CPU."""
        return self.processes_per_machine if self.cluster is None else 1

    def estimate_memory(self, model: ModelConfig, rows: int, compute: Compute) -> MemoryEstimate:
        """Memory of one process."""
        return estimate_memory(model, rows, compute, self.processes, self.processes_per_machine)

    def predict_step(self, model: ModelConfig, micro_batches: int, seconds: float) -> StepPrediction | None:
        """A step that computes for `seconds` in each process; None where communication is unknown."""
        if self.cluster is None:
            return None
        return predict_step(model, self.sharding, self.cluster, micro_batches, seconds)

    def describe(self, device_name: str) -> str:
        """The machines, for a person; a single device by its bare name."""
        if self.processes == 1:
            return device_name
        each = f"{self.processes_per_machine} x {device_name}"
        if self.cluster is None:
            each = f"{self.processes_per_machine} processes on {device_name}"
        return each if self.machines == 1 else f"{self.machines} machines of {each}"


def build_cluster(
    machines: int, processes_per_machine: int, device: Device | None, network: str
) -> Cluster | None:
    """Processes with one GPU each of that row of the device table; None for a CPU."""
    return device and Cluster(
        machines=machines,
        processes_per_machine=processes_per_machine,
        within=find_link_within(device.name),
        between=BETWEEN[network] if machines > 1 else None,
        memory_bytes_per_second=device.facts.bytes_per_second,
    )


def choose_parallel_layout(
    resolved: Resolved, resources: Resources, cluster: Cluster | None
) -> ParallelLayout:
    """The processes of a run, with its sharding and the memory of those that were tried before it."""
    _, memory_bytes, processes, per_machine = resources
    model, rows, compute = resolved.model, resolved.plan.micro_batch_size, resolved.compute
    is_requested, needed = resolved.recipe.compute.sharding is not None, {}
    if processes > 1 and is_requested:
        estimate = estimate_memory(model, rows, compute, processes, per_machine)
        needed = {compute.sharding: estimate.together}
    elif processes > 1:
        needed = try_shardings(model, rows, compute, memory_bytes, processes, per_machine)
    return ParallelLayout(
        machines=processes // per_machine,
        processes_per_machine=per_machine,
        cluster=cluster,
        sharding=compute.sharding if processes > 1 else "none",
        needed_bytes_by_sharding=needed,
        is_sharding_requested=processes > 1 and is_requested,
    )


def find_processes(layout: ParallelLayout, resolved: Resolved, memory_bytes: int) -> FitOption | None:
    """The fewest GPUs of one machine, up to eight, whose memory is enough for a model too large for one."""
    if layout.processes > 1 or layout.cluster is None:
        return None
    before = resolved.compute
    for level in (before.activation_checkpointing, *ACTIVATION_CHECKPOINTING):
        compute = dataclasses.replace(before, activation_checkpointing=level)
        for count in (2, 4, 8):
            *_, needed = try_shardings(resolved.model, 1, compute, memory_bytes, count, count).values()
            if fits_into(memory_bytes, needed):
                option = f" --activation-checkpointing {level}" if compute != before else ""
                return FitOption(f"--processes {count}{option}", needed)
    return None


@dataclass(frozen=True, kw_only=True)
class Communication:
    """Predicted communication of one process in a full step, under the names of the JSON output."""

    compute_seconds_per_step: float
    communication_seconds_per_step: float
    communication_bytes_per_step: float
    communication_overlaps: bool
    efficiency_range: tuple[float, float]
    """(worst, best) share of the step that is computation."""
    efficiency_range_by_network: dict[str, tuple[float, float]]
    """The same with other networks between the machines."""
    faster_options: str | None = None
    """Options that make a step faster."""
    faster_step_seconds: float | None = None


def scale_costs(layout: ParallelLayout, model: ModelConfig, costs: CostRange) -> CostRange:
    """The costs of all processes together, from those of one with a device to itself."""
    fast, likely, slow = (
        scale_cost(layout, model, cost, overlap) for cost, overlap in zip(costs, OVERLAP, strict=True)
    )
    return fast, likely, slow


def scale_cost(layout: ParallelLayout, model: ModelConfig, cost: StepCost, overlap: float) -> StepCost:
    """The cost of all processes together if that share of communication overlaps, where it can at all."""
    alone = cost.micro_batch * layout.processes_per_device
    micro_batch, update = alone, _update_seconds(layout, cost)
    step = layout.predict_step(model, 1, alone)
    if step is not None and step.overlaps:
        best, worst = step.seconds_range
        micro_batch = worst - overlap * (worst - best)
    elif step is not None:
        update += step.communication_seconds
    return cost._replace(
        micro_batch=micro_batch / layout.processes,
        update=update,
        evaluated_token=cost.evaluated_token * layout.processes_per_device / layout.processes,
    )


def _update_seconds(layout: ParallelLayout, cost: StepCost) -> float:
    """The optimizer's time in one process, which updates all weights or its share of them."""
    whole = cost.update * layout.processes_per_device
    return whole if layout.sharding == "none" else whole / layout.processes


def predict_communication(
    layout: ParallelLayout, resolved: Resolved, cost: StepCost, memory_bytes: int | None
) -> Communication | None:
    """The communication of a full step, from the cost of one process; None where it is unknown."""
    micro_batches = resolved.plan.stages[-1].micro_batches // layout.processes
    seconds = micro_batches * cost.micro_batch + _update_seconds(layout, cost)
    step = layout.predict_step(resolved.model, micro_batches, seconds)
    if step is None or layout.cluster is None:
        return None
    networks = {}
    for link in BETWEEN.values() if layout.machines > 1 else ():
        if link != layout.cluster.between:
            other = dataclasses.replace(layout.cluster, between=link)
            predicted = predict_step(resolved.model, layout.sharding, other, micro_batches, seconds)
            networks[link.name] = predicted.efficiency_range
    faster = find_faster(layout, resolved, cost, memory_bytes) if step.overlaps and memory_bytes else None
    return Communication(
        compute_seconds_per_step=step.compute_seconds,
        communication_seconds_per_step=step.communication_seconds,
        communication_bytes_per_step=step.communication_bytes,
        communication_overlaps=step.overlaps,
        efficiency_range=step.efficiency_range,
        efficiency_range_by_network=networks,
        faster_options=faster[0] if faster else None,
        faster_step_seconds=faster[1] if faster else None,
    )


def find_faster(
    layout: ParallelLayout, resolved: Resolved, cost: StepCost, memory_bytes: int
) -> tuple[str, float] | None:
    """(options, seconds of a step) with a larger micro-batch, which gathers weights less often.

    Also with checkpointed blocks, which make room for it and cost their recomputation. None if no options
    are much faster.
    """
    model, before, batch = resolved.model, resolved.compute, resolved.plan
    micro_batches = batch.stages[-1].micro_batches
    now = scale_cost(layout, model, cost, OVERLAP[1]).step(micro_batches)
    candidates = {}
    for level in (before.activation_checkpointing, ACTIVATION_CHECKPOINTING[-1]):
        compute = dataclasses.replace(before, activation_checkpointing=level)
        options = f"--activation-checkpointing {level} " if compute != before else ""
        for rows in _larger_micro_batches(layout, batch):
            if not fits_into(memory_bytes, layout.estimate_memory(model, rows, compute).together):
                continue
            factor = _recomputation(model, compute, before) * rows / batch.micro_batch_size
            larger = cost._replace(micro_batch=factor * cost.micro_batch)
            likely = scale_cost(layout, model, larger, OVERLAP[1])
            step_seconds = likely.step(micro_batches * batch.micro_batch_size // rows)
            candidates[f"{options}--micro-batch-size {rows}"] = step_seconds
    options, seconds = min(candidates.items(), key=lambda each: each[1], default=("", now))
    return (options, seconds) if seconds < SMALLEST_GAIN * now else None


def _larger_micro_batches(layout: ParallelLayout, batch: BatchPlan) -> Iterator[int]:
    """Rows per micro-batch from today's on that divide the rows of a process in the smallest step."""
    rows = batch.stages[0].micro_batches * batch.micro_batch_size // layout.processes
    for count in range(batch.micro_batch_size, min(rows, ROWS_AT_MOST) + 1):
        if rows % count == 0:
            yield count


def _recomputation(model: ModelConfig, compute: Compute, before: Compute) -> float:
    """How many times as much is computed as with other activation checkpointing."""
    return model.executed_flops_per_token(compute.activation_checkpointing) / model.executed_flops_per_token(
        before.activation_checkpointing
    )
