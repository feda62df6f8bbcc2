"""What this process has of its machine: cores, the allocator of its memory, the cache of compiled code."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

# One heap that grows, is never given back, and lies in large pages. The names are glibc's.
ALLOCATOR = ":".join(
    f"glibc.malloc.{name}"
    for name in ("hugetlb=1", "mmap_max=0", "trim_threshold=100000000000", "top_pad=268435456")
)

TOPOLOGY = Path("/sys/devices/system/cpu")
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # "200000 100000": microseconds of each so many; or "max 100000"


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


def compute_with_threads(threads: int | None) -> None:
    """Let torch compute with so many threads at most, on the CPU."""
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


def divide_cores(processes: int) -> None:
    """Let each of so many processes that are about to be started on this machine compute with its share."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (count_cores() or 1) // processes)))
