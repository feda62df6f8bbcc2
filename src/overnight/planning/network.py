"""The cost of collectives: a model of what a training step communicates, and how long that takes.

Every collective is assumed to use the ring algorithm (Patarasuk and Yuan 2009, "Bandwidth Optimal All-reduce
Algorithms for Clusters of Workstations"). With n processes, an all-reduce of S bytes makes each process send
2 (n-1)/n S bytes; an all-gather or a reduce-scatter sends half of that, and a broadcast S. The time is the
launch of the collective, the latency of a message round the ring, the bytes over the bandwidth of the slowest
link, and the copies into and out of buffers at the bandwidth of device memory.

`benchmarks/communication.py` compares this with processes on one machine. Not modelled: stragglers, shared
networks, and reductions in trees or switches (NVLink SHARP makes an all-reduce of 8 H100 a quarter faster).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from overnight.distributed.world import BUCKET_BYTES
from overnight.hardware import GB
from overnight.model.gpt import parameter_shapes
from overnight.model.model_config import ModelConfig
from overnight.training import Sharding

FLOAT32 = 4
MICROSECOND = 1e-6


@dataclass(frozen=True, kw_only=True)
class Link:
    """A connection that carries messages from one process to the next."""

    name: str
    bytes_per_second: float
    """In one direction, as collectives achieve it: the "bus bandwidth" of nccl-tests. Within a machine,
    that of each process; between machines, that of a machine, shared by its processes."""
    message_seconds: float
    """Latency of a small message."""
    start_seconds: float
    """Launch of any collective, before its first message."""
    source: str
    """Origin of the figures."""


def _nccl_link(name: str, gigabytes_per_second: float, message_microseconds: float, source: str) -> Link:
    """A link with the latencies in NCCL's src/graph/tuning.cc (ring, protocol Simple)."""
    return Link(
        name=name,
        bytes_per_second=gigabytes_per_second * GB,
        message_seconds=message_microseconds * MICROSECOND,
        start_seconds=8.4 * MICROSECOND,
        source=source,
    )


NVLINK, PCI, NETWORK = 3.4, 5.7, 14.0  # microseconds a message, by the same file

PCIE = _nccl_link("PCIe", 12, PCI, "12 GB/s by NCCL's src/graph/topo.h for PCIe 3; 4 has up to twice that")
_NVLINK_3 = _nccl_link("NVLink 3", 230, NVLINK, "300 GB/s by the maker; 230, nccl-tests issue 149")
_NVLINK_4 = _nccl_link("NVLink 4", 370, NVLINK, "450 GB/s by the maker; 370 in NCCL, nccl-tests issue 212")
_NVLINK_2 = _nccl_link("NVLink 2", 120, NVLINK, "150 GB/s by the maker; 120 by NCCL's topo.h")
WITHIN: dict[str, Link] = {
    "b200": _nccl_link("NVLink 5", 720, NVLINK, "900 GB/s by the maker; 720 by NCCL's src/graph/topo.h"),
    "h200": _NVLINK_4,
    "h100": _NVLINK_4,
    "a100-80gb": _NVLINK_3,
    "a100-40gb": _NVLINK_3,
    "v100-32gb": _NVLINK_2,
    "v100-16gb": _NVLINK_2,
}
"""Between the GPUs of a machine with an NVLink board, by name in the table of devices; others use PCIe.

The makers' figures are half of those in NVIDIA's data sheets, which add both directions. The achieved figures
are from answers of NCCL's authors in the issues of nccl-tests."""

BETWEEN: dict[str, Link] = {
    "100g": _nccl_link("100 Gb/s", 12, NETWORK, "12 GB/s an adapter of 100 Gb/s, nccl-tests issue 119"),
    "400g": _nccl_link("400 Gb/s", 47, NETWORK, "46 to 48 GB/s an adapter of 400 Gb/s, nccl-tests issue 290"),
    "8x400g": _nccl_link("8 x 400 Gb/s", 376, NETWORK, "46 to 48 GB/s an adapter, nccl-tests issue 290"),
}
"""Between machines: one adapter for all GPUs of a machine or, as in a DGX H100, one for each GPU.

InfiniBand, or Ethernet with RDMA (RoCE); plain TCP is slower."""


def find_link_within(device_name: str) -> Link:
    """The link between GPUs of one machine, by their name in the table of devices."""
    return WITHIN.get(device_name, PCIE)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Processes with a device each, and the links between them."""

    machines: int
    processes_per_machine: int
    within: Link
    between: Link | None = None
    """None for a single machine."""
    memory_bytes_per_second: float | None = None
    """Bandwidth of each process's device memory; copies are not counted if None."""

    @property
    def processes(self) -> int:
        """On all machines together."""
        return self.machines * self.processes_per_machine

    def group_size(self, among: Among) -> int:
        """Number of processes that take part in one collective."""
        return {"machine": self.processes_per_machine, "machines": self.machines}.get(among, self.processes)


