"""Where a launcher has put a process among others: what torchrun and Slurm say in its environment."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """What a launcher says of a process."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str | None
    """Where the processes meet; None where the launcher's environment says so in torch's own words."""


def find_place(environment: Mapping[str, str]) -> Place | None:
    """What torchrun, or srun, says in `environment`; None of a process that was started by itself."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    missing = [name for name in names if name not in environment]
    if not missing:
        rank, size, local_rank, local_size = (int(environment[name]) for name in names)
        return Place(rank, size, local_rank, local_size, None)
    if int(environment.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"WORLD_SIZE is set and {missing[0]} is not: start with torchrun, or unset it")
    size = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if size == 1:
        return None
    tasks = re.match(r"[0-9]+", environment.get("SLURM_STEP_TASKS_PER_NODE", str(size)))
    assert tasks is not None
    host = _first_host(environment.get("SLURM_STEP_NODELIST", "localhost"))
    port = environment.get("MASTER_PORT") or str(20_000 + int(environment.get("SLURM_JOB_ID", "0")) % 20_000)
    rank, local_rank = int(environment["SLURM_PROCID"]), int(environment["SLURM_LOCALID"])
    return Place(rank, size, local_rank, int(tasks[0]), f"{environment.get('MASTER_ADDR', host)}:{port}")


def _first_host(nodes: str) -> str:
    """node003 of node[003-007,12],other1 : the first of Slurm's list."""
    found = re.match(r"([^,\[]+)(?:\[([0-9]+))?", nodes)
    assert found is not None, nodes
    return found[1] + (found[2] or "")
