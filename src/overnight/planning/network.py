"""The processes of a run, the links between them, and how long what they communicate takes.

Every collective is assumed to use the ring algorithm (Patarasuk and Yuan 2009, "Bandwidth Optimal All-reduce
Algorithms for Clusters of Workstations"). With n processes, an all-reduce of S bytes makes each process send
2 (n-1)/n S bytes; an all-gather or a reduce-scatter sends half of that, and a broadcast S. The time is the
launch of the collective, the latency of a message round the ring, the bytes over the bandwidth of the slowest
link, and the copies into and out of buffers at the bandwidth of device memory.

`benchmarks/communication.py` compares this with processes on one machine. Not modelled: stragglers, shared
networks, and reductions in trees or switches (NVLink SHARP makes an all-reduce of 8 H100 a quarter faster).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from overnight.distributed.world import BUCKET_BYTES
from overnight.hardware import GB, Device
from overnight.model.model_config import ModelConfig, parameter_shapes
from overnight.planning.estimate import StepCost, possible_micro_batches
from overnight.recipe import Resolved
from overnight.training import Compute, OptimizerConfig, Sharding
from overnight.training.activations import FLOAT32
from overnight.training.memory import (
    MemoryEstimate,
    Resources,
    estimate_memory,
    fits_into,
    try_shardings,
)

SMALLEST_GAIN = 0.95  # of a step's time: options that save less are not suggested
# The share of communication assumed to overlap, where it can: fast, likely, slow.
OVERLAP = (1.0, 0.5, 0.0)
LIKELY_OVERLAP = OVERLAP[1]


@dataclass(frozen=True)
class Link:
    """A connection that carries messages from one process to the next."""

    name: str
    bytes_per_second: float
    """In one direction, as collectives achieve it: the "bus bandwidth" of nccl-tests. Within a machine,
    that of each process; between machines, that of a machine, shared by its processes."""
    message_seconds: float
    """Latency of a small message."""
    start_seconds: float = field(default=8.4e-6, kw_only=True)
    """Launch of any collective, before its first message."""
    source: str
    """Origin of the bandwidth; the latencies are from NCCL's src/graph/tuning.cc (ring, protocol Simple)."""


NVLINK, PCI, NETWORK = 3.4e-6, 5.7e-6, 14e-6  # seconds a message

PCIE = Link("PCIe", 12 * GB, PCI, "12 GB/s by NCCL's src/graph/topo.h for PCIe 3; 4 has up to twice that")
_NVLINK_3 = Link("NVLink 3", 230 * GB, NVLINK, "300 GB/s by the maker; 230, nccl-tests issue 149")
_NVLINK_4 = Link("NVLink 4", 370 * GB, NVLINK, "450 GB/s by the maker; 370 in NCCL, nccl-tests issue 212")
_NVLINK_2 = Link("NVLink 2", 120 * GB, NVLINK, "150 GB/s by the maker; 120 by NCCL's topo.h")
WITHIN: dict[str, Link] = {
    "b200": Link("NVLink 5", 720 * GB, NVLINK, "900 GB/s by the maker; 720 by NCCL's src/graph/topo.h"),
    "h200": _NVLINK_4,
    "h100": _NVLINK_4,
    "a100-80gb": _NVLINK_3,
    "a100-40gb": _NVLINK_3,
    "v100-32gb": _NVLINK_2,
    "v100-16gb": _NVLINK_2,
}
"""Between the GPUs of a machine with an NVLink board, by name in the table of devices; others use PCIe.

The makers' figures are half of those in NVIDIA's data sheets, which sum both directions. The achieved figures
are from answers of NCCL's authors in the issues of nccl-tests."""

BETWEEN: dict[str, Link] = {
    "100g": Link("100 Gb/s", 12 * GB, NETWORK, "12 GB/s an adapter of 100 Gb/s, nccl-tests issue 119"),
    "400g": Link("400 Gb/s", 47 * GB, NETWORK, "46 to 48 GB/s an adapter of 400 Gb/s, nccl-tests issue 290"),
    "8x400g": Link("8 x 400 Gb/s", 376 * GB, NETWORK, "46 to 48 GB/s an adapter, nccl-tests issue 290"),
}
"""Between machines: one adapter for all GPUs of a machine or, as in a DGX H100, one for each GPU.

InfiniBand, or Ethernet with RDMA (RoCE); plain TCP is slower."""


