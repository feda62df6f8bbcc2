"""What is printed of processes that fail; whole runs of several are in tests/distributed."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs

from overnight import __version__
from overnight.distributed import processes
from overnight.distributed.launcher import LOST, PARENT
from overnight.distributed.processes import LINES_SHOWN, REFUSED, _print_failure, start_processes
from overnight.distributed.watchdog import FROZEN


def failed(ends: dict[int, tuple[int, float]]) -> Any:
    """What torch's agent raises: the exit status of each rank, and when it was seen."""
    failures = {
        rank: SimpleNamespace(exitcode=status, timestamp=seen, local_rank=rank)
        for rank, (status, seen) in ends.items()
    }
    return SimpleNamespace(failures=failures)


@pytest.fixture
def logs(tmp_path):
    """Two attempts of three processes, the first of which has the terminal."""
    for attempt in (0, 1):
        for rank in (1, 2):
            folder = tmp_path / f"run/attempt_{attempt}/{rank}"
            folder.mkdir(parents=True)
            lines = [f"line {number} of attempt {attempt}" for number in range(LINES_SHOWN + 5)]
            (folder / "stderr.log").write_text("\n".join(lines) + "\n")
    return tmp_path


@pytest.mark.parametrize(
    "ends, rank, how, status",
    [
        ({0: (1, 7.0)}, 0, "exit status 1", 1),
        ({2: (-signal.SIGKILL, 7.0)}, 2, "signal 9", 1),
        ({0: (LOST, 7.0), 1: (-signal.SIGKILL, 7.0)}, 1, "signal 9", 1),
        ({0: (LOST, 6.0), 1: (1, 7.0), 2: (LOST, 7.0)}, 1, "exit status 1", 1),
        ({0: (-signal.SIGTERM, 7.0), 2: (REFUSED, 7.0)}, 2, "exit status 2", REFUSED),
        ({1: (-signal.SIGKILL, 40.0), 2: (FROZEN, 7.0)}, 2, "exit status 70", FROZEN),
        ({0: (LOST, 7.0), 1: (LOST, 7.0)}, 0, "exit status 71", 1),
    ],
    ids=["one", "killed", "lost", "error", "refused by one", "stopped", "network"],
)
def test_cause_is_named_and_not_who_lost_it(logs, capsys, ends, rank, how, status):
    assert _print_failure(failed(ends), logs) == status
    assert f"rank {rank} failed ({how})" in capsys.readouterr().err


def test_end_of_the_last_log_is_printed(logs, capsys):
    _print_failure(failed({1: (1, 7.0)}), logs)
    _, *lines = capsys.readouterr().err.splitlines()
    assert lines == [f"rank 1: line {number} of attempt 1" for number in range(5, LINES_SHOWN + 5)]


def test_what_is_printed_depends_on_the_failure(logs, tmp_path, capsys):
    """All logs if a process is frozen, none if the main process has printed its refusal, one line without."""
    _print_failure(failed({1: (FROZEN, 7.0)}), logs)
    assert capsys.readouterr().err.count("line 44 of attempt 1") == 2
    assert _print_failure(failed({0: (REFUSED, 7.0), 1: (REFUSED, 7.0)}), logs) == REFUSED
    assert capsys.readouterr().err == ""
    assert _print_failure(failed({1: (1, 7.0)}), tmp_path / "none") == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "word, status, output", [("--version", 0, __version__), ("nonsense", REFUSED, "nonsense")]
)
def test_command_runs_in_each_process(word, status, output):
    """In a process of its own: torch's agent changes signal handlers."""
    script = (
        "import sys; from overnight.distributed.processes import run_processes\n"
        "sys.exit(run_processes([sys.argv[1]], 2, 0))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, word], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == status
    assert output in done.stdout + done.stderr


def test_torch_s_own_lines_are_not_printed(monkeypatch, caplog):
    """Ctrl-C makes its agent log a line of its own, through a logger with a level of its own."""
    agent = logging.getLogger("torch.distributed.elastic.agent.server.api")
    monkeypatch.setattr(processes, "elastic_launch", lambda *_: lambda *_: agent.warning("death signal"))
    start_processes((), 2, DefaultLogsSpecs())
    assert not caplog.records
    agent.warning("the negative control")
    assert len(caplog.records) == 1
    assert PARENT not in os.environ, "later processes have another parent"
