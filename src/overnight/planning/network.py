"""What processes say to one another in a step, and how long that takes: a model, not a measurement.

Every collective is taken to go round a ring (Patarasuk and Yuan 2009, Bandwidth Optimal All-reduce
Algorithms for Clusters of Workstations): with n processes an all-reduce of S bytes makes each send
2 (n-1)/n S, an all-gather or a reduce-scatter half of that, and a broadcast passes on all of S. That takes a
start, the way of a first message round the ring, and the bytes by the bandwidth of the slowest link; besides,
what is sent is copied together and apart again, at the bandwidth of the device's memory.

`benchmarks/communication.py` checks this against processes on one machine. Left out are processes that wait
for the slowest of them, networks that others use as well, and trees and switches that add up on the way:
NVLink SHARP, for one, makes an all-reduce among 8 H100 a quarter faster.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from overnight.distributed.world import BUCKET_BYTES
from overnight.hardware import GB, Device
from overnight.model.gpt import parameter_shapes
from overnight.model.model_config import ModelConfig
from overnight.planning.estimate import StepCost
from overnight.recipe import Resolved
from overnight.training import Compute
from overnight.training.batch import ROWS_AT_MOST
from overnight.training.memory import FitOption, MemoryEstimate, estimate_memory, fits_into, try_shardings
from overnight.training.ownership import Sharding

FLOAT32 = 4
MICROSECOND = 1e-6


@dataclass(frozen=True, kw_only=True)
class Link:
    """What carries messages from one process to the next."""

    name: str
    bytes_per_second: float
    """In one direction, as collectives reach it: the "bus bandwidth" of nccl-tests. Within a machine that of
    each process, between machines that of a machine, whose processes share it."""
    message_seconds: float
    """Until a small message has arrived."""
    start_seconds: float
    """Of any collective, before there is a message."""
    source: str
    """Where the figures come from."""


def _nccl_link(name: str, gigabytes_per_second: float, microseconds: float, source: str) -> Link:
    """A link with the latencies that NCCL reckons with for a ring of large messages.

    They stand in its src/graph/tuning.cc (ring, protocol Simple): 8.4 us to start, and for each message 3.4
    over NVLink, 5.7 over PCIe and 14 over a network.
    """
    return Link(
        name=name,
        bytes_per_second=gigabytes_per_second * GB,
        message_seconds=microseconds * MICROSECOND,
        start_seconds=8.4 * MICROSECOND,
        source=source,
    )


NVLINK, PCI, NETWORK = 3.4, 5.7, 14.0  # microseconds a message

PCIE = _nccl_link("PCIe", 12, PCI, "12 GB/s by NCCL's src/graph/topo.h for PCIe 3; 4 has up to twice that")
WITHIN: dict[str, Link] = {
    "b200": _nccl_link("NVLink 5", 720, NVLINK, "900 GB/s by the maker; 720 by NCCL's src/graph/topo.h"),
    "h200": _nccl_link("NVLink 4", 370, NVLINK, "450 GB/s by the maker; 370 in NCCL, nccl-tests issue 212"),
    "h100": _nccl_link("NVLink 4", 370, NVLINK, "450 GB/s by the maker; 370 in NCCL, nccl-tests issue 212"),
    "a100-80gb": _nccl_link("NVLink 3", 230, NVLINK, "300 GB/s by the maker; 230, nccl-tests issue 149"),
    "a100-40gb": _nccl_link("NVLink 3", 230, NVLINK, "300 GB/s by the maker; 230, nccl-tests issue 149"),
    "v100-32gb": _nccl_link("NVLink 2", 120, NVLINK, "150 GB/s by the maker; 120 by NCCL's topo.h"),
    "v100-16gb": _nccl_link("NVLink 2", 120, NVLINK, "150 GB/s by the maker; 120 by NCCL's topo.h"),
}
"""Between the GPUs of a machine that has eight of them on a board, by their names in the table of devices.