SHARED_CPU = Link("", math.inf, 0.0, "", start_seconds=0.0)
"""Between processes on one CPU, whose communication is not counted."""

Among = Literal["all", "machine", "machines"]
"""All processes; those of each machine; those with the same local rank on all machines."""


@dataclass(frozen=True, kw_only=True)
class ParallelLayout:
    """The processes of a run (one or more), the links between them and their sharding."""

    machines: int = 1
    processes_per_machine: int = 1
    within: Link = SHARED_CPU
    between: Link | None = None
    """None for a single machine, and on a CPU."""
    memory_bytes_per_second: float | None = None
    """Bandwidth of each process's device memory; copies are not counted if None."""
    sharding: Sharding = "none"

    @property
    def processes(self) -> int:
        """Number of processes on all machines."""
        return self.machines * self.processes_per_machine

    @property
    def is_on_cpu(self) -> bool:
        """True if the processes of a machine share its CPU; False if each has a GPU."""
        return self.within is SHARED_CPU

    @property
    def processes_per_device(self) -> int:
        """1, or all processes of a machine, which share its CPU."""
        return self.processes_per_machine if self.is_on_cpu else 1

    def group_size(self, among: Among) -> int:
        """Number of processes that take part in one collective."""
        return {"machine": self.processes_per_machine, "machines": self.machines}.get(among, self.processes)

    def estimate_memory(
        self, model: ModelConfig, rows: int, compute: Compute, optimizer: OptimizerConfig
    ) -> MemoryEstimate:
        """Memory of one process."""
        processes = self.processes, self.processes_per_machine
        return estimate_memory(model, rows, compute, *processes, optimizer)

    def describe(self, device_name: str) -> str:
        """The machines, as text; a single device by its name only."""
        if self.processes == 1:
            return device_name
        each = f"{self.processes_per_machine} {'processes on' if self.is_on_cpu else 'x'} {device_name}"
        return each if self.machines == 1 else f"{self.machines} machines of {each}"


def build_parallel_layout(
    device: Device | None, network: str, resources: Resources, sharding: Sharding
) -> ParallelLayout:
    """Processes with one GPU each of that row of the device table; `device` None for a CPU."""
    machines = resources.processes // resources.processes_per_machine
    return ParallelLayout(
        machines=machines,
        processes_per_machine=resources.processes_per_machine,
        within=WITHIN.get(device.name, PCIE) if device else SHARED_CPU,
        between=BETWEEN[network] if device and machines > 1 else None,
        memory_bytes_per_second=device and device.bytes_per_second,
        sharding=sharding,
    )


def compare_shardings(resolved: Resolved, resources: Resources) -> dict[Sharding, int]:
    """Memory of one process with each sharding that was considered, the chosen one last; {} for one process.

    Only one was considered if the recipe sets it.
    """
    model, rows, compute = resolved.model, resolved.plan.micro_batch_size, resolved.compute
    optimizer = resolved.recipe.optimizer
    if resources.processes == 1:
        return {}
    if resolved.recipe.compute.sharding is not None:
        _, _, processes, per_machine = resources
        needed = estimate_memory(model, rows, compute, processes, per_machine, optimizer)
        return {compute.sharding: needed.together}
    return try_shardings(model, rows, compute, resources, optimizer)


Kind = Literal["all-reduce", "all-gather", "reduce-scatter", "broadcast"]


class Collective(NamedTuple):
    """Consecutive collectives of one kind."""

    kind: Kind
    among: Among
    calls: int
    bytes: int
    """Total of all calls: the full size of what is gathered or reduced, not one process's part."""


