"""Launchers (torchrun, srun): the environment they set, and how processes report to them. Needs no torch."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from overnight.files import cache_path

DAEMON = "overnight daemon"  # name of threads that the process does not wait for
LOST = 71  # exit status of a process that ends because others have ended
HOW_TO_LAUNCH = "start with torchrun or srun, or unset it"
PARENT = "OVERNIGHT_PARENT"  # process id of the command that started this process by `start_processes`
SECONDS_TO_SAVE = 300  # for a process that was told to stop, before it is killed
USAGE_ERROR_FILE = "OVERNIGHT_USAGE_ERROR_FILE"  # names the file that a process touches to refuse its input


class PeerLostError(ConnectionError):
    """The other processes have ended, or can't be reached."""


class CollectiveValueError(ValueError):
    """An error in the user's input that every process raises; one of them prints it."""


@dataclass(frozen=True)
class LauncherEnv:
    """A process's rank and rendezvous, from the launcher's environment variables."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str | None
    """Host and port of the rendezvous; None where MASTER_ADDR and MASTER_PORT are set for torch."""


def read_launcher_env(environment: Mapping[str, str]) -> LauncherEnv | None:
    """Read what torchrun or srun has set in `environment`; None for a process started without them.

    Raises ValueError if only some of the variables are set, or one is not a number.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if all(name in environment for name in names) or _number(environment, "WORLD_SIZE", "1") > 1:
        rank, size, local_rank, local_size = (_number(environment, name) for name in names)
        if rank >= size or local_rank >= local_size:
            given = ", ".join(f"{name}={environment[name]}" for name in names)
            raise ValueError(
                f"of the environment variables {given} a rank is not below its size: {HOW_TO_LAUNCH}"
            )
        return LauncherEnv(rank, size, local_rank, local_size, None)
    size = _number(environment, "SLURM_STEP_NUM_TASKS", "1")
    if size == 1:
        return None
    tasks = _number(environment, "SLURM_STEP_TASKS_PER_NODE", str(size))
    rank, local_rank = (_number(environment, name) for name in ("SLURM_PROCID", "SLURM_LOCALID"))
    host = _first_host(environment.get("SLURM_STEP_NODELIST") or "localhost")
    port = environment.get("MASTER_PORT") or str(20_000 + _number(environment, "SLURM_JOB_ID", "0") % 20_000)
    return LauncherEnv(rank, size, local_rank, tasks, f"{environment.get('MASTER_ADDR', host)}:{port}")


def _number(environment: Mapping[str, str], name: str, default: str = "") -> int:
    """A variable's number; of Slurm's 2(x3) the first one."""
    value = environment.get(name, default)
    if (number := re.fullmatch(r"([0-9]+)(\(x[0-9]+\))?(,.*)?", value)) is None:
        state = f"{value!r}, which is not a number" if value else "not set, though others of its launcher are"
        raise ValueError(f"the environment variable {name} is {state}: {HOW_TO_LAUNCH}")
    return int(number[1])


def _first_host(nodes: str) -> str:
    """The first host of Slurm's list: node003 of node[003-007,12],other1."""
    found = re.match(r"([^,\[]+)(?:\[([0-9]+))?", nodes)
    if found is None:
        raise ValueError(f"the environment variable SLURM_STEP_NODELIST is {nodes!r}: {HOW_TO_LAUNCH}")
    return found[1] + (found[2] or "")


def check_rendezvous(environment: Mapping[str, str]) -> None:
    """Raise ValueError unless the variables are set by which torch finds the other processes."""
    if not environment.get("MASTER_ADDR"):
        raise ValueError(f"the environment variable MASTER_ADDR is not set: {HOW_TO_LAUNCH}")
    _number(environment, "MASTER_PORT")


def is_launched() -> bool:
    """True in a process that a launcher has started; False if its variables are set only in part."""
    return _launcher_env() is not None


def is_main_process() -> bool:
    """True in a single process, and in the first of several."""
    env = _launcher_env()
    return env is None or env.rank == 0


def _launcher_env() -> LauncherEnv | None:
    try:
        return read_launcher_env(os.environ)
    except ValueError:  # reported by the commands that run in several processes
        return None