The makers' figures are NVIDIA's data sheets', half of what they print, which is both directions together. In
the issues of nccl-tests NCCL's authors say what is left of them. All others are taken to talk over PCIe."""

BETWEEN: dict[str, Link] = {
    "100g": _nccl_link("100 Gb/s", 12, NETWORK, "12 GB/s an adapter of 100 Gb/s, nccl-tests issue 119"),
    "400g": _nccl_link("400 Gb/s", 47, NETWORK, "46 to 48 GB/s an adapter of 400 Gb/s, nccl-tests issue 290"),
    "8x400g": _nccl_link("8 x 400 Gb/s", 376, NETWORK, "46 to 48 GB/s an adapter, nccl-tests issue 290"),
}
"""Between machines, by what each has: one adapter for all of its GPUs, or, as a DGX H100, one for each.

InfiniBand, or Ethernet with RDMA (RoCE); over plain TCP less comes through, and later."""


def find_link_within(device_name: str) -> Link:
    """What connects the GPUs of a machine, by their name in the table of devices."""
    return WITHIN.get(device_name, PCIE)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Who talks to whom, and over what."""

    machines: int
    processes_per_machine: int
    within: Link
    between: Link | None = None
    """None of a single machine."""
    memory_bytes_per_second: float | None = None
    """Of each process's device; copies are not counted if None."""

    @property
    def processes(self) -> int:
        """All of them."""
        return self.machines * self.processes_per_machine


Kind = Literal["all-reduce", "all-gather", "reduce-scatter", "broadcast"]
Among = Literal["all", "machine", "machines"]
"""All processes; those of each machine; those of equal place on all machines."""


class Collective(NamedTuple):
    """Collectives of one kind, one after the other."""

    kind: Kind
    among: Among
    calls: int
    bytes: int
    """Of all calls together: the whole of what is gathered or added up, not one process's part of it."""


