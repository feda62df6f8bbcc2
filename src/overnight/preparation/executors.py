"""Runs the steps: in this process, several processes, a Ray cluster, or arrays of Slurm jobs.

A step is a function (staging, rank, ranks): it does every `ranks`-th item from `rank` on, leaves out what is
done already, and shares nothing with the other ranks but the staging folder. On several machines datatrove,
FineWeb's engine, runs the steps and marks complete ranks. On this machine a process pool does: datatrove's
own waits forever for a worker that was killed, and its workers outlive the process that started them.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

from overnight.data.text_files import first_line
from overnight.distributed.launcher import count_cores, end_with_parent
from overnight.files import write_atomically
from overnight.preparation.prepare_config import PrepareConfig
from overnight.preparation.prepare_state import SLURM_JOB
from overnight.terminal import echo

Step = Callable[[Path, int, int], object]

THREADS_PER_PROCESS = 4  # with more, Python's work between the calls of the tokenizer is the bottleneck
DEFAULT_JOBS = 10  # of Slurm or Ray


def run_step(step: Step, staging: Path, items: int, config: PrepareConfig) -> None:
    """Do one step here or on a Ray cluster, divided into up to `items` ranks; returns when it is done.

    Raises ValueError for invalid data, ChildProcessError if a worker dies.
    """
    processes, _ = divide_workers(config, items)
    if config.executor == "ray":
        _run_on_ray(step, staging, min(items, config.tasks or DEFAULT_JOBS), config)
    elif processes == 1:
        step(staging, 0, 1)
    else:
        _run_in_processes(step, staging, items, processes)


def divide_workers(config: PrepareConfig, items: int) -> tuple[int, int]:
    """(processes, threads of each) on this machine: one worker per core, unless the user says otherwise.

    Up to four workers are threads of one process, since the tokenizers release the GIL and a process takes a
    second to start. On other machines each process has one thread.
    """
    workers = config.workers or count_cores() or 1
    processes = min(items, -(-workers // THREADS_PER_PROCESS))
    return processes, max(1, workers // processes) if config.executor == "local" else 1


def _run_in_processes(step: Step, staging: Path, ranks: int, processes: int) -> None:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=_begin_worker) as pool:
        try:
            for _ in pool.map(partial(step, staging), range(ranks), [ranks] * ranks):
                pass
        except BrokenProcessPool:
            raise ChildProcessError(
                "a worker was killed, most likely because memory ran out: give fewer --workers, and run the "
                "same command again; completed work is kept"
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _begin_worker() -> None:
    """Set up a worker process: the parent reports its errors, and it ends when the parent ends."""
    sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115 - open as long as the process lives
    if (parent := multiprocessing.parent_process()) is not None and parent.pid is not None:
        end_with_parent(parent.pid)  # it must not write while the next command continues


def _run_on_ray(step: Step, staging: Path, tasks: int, config: PrepareConfig) -> None:
    engine = _import_datatrove("ray")
    try:
        import ray
    except ImportError:
        raise ValueError("executor=ray needs Ray: pip install 'overnight[ray]'") from None
    pipeline = _pipeline(step, staging, tasks, config)
    executor = engine.RayPipelineExecutor(**pipeline, mem_per_cpu_gb=1)
    if starts_ray := not ray.is_initialized():
        try:
            ray.init(log_to_driver=False, include_dashboard=False, configure_logging=False)
        except Exception as error:  # of many classes, none of which a user can act on
            raise ValueError(f"Ray could not be started: {first_line(error)}") from None
    try:
        executor.run()
    finally:
        if starts_ray:
            ray.shutdown()
    if failed := executor.get_incomplete_ranks():
        raise ChildProcessError(
            f"{len(failed)} of {tasks} tasks failed: see {pipeline['logging_dir']}/logs, and run the "
            "same command again; completed work is kept"
        )


def submit_to_slurm(steps: list[tuple[Step, int]], staging: Path, config: PrepareConfig) -> None:
    """Submit a chain of steps, each with the number of its ranks, and record the number of the last job."""
    engine = _import_datatrove("slurm")
    executor: Any = None
    activate = Path(sys.prefix) / "bin" / "activate"  # so that the jobs use this environment
    for step, ranks in steps:
        executor = engine.SlurmPipelineExecutor(
            **_pipeline(step, staging, ranks, config),
            time=config.slurm_time,
            partition=config.slurm_partition,
            job_name=f"overnight-{_name(step).replace('_', '-')}",
            qos="",
            venv_path=str(activate) if activate.is_file() else None,
            depends=executor,
            mem_per_cpu_gb=2,
        )
    try:
        executor.launch_job()
    except FileNotFoundError:
        raise ValueError("executor=slurm needs sbatch, which is not on this machine") from None
    except subprocess.CalledProcessError as error:
        raise ValueError(
            f"sbatch refused the jobs (exit status {error.returncode}; its message is above): give a "
            "slurm_partition and slurm_time that this cluster has"
        ) from None
    if staging.is_dir():  # the jobs may be done by now
        write_atomically(staging / SLURM_JOB, f"{executor.job_id}\n")
    echo(
        f"submitted to Slurm as {len(steps)} job arrays; once job {executor.job_id} is done, "
        "run the same command again"
    )


def is_with_slurm(staging: Path) -> bool:
    """True, with a message, while Slurm has the job that was submitted; False if Slurm can't be asked."""
    if not (staging / SLURM_JOB).is_file():
        return False
    job = (staging / SLURM_JOB).read_text(encoding="utf-8").strip()
    try:
        listed = subprocess.run(["squeue", "--noheader", "--jobs", job], capture_output=True, check=False)
    except FileNotFoundError:
        return False
    if listed.returncode != 0 or not listed.stdout.strip():
        return False
    echo(f"Slurm is already working on it: see squeue --jobs {job}, or cancel the job to start again")
    return True


def _pipeline(step: Step, staging: Path, ranks: int, config: PrepareConfig) -> dict[str, Any]:
    """The options of a datatrove executor that runs a step, whatever the cluster.

    Its logs, and its marks of complete ranks, which depend on their number, are in the staging folder.
    """
    return {
        "pipeline": [partial(_run_rank, step, staging.resolve())],
        "tasks": ranks,
        "workers": config.workers or -1,
        "logging_dir": str(staging.resolve() / "logs" / f"{_name(step)}-{ranks}"),
    }


def _run_rank(step: Step, staging: Path, _documents: object, rank: int, ranks: int) -> None:
    """Run a step as a step of a datatrove pipeline, without documents as input or output."""
    step(staging, rank, ranks)


def _name(step: Step) -> str:
    """The name of the function, also if it is a functools.partial."""
    return str((step.func if isinstance(step, partial) else step).__name__)


def _import_datatrove(executor: str) -> Any:
    """Datatrove's module of an executor, whose messages are kept off the terminal of this process.

    Raises ValueError if datatrove is not installed.
    """
    try:
        module = importlib.import_module(f"datatrove.executor.{executor}")
    except ImportError:
        raise ValueError(
            f"executor={executor} needs datatrove, which is not installed: pip install 'overnight[data]'"
        ) from None
    from loguru import logger

    logger.disable("datatrove")
    return module
