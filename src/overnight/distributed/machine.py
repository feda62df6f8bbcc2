"""This process on its machine: cores, memory allocator, cache of compiled code. Needs no torch at import."""

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
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # "200000 100000": microseconds per period; or "max 100000"


def count_cores(topology: Path = TOPOLOGY, quota: Path = CPU_QUOTA) -> int | None:
    """Number of cores that this process may use; None where the system does not say.

    By default torch starts one thread for each visible processor: two for each core of most machines, which
    share its arithmetic units, and all of the host's in a container that may use a few.
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


def restart_with_large_pages(arguments: Sequence[str]) -> None:
    """Execute this command again, in this process, with an allocator configured for training; once.

    By default glibc returns the memory of each large tensor to the kernel when it is freed, and the next step
    faults every page in again. glibc reads the setting when a process starts. It changes no result. Does
    nothing without glibc, or if GLIBC_TUNABLES is set. -P keeps `-m` from importing modules of the current
    folder.
    """
    if platform.libc_ver()[0] == "glibc" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = ALLOCATOR
        os.execv(sys.executable, [sys.executable, "-P", "-m", "overnight", *arguments])


def keep_compiled_code(folder: Path) -> None:
    """Let torch.compile keep its cache in `folder` instead of the temporary folder, unless the user set one.

    A later run with the same shapes then starts in seconds.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


def environment_of_process(*, large_pages: bool) -> dict[str, str]:
    """The environment for a child process, with that allocator or with glibc's default."""
    inherited = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    return inherited | ({"GLIBC_TUNABLES": ALLOCATOR} if large_pages else {})


def divide_cores(processes: int) -> None:
    """Give each of `processes` child processes its share of the cores."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (count_cores() or 1) // processes)))