def list_collectives(model: ModelConfig, layout: ParallelLayout, micro_batches: int) -> list[Collective]:
    """The collectives of one step with `micro_batches` in each process; [] for a single process.

    none, zero1: one all-reduce of all gradients, in buckets (`World.all_reduce`); with zero1, the owner of
    each parameter broadcasts it. fsdp: for each micro-batch, a block's weights are gathered twice, the
    weights outside of blocks once (FSDP2 keeps them from the forward to the backward pass), and gradients are
    reduce-scattered block by block. hsdp: the same within machines, then one all-reduce between them.
    """
    if layout.processes == 1:
        return []
    shapes, sharding = parameter_shapes(model), layout.sharding
    total = FLOAT32 * sum(map(math.prod, shapes.values()))
    if sharding in {"none", "zero1"}:
        found = [Collective("all-reduce", "all", _buckets(total), total)]
        if sharding == "zero1":
            count = layout.processes * _buckets(total // layout.processes)
            found.append(Collective("broadcast", "all", count, total))
        return found
    outside = FLOAT32 * sum(math.prod(shape) for name, shape in shapes.items() if not name.startswith("h."))
    units, gathers = model.n_layer + 1, 2 * model.n_layer + 1
    among: Among = "machine" if sharding == "hsdp" else "all"
    found = [
        Collective("all-gather", among, gathers * micro_batches, (2 * total - outside) * micro_batches),
        Collective("reduce-scatter", among, units * micro_batches, total * micro_batches),
    ]
    if sharding == "hsdp" and layout.machines > 1:
        found.append(Collective("all-reduce", "machines", units, total // layout.processes_per_machine))
    return [each for each in found if layout.group_size(each.among) > 1]


def _buckets(count: int) -> int:
    return math.ceil(count / BUCKET_BYTES)


def sent_bytes(collective: Collective, layout: ParallelLayout) -> float:
    """Bytes that one process sends in all calls together."""
    n = layout.group_size(collective.among)
    share = {"all-reduce": 2 * (n - 1) / n, "broadcast": 1.0}.get(collective.kind, (n - 1) / n)
    return share * collective.bytes


def collective_seconds(collective: Collective, layout: ParallelLayout) -> float:
    """Duration of all calls in sequence."""
    rounds = 2 if collective.kind == "all-reduce" else 1
    hops = rounds * (layout.group_size(collective.among) - 1)
    hops_between = rounds * (layout.machines - 1) if collective.among != "machine" else 0
    latency = layout.within.start_seconds + (hops - hops_between) * layout.within.message_seconds
    bandwidth = layout.within.bytes_per_second if collective.among != "machines" else math.inf
    if layout.between and hops_between:
        latency += hops_between * layout.between.message_seconds
        # One ring over all processes crosses each network link once; rings of equal local ranks share it.
        sharers = layout.processes_per_machine if collective.among == "machines" else 1
        bandwidth = min(bandwidth, layout.between.bytes_per_second / sharers)
    seconds = collective.calls * latency + sent_bytes(collective, layout) / bandwidth
    # Buffers are copied in and out, each copy a read and a write; where a part is small, one way only.
    copied = (4 if collective.kind in {"all-reduce", "broadcast"} else 2) * collective.bytes
    return seconds + copied / (layout.memory_bytes_per_second or math.inf)


@dataclass(frozen=True, kw_only=True)
class Communication:
    """Predicted communication of one process in a step, with the names of the JSON output."""

    compute_seconds_per_step: float
    communication_seconds_per_step: float
    communication_bytes_per_step: float
    """Bytes that one process sends in a step."""
    communication_overlaps: bool
    """True if communication may overlap with computation."""
    efficiency_range_by_network: dict[str, tuple[float, float]] = field(default_factory=dict)
    """`efficiency_range` with other networks between the machines."""
    faster_options: str | None = None
    """Options that make a step faster."""
    faster_step_seconds: float | None = None

    @property
    def seconds_range(self) -> tuple[float, float]:
        """(best, worst): full overlap, and none."""
        parts = (self.compute_seconds_per_step, self.communication_seconds_per_step)
        return (max(parts) if self.communication_overlaps else sum(parts)), sum(parts)

    @property
    def efficiency_range(self) -> tuple[float, float]:
        """(worst, best) share of the step that is computation."""
        best, worst = self.seconds_range
        return self.compute_seconds_per_step / worst, self.compute_seconds_per_step / best


def predict_step(
    model: ModelConfig, layout: ParallelLayout, micro_batches: int, compute_seconds: float
) -> Communication:
    """Predict a step that computes for `compute_seconds` in each process, over `micro_batches`.

    The all-reduce of replicated training and the broadcasts of ZeRO-1 follow the computation and do not
    overlap. FSDP2 prefetches the next block's weights and reduces the last block's gradients while a block
    computes; how much of that overlaps lies between nothing and everything.
    """
    collectives = list_collectives(model, layout, micro_batches)
    return Communication(
        compute_seconds_per_step=compute_seconds,
        communication_seconds_per_step=sum(collective_seconds(each, layout) for each in collectives),
        communication_bytes_per_step=sum(sent_bytes(each, layout) for each in collectives),
        communication_overlaps=layout.sharding in {"fsdp", "hsdp"},
    )


def scale_cost(layout: ParallelLayout, model: ModelConfig, cost: StepCost, overlap: float) -> StepCost:
    """The cost of all processes together if the share `overlap` of communication overlaps."""
    micro_batch, update = cost.micro_batch * layout.processes_per_device, _update_seconds(layout, cost)
    step = predict_step(model, layout, 1, micro_batch)
    if step.communication_overlaps:
        best, worst = step.seconds_range
        micro_batch = worst - overlap * (worst - best)
    else:
        update += step.communication_seconds_per_step
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
    layout: ParallelLayout, resolved: Resolved, cost: StepCost, memory_bytes: int
) -> Communication | None:
    """The communication of a full step, from the cost of one process; None where there is none to count."""
    if layout.processes == 1 or layout.is_on_cpu:
        return None
    model = resolved.model
    micro_batches = resolved.plan.stages[-1].micro_batches // layout.processes
    seconds = micro_batches * cost.micro_batch + _update_seconds(layout, cost)
    step = predict_step(model, layout, micro_batches, seconds)
    others = {
        link.name: predict_step(model, dataclasses.replace(layout, between=link), micro_batches, seconds)
        for link in BETWEEN.values()
        if layout.between not in {None, link}
    }
    options, step_seconds = None, None
    if step.communication_overlaps:
        options, step_seconds = find_faster(layout, resolved, cost, memory_bytes)
    return dataclasses.replace(
        step,
        efficiency_range_by_network={name: other.efficiency_range for name, other in others.items()},
        faster_options=options,
        faster_step_seconds=step_seconds,
    )


def find_faster(
    layout: ParallelLayout, resolved: Resolved, cost: StepCost, memory_bytes: int
) -> tuple[str, float] | tuple[None, None]:
    """(options, seconds of a step) with a larger micro-batch, which gathers weights less often.

    Also with checkpointed blocks, which free memory and cost recomputation. (None, None) if no
    options are much faster.
    """
    model, before, batch = resolved.model, resolved.compute, resolved.plan
    micro_batches = batch.stages[-1].micro_batches
    seconds = {"": scale_cost(layout, model, cost, LIKELY_OVERLAP).step(micro_batches)}
    executed = model.executed_flops_per_token(before.activation_checkpointing)
    for level in (before.activation_checkpointing, "block"):
        compute = dataclasses.replace(before, activation_checkpointing=level)
        options = f"--activation-checkpointing {level} " if compute != before else ""
        for rows in possible_micro_batches(resolved, layout.processes):
            needed = layout.estimate_memory(model, rows, compute, resolved.recipe.optimizer).together
            if rows < batch.micro_batch_size or not fits_into(memory_bytes, needed):
                continue
            recomputation = model.executed_flops_per_token(level) / executed
            larger = recomputation * rows / batch.micro_batch_size * cost.micro_batch
            likely = scale_cost(layout, model, cost._replace(micro_batch=larger), LIKELY_OVERLAP)
            step_seconds = likely.step(micro_batches * batch.micro_batch_size // rows)
            seconds[f"{options}--micro-batch-size {rows}"] = step_seconds
    fastest = min(seconds, key=seconds.__getitem__)
    return (fastest, seconds[fastest]) if seconds[fastest] < SMALLEST_GAIN * seconds[""] else (None, None)
