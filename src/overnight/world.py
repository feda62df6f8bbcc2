"""Where this process stands: its rank, its device, its environment."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# One heap that grows, is never given back, and lies in large pages. The names are glibc's.
ALLOCATOR = ":".join(
    f"glibc.malloc.{name}"
    for name in ("hugetlb=1", "mmap_max=0", "trim_threshold=100000000000", "top_pad=268435456")
)

TOPOLOGY = Path("/sys/devices/system/cpu")
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # "200000 100000": microseconds of each so many; or "max 100000"


@dataclass(frozen=True)
class World:
    """One process's place: `rank` of `size`, computing on `device`."""

    rank: int
    size: int
    device: str

    @property
    def is_main(self) -> bool:
        """True for the one process that writes and prints."""
        return self.rank == 0


def open_world(device: str | None) -> World:
    """This process's place, on `device` ("cpu", "cuda", "cuda:1", "mps"), or the best one found for None.

    torch is told to compute with as many threads as there are cores, unless OMP_NUM_THREADS says otherwise.
    Raises ValueError for a device this machine lacks, and under a launcher that starts several processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("a run is trained by one process: start it without torchrun")
    chosen = _check_device(device) if device else _best_device()
    if "OMP_NUM_THREADS" not in os.environ:
        _compute_with_threads(count_cores())
    return World(rank=0, size=1, device=chosen)


def count_cores(topology: Path = TOPOLOGY, quota: Path = CPU_QUOTA) -> int | None:
    """How many cores this process may keep busy: torch's threads, one each. None where nobody says.

    torch takes as many threads as there are processors to be seen: two on each core of most machines,
    where they share its arithmetic, and all of the host's in a container that may use a few.
    """
    if not hasattr(os, "sched_getaffinity"):
        return None
    processors = os.sched_getaffinity(0)
    siblings = [
        topology / f"cpu{processor}" / "topology" / "thread_siblings_list" for processor in processors
    ]
    cores = len({path.read_text() if path.is_file() else path for path in siblings})
    share, _, period = quota.read_text().partition(" ") if quota.is_file() else ("max", "", "")
    return cores if share == "max" else max(1, min(cores, round(int(share) / int(period))))


def _compute_with_threads(threads: int | None) -> None:
    import torch

    if threads is not None and threads < torch.get_num_threads():
        torch.set_num_threads(threads)


def restart_with_large_pages(arguments: Sequence[str]) -> None:
    """Start this command anew, in this process, with an allocator fit for training; does so once.

    By default glibc returns each large tensor's memory to the kernel when it is freed, and the next step
    faults every page in again. The setting is read when a process starts, so it takes a new start. It
    changes no result. Nothing is done without glibc, or where GLIBC_TUNABLES is set already. -P keeps
    `-m` from looking for modules in the current folder, where a random.py may lie.
    """
    if platform.libc_ver()[0] == "glibc" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = ALLOCATOR
        os.execv(sys.executable, [sys.executable, "-P", "-m", "overnight", *arguments])


def keep_compiled_code(folder: Path) -> None:
    """Let torch.compile keep what it compiles in `folder`, not where every restart of the machine wipes it.

    A later run with the same shapes then starts in seconds. A folder that the user has set stays.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


def environment_of_process(*, large_pages: bool) -> dict[str, str]:
    """This process's environment for one to be started, with that allocator or with glibc's own way."""
    inherited = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    return inherited | ({"GLIBC_TUNABLES": ALLOCATOR} if large_pages else {})


def _best_device() -> str:
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _check_device(device: str) -> str:
    import torch

    kind, _, index = device.partition(":")
    if not re.fullmatch(r"cpu|cuda(:[0-9]+)?|mps", device):
        raise ValueError(f"device={device} is not known; there is cpu, cuda, cuda:1 and so on, mps")
    missing = {"cuda": not torch.cuda.is_available(), "mps": not torch.backends.mps.is_available()}
    if missing.get(kind, False):
        raise ValueError(f"device={device}: this machine has none; choose --device {_best_device()}")
    if kind == "cuda" and index and int(index) >= torch.cuda.device_count():
        raise ValueError(f"device={device}: this machine has cuda:0 to cuda:{torch.cuda.device_count() - 1}")
    return device
