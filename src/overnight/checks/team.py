"""Two processes on this machine that run one line of Python each, started as torchrun starts them."""

from __future__ import annotations

import logging
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

# Each keeps what it says in a file of its own: torch's agent would leave the files open that it redirects to.
INTO_FILE = (
    "import os, sys; log = os.open(f'{sys.argv.pop()}/{os.getpid()}', os.O_CREAT | os.O_WRONLY); "
    "os.dup2(log, 1); os.dup2(log, 2); "
)


def run_in_two(line: str, words: Sequence[str], logs: Path) -> None:
    """Run `line`, with `words` in sys.argv, in two processes that may meet through gloo.

    Raises RuntimeError, with the last thing it said, if one fails. Nothing of what they say is shown; it is
    written into the folder `logs`.
    """
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    elastic = logging.getLogger("torch.distributed.elastic")
    level = elastic.level
    elastic.setLevel(logging.CRITICAL)  # what is raised says it all
    said = logs / "said"
    said.mkdir(parents=True)
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
        elastic_launch(config, sys.executable)("-P", "-c", INTO_FILE + line, *words, str(said))
    except ChildFailedError as error:
        failures = error.failures
        rank = min(failures, key=lambda each: (failures[each].exitcode < 0, failures[each].timestamp))
        words_of_it = _last_words(said / str(failures[rank].pid))
        raise RuntimeError(f"process {rank} of two failed: {words_of_it}") from None
    finally:
        elastic.setLevel(level)


def _last_words(path: Path) -> str:
    said = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []
    return next((line.strip() for line in reversed(said) if line.strip()), "it said nothing")
