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

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from overnight.hardware import GB
from overnight.model.config import ModelConfig
from overnight.ownership import Sharding
from overnight.world import BUCKET_BYTES

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

    Gradients are summed once, in buckets (`World.sum`); where parameters have owners, these send them out.
    Divided weights are gathered for each micro-batch: a block's twice, what is in no block once, since
    FSDP2 keeps it from the forward to the backward pass; and gradients are added up block by block. Hybrid,
    that happens within machines, and what has been added up in each is added up over all once a step.
    """
    if cluster.processes == 1:
        return []
    shapes = model.parameter_shapes()
    total = FLOAT32 * sum(map(math.prod, shapes.values()))
    if sharding in {"none", "optimizer"}:
        found = [Collective("all-reduce", "all", _buckets(total), total)]
        if sharding == "optimizer":
            count = cluster.processes * _buckets(total // cluster.processes)
            found.append(Collective("broadcast", "all", count, total))
        return found
    others = FLOAT32 * sum(math.prod(shape) for name, shape in shapes.items() if not name.startswith("h."))
    groups, times = model.n_layer + 1, micro_batches
    among: Among = "machine" if sharding == "hybrid" else "all"
    found = [
        Collective("all-gather", among, (groups + model.n_layer) * times, (2 * total - others) * times),
        Collective("reduce-scatter", among, groups * times, total * times),
    ]
    if sharding == "hybrid" and cluster.machines > 1:
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
        overlaps=sharding in {"full", "hybrid"},
    )