def list_collectives(
    model: ModelConfig, sharding: Sharding, cluster: Cluster, micro_batches: int
) -> list[Collective]:
    """What one step says in which each process has so many micro-batches; [] for a single process.

    Gradients are summed once, in buckets (`World.all_reduce`); where parameters have owners, these send them out.
    Divided weights are gathered for each micro-batch: a block's twice, what is in no block once, since
    FSDP2 keeps it from the forward to the backward pass; and gradients are added up block by block. Hybrid,
    that happens within machines, and what has been added up in each is added up over all once a step.
    """
    if cluster.processes == 1:
        return []
    shapes = parameter_shapes(model)
    total = FLOAT32 * sum(map(math.prod, shapes.values()))
    if sharding in {"none", "zero1"}:
        found = [Collective("all-reduce", "all", _buckets(total), total)]
        if sharding == "zero1":
            count = cluster.processes * _buckets(total // cluster.processes)
            found.append(Collective("broadcast", "all", count, total))
        return found
    others = FLOAT32 * sum(math.prod(shape) for name, shape in shapes.items() if not name.startswith("h."))
    groups, times = model.n_layer + 1, micro_batches
    among: Among = "machine" if sharding == "hsdp" else "all"
    found = [
        Collective("all-gather", among, (groups + model.n_layer) * times, (2 * total - others) * times),
        Collective("reduce-scatter", among, groups * times, total * times),
    ]
    if sharding == "hsdp" and cluster.machines > 1:
        shards = total // cluster.processes_per_machine
        found.append(Collective("all-reduce", "machines", groups, shards))
    return [each for each in found if count_members(each.among, cluster) > 1]


def _buckets(count: int) -> int:
    return math.ceil(count / BUCKET_BYTES)


def count_members(among: Among, cluster: Cluster) -> int:
    """How many processes take part in one collective."""
    members = {"machine": cluster.processes_per_machine, "machines": cluster.machines}
    return members.get(among, cluster.processes)


def sent_bytes(collective: Collective, cluster: Cluster) -> float:
    """What one process sends, in all of them together."""
    n = count_members(collective.among, cluster)
    share = {"all-reduce": 2 * (n - 1) / n, "broadcast": 1.0}.get(collective.kind, (n - 1) / n)
    return share * collective.bytes


def collective_seconds(collective: Collective, cluster: Cluster) -> float:
    """How long they take, one after the other."""
    rounds = 2 if collective.kind == "all-reduce" else 1
    hops = rounds * (count_members(collective.among, cluster) - 1)
    hops_between = rounds * (cluster.machines - 1) if collective.among != "machine" else 0
    way = cluster.within.start_seconds + (hops - hops_between) * cluster.within.message_seconds
    bandwidth = cluster.within.bytes_per_second if collective.among != "machines" else math.inf
    if hops_between:
        assert cluster.between is not None
        way += hops_between * cluster.between.message_seconds
        sharers = cluster.processes_per_machine if collective.among == "machines" else 1
        bandwidth = min(bandwidth, cluster.between.bytes_per_second / sharers)
    seconds = collective.calls * way + sent_bytes(collective, cluster) / bandwidth
    return seconds + _copied_bytes(collective) / (cluster.memory_bytes_per_second or math.inf)


def _copied_bytes(collective: Collective) -> int:
    """What device memory reads and writes for the buffers: in and out, or, where a part is small, one way."""
    return (4 if collective.kind in {"all-reduce", "broadcast"} else 2) * collective.bytes


@dataclass(frozen=True, kw_only=True)
class StepPrediction:
    """How one step's time is divided, in each process."""

    compute_seconds: float
    communication_seconds: float
    communication_bytes: float
    """That one process sends."""
    overlaps: bool
    """Whether it may be spoken while it is computed."""

    @property
    def seconds_range(self) -> tuple[float, float]:
        """At best and at worst: with all that can be hidden behind the other hidden, and with nothing."""
        both = self.compute_seconds + self.communication_seconds
        return (max(self.compute_seconds, self.communication_seconds) if self.overlaps else both), both

    @property
    def efficiency_range(self) -> tuple[float, float]:
        """Share of the step in which it computes, at worst and at best: 1 is as if nothing were said."""
        best, worst = self.seconds_range
        return self.compute_seconds / worst, self.compute_seconds / best


def predict_step(
    model: ModelConfig, sharding: Sharding, cluster: Cluster, micro_batches: int, compute_seconds: float
) -> StepPrediction:
    """What becomes of a step that takes each process so long to compute, in so many micro-batches.

    The one reduction of replicated training, and the broadcasts of ZeRO-1, come when all is computed, and
    nothing is hidden. FSDP2 fetches the next block's weights and adds up the last one's gradients while a
    block computes: what is hidden of that lies between nothing and everything.
    """
    collectives = list_collectives(model, sharding, cluster, micro_batches)
    return StepPrediction(
        compute_seconds=compute_seconds,
        communication_seconds=sum(collective_seconds(each, cluster) for each in collectives),
        communication_bytes=sum(sent_bytes(each, cluster) for each in collectives),
        overlaps=sharding in {"fsdp", "hsdp"},
    )


# ---------------------------------------------------------------- several processes that train together


WORTH_TELLING = 0.95  # of the time that a step takes: what saves less is not advised
HIDDEN = (1.0, 0.5, 0.0)  # fast, likely, slow: how much of what can be hidden behind computing is


@dataclass(frozen=True, kw_only=True)
class ParallelLayout:
    """The processes that a plan is for; one by itself as well."""

    machines: int = 1
    processes_per_machine: int = 1
    cluster: Cluster | None = None
    """None on a CPU, of whose processes it is not known how fast they talk."""
    sharding: Sharding = "none"
    tried: dict[Sharding, int] = field(default_factory=dict)
    """Bytes that a process needs with each sharding that was considered, the chosen one the last."""
    is_asked: bool = False
    """Whether the sharding was, and not chosen."""

    @property
    def processes(self) -> int:
        """All of them."""
        return self.machines * self.processes_per_machine

    @property
    def sharers_of_a_device(self) -> int:
        """How many compute on one device: those of a machine share its CPU, and have a GPU each."""
        return self.processes_per_machine if self.cluster is None else 1

    def estimate_memory(self, model: ModelConfig, rows: int, compute: Compute) -> MemoryEstimate:
        """What one process takes."""
        compute = dataclasses.replace(compute, sharding=self.sharding)
        return estimate_memory(model, rows, compute, self.processes, self.processes_per_machine)

    def describe(self, device_name: str) -> str:
        """The machines, in words; one device by its bare name."""
        if self.processes == 1:
            return device_name
        each = f"{self.processes_per_machine} x {device_name}"
        if self.cluster is None:
            each = f"{self.processes_per_machine} processes on {device_name}"
        return each if self.machines == 1 else f"{self.machines} machines of {each}"


def choose_parallel_layout(
    machines: int, processes_per_machine: int, device: Device | None, network: str
) -> ParallelLayout:
    """So many processes with a GPU each of that row of the table; on a CPU if it is None."""
    team = ParallelLayout(machines=machines, processes_per_machine=processes_per_machine)
    if device is None:
        return team
    cluster = Cluster(
        machines=machines,
        processes_per_machine=processes_per_machine,
        within=find_link_within(device.name),
        between=BETWEEN[network] if machines > 1 else None,
        memory_bytes_per_second=device.facts.bytes_per_second,
    )
    return dataclasses.replace(team, cluster=cluster)


def with_sharding(team: ParallelLayout, resolved: Resolved, memory_bytes: int | None) -> ParallelLayout:
    """`team` with what its processes divide: as asked, or as `overnight train` would choose.

    `memory_bytes` are one process's; nothing is divided where they are not known.
    """
    recipe, compute, rows = resolved.recipe, resolved.compute, resolved.plan.micro_batch_size
    asked = recipe.compute.sharding
    if team.processes == 1:
        return team
    if asked is not None or memory_bytes is None:
        sharding: Sharding = asked or "none"
        team = dataclasses.replace(team, sharding=sharding, is_asked=asked is not None)
        return dataclasses.replace(
            team, tried={sharding: team.estimate_memory(recipe.model, rows, compute).together}
        )
    tried = try_shardings(
        recipe.model, rows, compute, memory_bytes, team.processes, team.processes_per_machine
    )
    return dataclasses.replace(team, sharding=[*tried][-1], tried=tried)


def find_processes(team: ParallelLayout, resolved: Resolved, memory_bytes: int) -> FitOption | None:
    """The fewest GPUs of a machine, up to eight, that a model fits into which does not into one."""
    if team.processes > 1 or team.cluster is None:
        return None
    for change in ({}, {"activation_checkpointing": "selective"}, {"activation_checkpointing": "block"}):
        compute = dataclasses.replace(resolved.compute, **change)  # type: ignore[arg-type]
        for count in (2, 4, 8):
            *_, needed = try_shardings(resolved.model, 1, compute, memory_bytes, count, count).values()
            if fits_into(memory_bytes, needed):
                words = [f"--processes {count}", *(f"--{name} {value}" for name, value in change.items())]
                return FitOption(" ".join(words), needed)
    return None


class ParallelEstimate(NamedTuple):
    """What becomes of the work of one when the team does it."""

    paces: tuple[StepCost, StepCost, StepCost]
    """Fast, likely and slow, of all together: a micro-batch takes its share of the time it takes one."""
    step: StepPrediction | None
    """Of one process in a full step; None where it is not known how fast they talk."""
    networks: dict[str, StepPrediction]
    """The same over other networks between the machines, by their names."""
    faster: tuple[str, float] | None
    """Settings with which a step is faster, and its seconds."""


def scale_costs(
    team: ParallelLayout,
    resolved: Resolved,
    paces: tuple[StepCost, StepCost, StepCost],
    memory_bytes: int | None,
) -> ParallelEstimate:
    """What the team makes of the paces of one process with a device for itself."""
    recipe, plan = resolved.recipe, resolved.plan
    fast, likely, slow = (
        scale_cost(team, recipe.model, pace, hidden) for pace, hidden in zip(paces, HIDDEN, strict=True)
    )
    if team.cluster is None:
        return ParallelEstimate((fast, likely, slow), None, {}, None)
    micro_batches = plan.stages[-1].micro_batches // team.processes
    seconds = micro_batches * paces[1].micro_batch + _update_seconds(team, paces[1])
    networks = {}
    if team.machines > 1:
        others = (
            dataclasses.replace(team.cluster, between=link)
            for link in BETWEEN.values()
            if link != team.cluster.between
        )
        networks = {
            other.between.name: predict_step(recipe.model, team.sharding, other, micro_batches, seconds)
            for other in others
            if other.between is not None
        }
    step = predict_step(recipe.model, team.sharding, team.cluster, micro_batches, seconds)
    faster = find_faster(team, resolved, paces[1], memory_bytes) if step.overlaps else None
    return ParallelEstimate((fast, likely, slow), step, networks, faster)


def scale_cost(team: ParallelLayout, model: ModelConfig, pace: StepCost, hidden: float) -> StepCost:
    """The pace of all together, if so much of what can be hidden behind computing is."""
    alone = pace.micro_batch * team.sharers_of_a_device
    micro_batch, update = alone, _update_seconds(team, pace)
    if team.cluster is not None:
        said = predict_step(model, team.sharding, team.cluster, 1, alone)
        best, worst = said.seconds_range
        if said.overlaps:
            micro_batch = worst - hidden * (worst - best)
        else:
            update += said.communication_seconds
    return pace._replace(
        micro_batch=micro_batch / team.processes,
        update=update,
        evaluated_token=pace.evaluated_token * team.sharers_of_a_device / team.processes,
    )


def _update_seconds(team: ParallelLayout, pace: StepCost) -> float:
    """Of one process, which updates all weights, or its part of them."""
    whole = pace.update * team.sharers_of_a_device
    return whole if team.sharding == "none" else whole / team.processes


def find_faster(
    team: ParallelLayout, resolved: Resolved, pace: StepCost, memory_bytes: int | None
) -> tuple[str, float] | None:
    """More rows at once, for which weights are gathered less often; None if they gain too little.

    Recomputed blocks make room for them, and cost what is computed again.
    """
    model, compute, plan = resolved.model, resolved.compute, resolved.plan
    rows_before, micro_batches = plan.micro_batch_size, plan.stages[-1].micro_batches
    of_process = plan.stages[0].micro_batches * rows_before // team.processes
    if memory_bytes is None:
        return None
    executed = model.executed_flops_per_token(compute.activation_checkpointing)
    found: dict[str, float] = {}
    for change in ({}, {"activation_checkpointing": "block"}):
        changed = dataclasses.replace(compute, **change)  # type: ignore[arg-type]
        slower = model.executed_flops_per_token(changed.activation_checkpointing) / executed
        for rows in range(rows_before, min(of_process, ROWS_AT_MOST) + 1):
            needed = team.estimate_memory(model, rows, changed).together
            if of_process % rows or not fits_into(memory_bytes, needed):
                continue
            longer = pace._replace(micro_batch=slower * pace.micro_batch * rows / rows_before)
            likely = scale_cost(team, model, longer, HIDDEN[1])
            options = {**change, "micro-batch-size": rows}
            words = " ".join(f"--{name} {value}" for name, value in options.items())
            found[words] = likely.step(micro_batches * rows_before // rows)
    now = scale_cost(team, model, pace, HIDDEN[1]).step(micro_batches)
    best = min(found, key=lambda words: found[words], default=None)
    return (best, found[best]) if best is not None and found[best] < WORTH_TELLING * now else None