def end_with_parent(parent: int, *, save: bool = False) -> None:
    """Kill this process as soon as `parent`, which started it, has ended, also if that happened already.

    With `save` it first gets SIGTERM, and the time to save.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        if save:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(SECONDS_TO_SAVE)
        os.kill(os.getpid(), signal.SIGKILL)

    daemon_thread(watch)


@contextlib.contextmanager
def named_parent() -> Iterator[None]:
    """Context manager: the processes of a launcher that start meanwhile know this process as their parent."""
    os.environ[PARENT] = str(os.getpid())
    try:
        yield
    finally:
        del os.environ[PARENT]


def terminate_with_parent() -> None:
    """In a process of a launcher: get SIGTERM as soon as the launcher has died, so that the run is saved."""
    if is_launched():
        end_with_parent(int(os.environ.get(PARENT) or os.getppid()), save=True)


def create_usage_error_file(file: Path) -> None:
    """Create the file by which child processes report that they refuse the user's input."""
    os.environ[USAGE_ERROR_FILE] = str(file)


def record_usage_error() -> bool:
    """Touch the file of `create_usage_error_file`; False if there is none.

    The process may then end with status 0, so that the launcher does not restart it.
    """
    if USAGE_ERROR_FILE in os.environ:
        Path(os.environ[USAGE_ERROR_FILE]).touch()
    return USAGE_ERROR_FILE in os.environ


def daemon_thread(work: Callable[[], object]) -> None:
    """Run `work` in a thread that the end of the process does not wait for."""
    threading.Thread(target=work, daemon=True, name=DAEMON).start()


def exit_process(status: int) -> NoReturn:
    """End this process. With several processes or a daemon thread, skip Python's finalization.

    In a few of a hundred runs torch's communication threads crashed a process during finalization, after
    its work was done, and the launcher reported a failure.
    """
    streams_are_open = all([_flush(name) for name in ("stdout", "stderr")])
    if (
        not streams_are_open
        or is_launched()
        or any(thread.name == DAEMON for thread in threading.enumerate())
    ):
        os._exit(status)
    sys.exit(status)


def _flush(name: str) -> bool:
    """False if the stream can't be written to; Python's finalization would then change the exit status."""
    try:
        if (stream := getattr(sys, name)) is not None:
            stream.flush()
    except (OSError, ValueError):
        return False
    return True


def open_missing_streams() -> None:
    """Open closed standard streams on /dev/null: the next file to be opened would take their number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", closefd=False))


def count_restarts() -> int:
    """Number of times that torchrun has restarted this process."""
    return _number(os.environ, "TORCHELASTIC_RESTART_COUNT", "0")


def use_new_rendezvous_store() -> None:
    """Let torchrun's agent in this process open a new rendezvous store for each restart.

    By default it keeps the first, in which restarted processes find the addresses of dead ones and sometimes
    use them (pytorch #135712).
    """
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")


# ---------------------------------------------------------------- this process on its machine


# glibc's tunables: one heap that only grows, in large pages.
ALLOCATOR = ":".join(
    f"glibc.malloc.{name}"
    for name in ("hugetlb=1", "mmap_max=0", "trim_threshold=100000000000", "top_pad=268435456")
)
TOPOLOGY = Path("/sys/devices/system/cpu")
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # "200000 100000": microseconds per period; or "max 100000"


def count_cores(topology: Path = TOPOLOGY, quota: Path = CPU_QUOTA) -> int | None:
    """Number of cores that this process may use; None if the system does not report it.

    By default torch starts one thread for each visible processor: two for each core of most machines, which
    share its arithmetic units, and all of the host's in a container with a lower limit.
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


def keep_compiled_code() -> None:
    """Let torch.compile keep its cache in ours, unless the user has set its folder.

    A later run with the same shapes then starts in seconds.
    """
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache_path("compiled"))


def environment_of_process(*, large_pages: bool) -> dict[str, str]:
    """The environment for a child process, with that allocator or with glibc's default."""
    inherited = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    return inherited | ({"GLIBC_TUNABLES": ALLOCATOR} if large_pages else {})


def divide_cores(processes: int) -> None:
    """Give each of `processes` child processes its share of the cores."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (count_cores() or 1) // processes)))
