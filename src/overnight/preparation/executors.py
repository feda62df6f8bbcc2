"""Who does the work: this process, processes of this machine, a Ray cluster, or an array of Slurm jobs.

A step of the work is a function (place, rank, ranks): it does every `ranks`-th item from `rank` on, leaves
out what is done already, and the folder `place` is all that the ranks share. datatrove, FineWeb's own
engine, runs steps on many machines, and marks what is complete; one process needs none of it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overnight.data.text_files import first_line
from overnight.distributed.machine import count_cores
from overnight.preparation.prepare_config import PrepareConfig

if TYPE_CHECKING:
    from datatrove.executor.base import PipelineExecutor

Step = Callable[[Path, int, int], object]
Watch = Callable[[], None]

THREADS_OF_PROCESS = 4  # with more, what Python does between the tokenizer's calls is in their way
JOBS = 10  # of Slurm or Ray, unless the user says otherwise
POLL_SECONDS = 0.3


def run_step(step: Step, place: Path, ranks: int, config: PrepareConfig, watch: Watch | None = None) -> None:
    """Do one step here or on a Ray cluster, in `ranks` pieces, and return when it is done.

    `watch` is called now and then meanwhile. Raises ValueError if a piece is refused or a worker dies.
    """
    with _watched(watch):
        if config.executor == "ray":
            _run_on_ray(step, place, ranks, config)
        elif count_prepare_processes(config, ranks) == 1:
            for rank in range(ranks):
                step(place, rank, ranks)
        else:
            _run_in_processes(step, place, ranks, count_prepare_processes(config, ranks))


def count_workers(config: PrepareConfig) -> int:
    """How many work at once: as many as there are cores for this process, unless the user says otherwise."""
    return config.workers or count_cores() or 1


def count_prepare_processes(config: PrepareConfig, ranks: int) -> int:
    """How many processes that is on this machine: up to four workers are threads of one.

    Tokenizers let other threads work, and a process takes a second to start.
    """
    return min(ranks, -(-count_workers(config) // THREADS_OF_PROCESS))


def count_threads(config: PrepareConfig, ranks: int) -> int:
    """How many threads each process has; one where the work is on other machines."""
    if config.executor != "local":
        return 1
    return max(1, count_workers(config) // count_prepare_processes(config, ranks))


def _run_in_processes(step: Step, place: Path, ranks: int, workers: int) -> None:
    """Datatrove's local run, but in a pool that notices when a worker is killed: its own waits for ever."""
    datatrove = _import_datatrove()
    executor = datatrove.executor.local.LocalPipelineExecutor(
        [_as_pipeline_step(step, place)], tasks=ranks, workers=workers, logging_dir=_logs(step, place, ranks)
    )
    waiting = executor.get_incomplete_ranks()
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_begin_work) as pool:
        try:
            for _ in pool.map(partial(_run_rank, executor), waiting):
                pass
        except BrokenProcessPool:
            raise ChildProcessError(
                "a worker was killed, most likely because memory ran out: give fewer --workers, and run the "
                "same command again; what is done is kept"
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _run_rank(executor: PipelineExecutor, rank: int) -> None:
    executor._run_for_rank(rank, local_rank=1)  # which is one that does not log to the terminal


def _begin_work() -> None:
    """In a new worker: its errors come back to the parent, which tells them once; it ends with the parent."""
    sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115 - for as long as the process lives
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Whatever ended it; or a worker would write beside the next command, and wait for its next piece."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run_on_ray(step: Step, place: Path, ranks: int, config: PrepareConfig) -> None:
    datatrove = _import_datatrove()
    try:
        import ray
    except ImportError:
        raise ValueError("executor=ray needs Ray: pip install 'overnight[ray]'") from None
    tasks = min(ranks, config.tasks or JOBS)
    executor = datatrove.executor.ray.RayPipelineExecutor(
        [_as_pipeline_step(step, place.resolve())],
        tasks=tasks,
        workers=config.workers or -1,
        logging_dir=_logs(step, place.resolve(), tasks),
        mem_per_cpu_gb=1,
    )
    begun = not ray.is_initialized()
    if begun:
        try:
            ray.init(log_to_driver=False, include_dashboard=False, configure_logging=False)
        except Exception as error:  # of many kinds, and none of them the user's words
            raise ValueError(f"Ray could not be started: {first_line(error)}") from None
    try:
        executor.run()
    finally:
        if begun:
            ray.shutdown()
    if left := executor.get_incomplete_ranks():
        raise ChildProcessError(
            f"{len(left)} of {tasks} tasks failed; {_logs(step, place, tasks)}/logs tells why, and the same "
            "command again goes on from what is done"
        )


def submit_to_slurm(steps: list[tuple[Step, int]], place: Path, config: PrepareConfig) -> str:
    """Hand a chain of steps, each with its number of ranks, to sbatch; the number of the last job."""
    datatrove = _import_datatrove()
    before = None
    for step, ranks in steps:
        before = datatrove.executor.slurm.SlurmPipelineExecutor(
            [_as_pipeline_step(step, place.resolve())],
            tasks=ranks,
            workers=config.workers or -1,
            time=config.slurm_time,
            partition=config.slurm_partition,
            job_name=f"overnight-{_name(step).replace('_', '-')}",
            qos="",
            logging_dir=_logs(step, place.resolve(), ranks),
            venv_path=_activation(),
            depends=before,
            mem_per_cpu_gb=2,
        )
    assert before is not None
    try:
        before.launch_job()
    except FileNotFoundError:
        raise ValueError("executor=slurm needs sbatch, which is not on this machine") from None
    except subprocess.CalledProcessError as error:
        raise ValueError(
            f"sbatch refused the jobs (exit status {error.returncode}), and what it said stands above: "
            "slurm_partition and slurm_time must be ones that this cluster has"
        ) from None
    return str(before.job_id)


def is_at_work(job: str) -> bool:
    """True while Slurm has that job, waiting or running. False where it can't be asked."""
    try:
        listed = subprocess.run(["squeue", "--noheader", "--jobs", job], capture_output=True, check=False)
    except FileNotFoundError:
        return False
    return listed.returncode == 0 and bool(listed.stdout.strip())


def _activation() -> str | None:
    """The script that makes a job use this very environment; None for the system's Python."""
    script = Path(sys.prefix) / "bin" / "activate"
    return str(script) if script.is_file() else None


def _logs(step: Step, place: Path, ranks: int) -> str:
    """Where a step's logs and completion marks lie; another division of the work has its own."""
    return str(place / "logs" / f"{_name(step)}-{ranks}")


def _name(step: Step) -> str:
    """What the function is called, also with some of its arguments given."""
    function = step.func if isinstance(step, partial) else step
    return str(function.__name__)


def _as_pipeline_step(step: Step, place: Path) -> Any:
    from overnight.preparation.datatrove_steps import WorkStep

    return WorkStep(step, place)


def _import_datatrove() -> Any:
    try:
        import datatrove.executor.local
        import datatrove.executor.ray
        import datatrove.executor.slurm
    except ImportError:
        raise ValueError(
            "several workers need datatrove, which is not installed: pip install 'overnight[data]', or give "
            "--workers 1"
        ) from None
    from loguru import logger

    logger.disable("datatrove")  # in this process; what the workers do lies in the folder's logs
    return datatrove


@contextmanager
def _watched(watch: Watch | None) -> Iterator[None]:
    """Call `watch` a few times a second, and once at the end."""
    if watch is None:
        yield
        return
    over = threading.Event()

    def poll() -> None:
        while not over.wait(POLL_SECONDS):
            watch()

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        watch()
