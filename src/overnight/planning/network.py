"""The processes of a run and the links between them, with achieved rates and their sources."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from overnight.hardware import GB, Device
from overnight.model.model_config import ModelConfig
from overnight.recipe import Resolved
from overnight.training import Compute, Sharding
from overnight.training.memory import (
    MemoryEstimate,
    Resources,
    estimate_memory,
    try_shardings,
)


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

    def estimate_memory(self, model: ModelConfig, rows: int, compute: Compute) -> MemoryEstimate:
        """Memory of one process."""
        return estimate_memory(model, rows, compute, self.processes, self.processes_per_machine)

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
    per_machine = resources.processes_per_machine
    machines = resources.processes // per_machine
    if device is None:
        return ParallelLayout(machines=machines, processes_per_machine=per_machine, sharding=sharding)
    return ParallelLayout(
        machines=machines,
        processes_per_machine=per_machine,
        within=WITHIN.get(device.name, PCIE),
        between=BETWEEN[network] if machines > 1 else None,
        memory_bytes_per_second=device.bytes_per_second,
        sharding=sharding,
    )


def compare_shardings(resolved: Resolved, resources: Resources) -> dict[Sharding, int]:
    """Memory of one process with each sharding that was considered, the chosen one last; {} for one process.

    Only one was considered if the recipe sets it.
    """
    _, memory_bytes, *processes = resources
    model, rows, compute = resolved.model, resolved.plan.micro_batch_size, resolved.compute
    if resources.processes == 1:
        return {}
    if resolved.recipe.compute.sharding is not None:
        return {compute.sharding: estimate_memory(model, rows, compute, *processes).together}
    return try_shardings(model, rows, compute, memory_bytes, *processes)
