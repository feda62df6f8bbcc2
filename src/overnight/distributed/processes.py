"""Several processes of one command on this machine, started by torchrun's agent."""

from __future__ import annotations

import logging
import signal
import sys
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from overnight.distributed.launcher import LOST, SECONDS_TO_SAVE, create_usage_error_file, named_parent
from overnight.distributed.watchdog import FROZEN
from overnight.terminal import echo

REFUSED = 2  # the exit status of wrong use
LINES_SHOWN = 40


def run_processes(words: Sequence[str], count: int, max_restarts: int) -> int:
    """Run `overnight` with `words` in `count` processes; returns 0 or the status of the first that failed.

    The main process has the terminal. The output of the others is kept, and its end printed if they fail.
    When one dies, all are restarted, up to `max_restarts` times.
    """
    with tempfile.TemporaryDirectory(prefix="overnight-") as logs:
        redirected = {rank: Std.ALL for rank in range(1, count)}
        usage_error = Path(logs) / "refused"
        create_usage_error_file(usage_error)
        try:
            specs = DefaultLogsSpecs(log_dir=logs, redirects=redirected)
            start_processes(("-m", "overnight", *words), count, specs, max_restarts)
        except ChildFailedError as error:
            return _print_failure(error, Path(logs))
        except SignalException:
            raise KeyboardInterrupt from None
        return REFUSED if usage_error.exists() else 0


def start_processes(words: Sequence[str], count: int, logs: DefaultLogsSpecs, max_restarts: int = 0) -> None:
    """Run this Python with these words in `count` processes that can communicate, and wait for them.

    Raises ChildFailedError if one fails; the caller prints it.
    """
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=max_restarts,
        logs_specs=logs,
        shutdown_timeout=SECONDS_TO_SAVE,
    )
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # torch's own lines, whose loggers have a level each
    try:
        with named_parent():
            elastic_launch(config, sys.executable)("-P", *words)
    finally:
        logging.disable(before)


def _print_failure(error: Any, logs: Path) -> int:
    """Print which process failed first, and the end of its output; returns its exit status.

    The main process has already printed its own usage error.
    """
    rank = first_failed_rank(error.failures)
    failure = error.failures[rank]
    if failure.exitcode == REFUSED and rank == 0:
        return REFUSED
    if failure.exitcode == FROZEN:
        _show_logs(logs, "*")  # the stacks of all
    how = f"signal {-failure.exitcode}" if failure.exitcode < 0 else f"exit status {failure.exitcode}"
    echo(f"overnight: rank {rank} failed ({how})")
    if failure.exitcode != FROZEN:
        _show_logs(logs, str(failure.local_rank))
    return failure.exitcode if failure.exitcode > 0 and failure.exitcode != LOST else 1


def first_failed_rank(failures: Mapping[int, Any]) -> int:
    """The rank that failed first; a process that only lost another one comes last."""

    def order(rank: int) -> tuple[bool, float, int]:
        failure = failures[rank]
        return failure.exitcode in {LOST, -signal.SIGTERM}, failure.timestamp, rank

    return min(failures, key=order)


def _show_logs(logs: Path, local_rank: str) -> None:
    """Print the end of the output of a process of the last attempt."""
    attempts = sorted(logs.rglob("attempt_*"))
    for path in sorted(attempts[-1].glob(f"{local_rank}/stderr.log")) if attempts else ():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[-LINES_SHOWN:]
        echo("\n".join(f"rank {path.parent.name}: {line}" for line in lines))
