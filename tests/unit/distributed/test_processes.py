"""What is said of processes that fail; whole runs of several are in tests/distributed."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from overnight import __version__
from overnight.distributed.launcher import LOST
from overnight.distributed.processes import LINES_SHOWN, REFUSED, _tell_failure
from overnight.distributed.watchdog import FROZEN


def failed(ends: dict[int, tuple[int, float]]) -> Any:
    """What torch's agent raises: of each rank its exit status, and when that was seen."""
    failures = {
        rank: SimpleNamespace(exitcode=status, timestamp=seen, local_rank=rank)
        for rank, (status, seen) in ends.items()
    }
    return SimpleNamespace(failures=failures)


@pytest.fixture
def logs(tmp_path: Path) -> Path:
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
    ids=["one", "killed", "lost", "an error", "refused by one", "stopped", "a network"],
)
def test_the_one_that_failed_is_named_not_those_that_lost_it(
    logs: Path,
    capsys: pytest.CaptureFixture[str],
    ends: dict[int, tuple[int, float]],
    rank: int,
    how: str,
    status: int,
) -> None:
    assert _tell_failure(failed(ends), logs) == status
    assert f"overnight: rank {rank} failed ({how})" in capsys.readouterr().err


def test_the_end_of_what_it_said_last_is_shown(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _tell_failure(failed({1: (1, 7.0)}), logs)
    head, *lines = capsys.readouterr().err.splitlines()
    assert head == "overnight: rank 1 failed (exit status 1)"
    assert lines == [f"rank 1: line {number} of attempt 1" for number in range(5, LINES_SHOWN + 5)]


def test_where_all_stand_is_shown_when_one_is_frozen(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _tell_failure(failed({1: (FROZEN, 7.0)}), logs)
    said = capsys.readouterr().err
    assert said.count("line 44 of attempt 1") == 2
    assert said.splitlines()[-1] == "overnight: rank 1 failed (exit status 70)"


def test_what_the_first_refused_it_has_said_itself(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _tell_failure(failed({0: (REFUSED, 7.0), 1: (REFUSED, 7.0)}), logs) == REFUSED
    assert capsys.readouterr().err == ""


def test_without_logs_nothing_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _tell_failure(failed({1: (1, 7.0)}), tmp_path) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "word, status, heard",
    [("--version", 0, __version__), ("nonsense", REFUSED, "overnight: there is no command nonsense")],
)
def test_the_command_is_run_in_each_process_and_heard(word: str, status: int, heard: str) -> None:
    """By torch's own agent, which changes what signals do, and so in a process of its own."""
    script = "import sys; from overnight.distributed.processes import run_processes as run; sys.exit(run([sys.argv[1]], 2, 0))"
    done = subprocess.run(
        [sys.executable, "-c", script, word], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == status
    assert heard in done.stdout + done.stderr
