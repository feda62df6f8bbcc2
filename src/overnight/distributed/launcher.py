"""What a launcher (torchrun, srun) says of this process, and what this process tells the launcher. Needs no torch."""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

LEFT_BEHIND = "left behind"  # the name of such threads


LOST = 71  # the exit status of a process that ends because others have


REFUSALS = "OVERNIGHT_REFUSALS_FILE"


class PeerLostError(ConnectionError):
    """The other processes have ended, or can't be reached."""


class CollectiveValueError(ValueError):
    """What every process refuses, with the same words: one speaks for all."""


@dataclass(frozen=True)
class LauncherEnv:
    """What a launcher says of a process."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str | None
    """Where the processes meet; None where the launcher's environment says so in torch's own words."""


def read_launcher_env(environment: Mapping[str, str]) -> LauncherEnv | None:
    """What torchrun, or srun, says in `environment`; None of a process that was started by itself."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    missing = [name for name in names if name not in environment]
    if not missing:
        rank, size, local_rank, local_size = (int(environment[name]) for name in names)
        return LauncherEnv(rank, size, local_rank, local_size, None)
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
    return LauncherEnv(
        rank, size, local_rank, int(tasks[0]), f"{environment.get('MASTER_ADDR', host)}:{port}"
    )


def _first_host(nodes: str) -> str:
    """node003 of node[003-007,12],other1 : the first of Slurm's list."""
    found = re.match(r"([^,\[]+)(?:\[([0-9]+))?", nodes)
    assert found is not None, nodes
    return found[1] + (found[2] or "")


def is_launched() -> bool:
    """True in a process that a launcher has started beside others."""
    return read_launcher_env(os.environ) is not None


def is_main_process() -> bool:
    """True in a process by itself, and in the first of several."""
    place = read_launcher_env(os.environ)
    return place is None or place.rank == 0


def create_usage_error_file(file: Path) -> None:
    """Let processes that this one is about to start say in `file` that they refuse what a user wrote."""
    os.environ[REFUSALS] = str(file)


def record_usage_error() -> bool:
    """Say so, if somebody wants to know: then it is no failure, after which all would be begun anew."""
    if REFUSALS in os.environ:
        Path(os.environ[REFUSALS]).touch()
    return REFUSALS in os.environ


def daemon_thread(work: Callable[[], object]) -> None:
    """Let a thread do it, for which the end of the process does not wait."""
    threading.Thread(target=work, daemon=True, name=LEFT_BEHIND).start()


def exit_process(status: int) -> NoReturn:
    """End this process. One of several ends without Python's tidying up: what was to be written is.

    Once in some dozens of runs the threads of torch's communication brought a process down that had done all
    its work, while Python was taking itself apart; a launcher takes that for a failure. So ends, too, a
    process that leaves a thread in the middle of its work.
    """
    if is_launched() or any(thread.name == LEFT_BEHIND for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def count_restarts() -> int:
    """How often torchrun has begun this process anew."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def use_new_rendezvous_store() -> None:
    """Let torchrun's agent, if this process becomes one, open another store for each attempt.

    By itself it keeps the first, where processes that are begun anew find the addresses of dead ones and now
    and then believe them (pytorch's issue 135712).
    """
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
