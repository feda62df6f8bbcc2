"""Processes that die, freeze or get a signal end the run for all, and its resumption is the same run."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from overnight.recipe import load_recipe
from overnight.run_directory import RunDirectory

FROZEN = 70
distributed = pytest.mark.distributed  # not in a plain run
linux = pytest.mark.skipif(not Path("/proc/self/environ").is_file(), reason="needs Linux's /proc")


@pytest.fixture
def whole(trained):
    """The record of the run in two processes that nobody disturbed."""
    return trained(2, at_once=None).record()


def test_record_sees_another_run(trained, whole):
    """Negative control: one process rounds otherwise."""
    assert trained(1, at_once=None).record() != whole


# Teams


@pytest.mark.parametrize(
    "rank, ending, status",
    [(1, "killed", -9), pytest.param(0, "killed", -9, marks=distributed), (1, "broken", "RuntimeError")],
)
def test_run_ends_when_a_process_is_lost(team, recipe, tmp_path, rank, ending, status):
    found = team.outcomes("train_until", recipe(), tmp_path / "run", 7, rank, ending, size=2)
    assert status in found[rank]
    assert found[1 - rank][0] == "PeerLostError"
    assert f"rank {1 - rank}" in found[1 - rank][1]
    assert len(RunDirectory(tmp_path / "run").read_metrics()) == 7
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000005"]


def test_signal_to_one_process_saves_all(whole, team, recipe, record, tmp_path):
    found = team.outcomes("train_until", recipe(), tmp_path / "run", 7, 1, "signalled", size=2)
    assert [how for how, _ in found] == ["KeyboardInterrupt"] * 2
    assert max((tmp_path / "run/checkpoints").iterdir()).name == "step-00000008"
    team("command", tmp_path, ["train", "--resume", "run"], size=2)
    assert record(tmp_path / "run") == whole


def test_run_restarted_by_torchrun_resumes(whole, team, record, folder):
    """TORCHELASTIC_RESTART_COUNT tells a restart from a second start, which is refused."""
    directory = RunDirectory(folder / "runs/small")
    recipe = load_recipe(str(folder / "small.toml"))
    team.outcomes("train_until", recipe, directory.path, 7, 1, "killed", size=2)
    assert len(directory.read_metrics()) == 7
    words = ["train", "small.toml"]
    (status, message), _ = team("command", folder, words, size=2)
    assert status == 2
    assert "runs/small" in message
    environment = {"TORCHELASTIC_RESTART_COUNT": "1"}
    found = team("command", folder, words, size=2, environment=environment)
    assert [status for status, _ in found] == [0, 0]
    assert record(directory.path) == whole


@pytest.mark.parametrize(
    "ending, status", [("frozen", FROZEN), pytest.param("frozen in C", 1, marks=distributed)]
)
def test_frozen_process_ends_the_run_with_all_stacks(team, recipe, tmp_path, ending, status):
    given = (recipe(timeout_seconds=4), tmp_path / "run", 7, 1, ending)
    members = team.start("train_until", *given, size=2)
    assert members[1].outcome() == ("ended", status)
    assert members[0].outcome() == ("ended", FROZEN)
    assert len(RunDirectory(tmp_path / "run").read_metrics()) == 7
    waiting, frozen = (member.log.read_text() for member in members)
    assert "rank 0 " in waiting
    assert "--timeout-seconds" in waiting
    assert "in all_reduce" in waiting
    assert ("in sleep_in_python" if ending == "frozen" else "in sleep_in_c") in frozen


# The command


@contextlib.contextmanager
def started(folder: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    """`overnight train` with these words, in a process group of its own."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "overnight", "train", *words],
        cwd=folder,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """The exit status and standard error."""
    message = process.communicate(timeout=250)[1]
    return process.returncode, message


@pytest.fixture
def finish(folder, record):
    """Resumes the run; returns its record."""

    def resume() -> dict[str, Any]:
        with started(folder, "--resume", "runs/small") as process:
            status, message = ended(process)
        assert status == 0, message
        return record(folder / "runs/small")

    return resume


def process_of(rank: int, parent: int) -> int:
    """The id of the process of `rank` that `parent` started."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            is_child = (process / "stat").read_text().rpartition(")")[2].split()[1] == str(parent)
            if is_child and f"RANK={rank}".encode() in (process / "environ").read_bytes().split(b"\0"):
                return int(process.name)
    raise AssertionError(f"{parent} has no process of rank {rank}")


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def reach(folder: Path, process: subprocess.Popen[str], lines: int) -> None:
    """Return after `lines` steps."""
    until = time.monotonic() + 250
    while count_lines(folder / "runs/small/metrics.jsonl") < lines:
        assert process.poll() is None, ended(process)
        assert time.monotonic() < until, "the steps were never done"
        time.sleep(0.002)


@linux
@distributed
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("restarts", [1, 0])
def test_killed_process_is_restarted_or_named(folder, whole, record, finish, rank, restarts):
    words = ("small.toml", "--processes", "2", "--max-restarts", str(restarts))
    with started(folder, *words) as process:
        reach(folder, process, 7)
        os.kill(process_of(rank, process.pid), signal.SIGKILL)
        status, message = ended(process)
    assert "Traceback" not in message
    if restarts:
        assert status == 0, message
        assert record(folder / "runs/small") == whole
    else:
        assert status == 1
        assert f"rank {rank} failed (signal 9)" in message
        has_checkpoint = any((folder / "runs/small/checkpoints").glob("step-*"))  # it is written meanwhile
        assert ("--resume runs/small" in message) == has_checkpoint
        assert finish() == whole


@linux
@distributed
@pytest.mark.parametrize("whom", ["rank 0", "rank 1", "the command", "the terminal"])
def test_signal_to_anyone_saves_all(folder, whole, finish, whom):
    with started(folder, "small.toml", "--processes", "2") as process:
        reach(folder, process, 7)
        if whom.startswith("rank"):
            os.kill(process_of(int(whom[-1]), process.pid), signal.SIGTERM)
        elif whom == "the command":
            process.terminate()
        else:
            os.killpg(process.pid, signal.SIGINT)
        status, message = ended(process)
    assert status == 130, message
    assert "Traceback" not in message
    assert "--resume runs/small" in message
    saved = max((folder / "runs/small/checkpoints").glob("step-*"))
    assert int(saved.name[5:]) == count_lines(folder / "runs/small/metrics.jsonl") < 20
    assert finish() == whole


@linux
@distributed
def test_stopped_process_ends_the_command(folder, whole, finish):
    """A process that the system has stopped can't print its stack; the others do."""
    with started(folder, "small.toml", "--processes", "2", "--timeout-seconds", "4") as process:
        reach(folder, process, 7)
        os.kill(process_of(1, process.pid), signal.SIGSTOP)
        status, message = ended(process)
    assert status == FROZEN
    assert "rank 0 made no progress for 4 s" in message
    assert finish() == whole


@distributed
def test_command_prints_a_refusal_once(folder):
    with started(folder, "small.toml", "--processes", "3") as process:
        status, message = ended(process)
    assert status == 2
    assert message.count("3 processes") == 1
    assert message.count("\n") == 1, message
    assert not (folder / "runs").exists()
