"""Runs a line of Python in two processes on this machine, started as torchrun starts them."""

from __future__ import annotations

import logging
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

# Each process writes its output to a file of its own: torch's agent would leave the files open that it
# redirects to.
INTO_FILE = (
    "import os, sys; log = os.open(f'{sys.argv.pop()}/{os.getpid()}', os.O_CREAT | os.O_WRONLY); "
    "os.dup2(log, 1); os.dup2(log, 2); "
)


def run_in_two(line: str, words: Sequence[str], logs: Path) -> None:
    """Run `line`, with `words` in sys.argv, in two processes that can communicate through gloo.

    Their output goes to files in the folder `logs`. Raises RuntimeError, with its last line of output, if one
    fails.
    """
    elastic = logging.getLogger("torch.distributed.elastic")
    level = elastic.level
    elastic.setLevel(logging.CRITICAL)  # the error that is raised says it all
    output = logs / "output"
    output.mkdir(parents=True)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(log_dir=str(logs)),
    )
    try:
        elastic_launch(config, sys.executable)("-P", "-c", INTO_FILE + line, *words, str(output))
    except ChildFailedError as error:
        failures = error.failures
        rank = min(failures, key=lambda each: (failures[each].exitcode < 0, failures[each].timestamp))
        last_line = _last_line(output / str(failures[rank].pid))
        raise RuntimeError(f"process {rank} of two failed: {last_line}") from None
    finally:
        elastic.setLevel(level)


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