Kind = Literal["all-reduce", "all-gather", "reduce-scatter", "broadcast"]
Among = Literal["all", "machine", "machines"]
"""All processes; those of each machine; those with the same local rank on all machines."""


class Collective(NamedTuple):
    """Consecutive collectives of one kind."""

    kind: Kind
    among: Among
    calls: int
    bytes: int
    """Total of all calls: the full size of what is gathered or reduced, not one process's part."""


def list_collectives(
    model: ModelConfig, sharding: Sharding, cluster: Cluster, micro_batches: int
) -> list[Collective]:
    """The collectives of one step with `micro_batches` in each process; [] for a single process.

    none, zero1: one all-reduce of all gradients, in buckets (`World.all_reduce`); with zero1, the owner of
    each parameter broadcasts it. fsdp: for each micro-batch, a block's weights are gathered twice, the
    weights outside of blocks once (FSDP2 keeps them from the forward to the backward pass), and gradients are
    reduce-scattered block by block. hsdp: the same within machines, then one all-reduce between them.
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
    outside = FLOAT32 * sum(math.prod(shape) for name, shape in shapes.items() if not name.startswith("h."))
    units = model.n_layer + 1
    among: Among = "machine" if sharding == "hsdp" else "all"
    found = [
        Collective(
            "all-gather",
            among,
            (units + model.n_layer) * micro_batches,
            (2 * total - outside) * micro_batches,
        ),
        Collective("reduce-scatter", among, units * micro_batches, total * micro_batches),
    ]
    if sharding == "hsdp" and cluster.machines > 1:
        found.append(Collective("all-reduce", "machines", units, total // cluster.processes_per_machine))
    return [each for each in found if cluster.group_size(each.among) > 1]


def _buckets(count: int) -> int:
    return math.ceil(count / BUCKET_BYTES)


def sent_bytes(collective: Collective, cluster: Cluster) -> float:
    """Bytes that one process sends in all calls together."""
    n = cluster.group_size(collective.among)
    share = {"all-reduce": 2 * (n - 1) / n, "broadcast": 1.0}.get(collective.kind, (n - 1) / n)
    return share * collective.bytes


def collective_seconds(collective: Collective, cluster: Cluster) -> float:
    """Duration of all calls, one after the other."""
    rounds = 2 if collective.kind == "all-reduce" else 1
    hops = rounds * (cluster.group_size(collective.among) - 1)
    hops_between = rounds * (cluster.machines - 1) if collective.among != "machine" else 0
    latency = cluster.within.start_seconds + (hops - hops_between) * cluster.within.message_seconds
    bandwidth = cluster.within.bytes_per_second if collective.among != "machines" else math.inf
    if cluster.between and hops_between:
        latency += hops_between * cluster.between.message_seconds
        # One ring over all processes crosses each network link once; rings of equal local ranks share it.
        sharers = cluster.processes_per_machine if collective.among == "machines" else 1
        bandwidth = min(bandwidth, cluster.between.bytes_per_second / sharers)
    seconds = collective.calls * latency + sent_bytes(collective, cluster) / bandwidth
    # Buffers are copied in and out, each copy a read and a write; where a part is small, one way only.
    copied = (4 if collective.kind in {"all-reduce", "broadcast"} else 2) * collective.bytes
    return seconds + copied / (cluster.memory_bytes_per_second or math.inf)


@dataclass(frozen=True, kw_only=True)
class StepPrediction:
    """The predicted time of one step in each process."""

    compute_seconds: float
    communication_seconds: float
    communication_bytes: float
    """Sent by one process."""
    overlaps: bool
    """Whether communication may overlap with computation."""

    @property
    def seconds_range(self) -> tuple[float, float]:
        """(best, worst): full overlap, and none."""
        both = self.compute_seconds + self.communication_seconds
        return (max(self.compute_seconds, self.communication_seconds) if self.overlaps else both), both

    @property
    def efficiency_range(self) -> tuple[float, float]:
        """(worst, best) share of the step that is computation."""
        best, worst = self.seconds_range
        return self.compute_seconds / worst, self.compute_seconds / best


def predict_step(
    model: ModelConfig, sharding: Sharding, cluster: Cluster, micro_batches: int, compute_seconds: float
) -> StepPrediction:
    """A step that computes for `compute_seconds` in each process, over `micro_batches`.

    The all-reduce of replicated training and the broadcasts of ZeRO-1 follow the computation and do not
    overlap. FSDP2 prefetches the next block's weights and reduces the last block's gradients while a block
    computes; how much of that overlaps lies between nothing and everything.
    """
    collectives = list_collectives(model, sharding, cluster, micro_batches)
    return StepPrediction(
        compute_seconds=compute_seconds,
        communication_seconds=sum(collective_seconds(each, cluster) for each in collectives),
        communication_bytes=sum(sent_bytes(each, cluster) for each in collectives),
        overlaps=sharding in {"fsdp", "hsdp"},
    )
