"""Processes that die, freeze or get a signal: the run ends for all, and its resumption is the same run."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from overnight.recipe import load_recipe
from overnight.run_directory import RunDirectory

CLOCK = {"milliseconds", "tokens_per_second", "mfu"}  # the only values that a repetition may change
FROZEN = 70
distributed = pytest.mark.distributed  # not in a plain run
linux = pytest.mark.skipif(not Path("/proc/self/environ").is_file(), reason="needs Linux's /proc")

# A sitecustomize.py: rank 1 sleeps when it writes its share of a checkpoint.
SITE = """
import os, sys, time

def watch(event, arguments):
    if event == "open" and "building-step-00000010" in str(arguments[0]):
        time.sleep(600)

if os.environ.get("RANK") == "1":
    sys.addaudithook(watch)
"""


def record(directory: RunDirectory) -> dict[str, Any]:
    """Everything that a run wrote, except the clock."""
    newest = max(directory.checkpoints.glob("step-*"))
    files = {path.name: path.read_bytes() for path in newest.iterdir()}
    lines = [{name: line[name] for name in line if name not in CLOCK} for line in directory.read_metrics()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return {"step": newest.name, "files": files, "metrics": lines} | {
        kind: directory.read_events(kind) for kind in ("evaluations", "samples")
    }


@pytest.fixture
def whole(trained: Callable[..., Any]) -> dict[str, Any]:
    """The record of the run in two processes that nobody disturbed."""
    return record(trained(2, at_once=None).directory)


def test_record_sees_another_run(trained: Callable[..., Any], whole: dict[str, Any]) -> None:
    """Negative control: one process rounds otherwise."""
    assert record(trained(1, at_once=None).directory) != whole


# Teams


@pytest.mark.parametrize("ending, status", [("killed", -9), ("broken", "RuntimeError")])
def test_run_ends_when_a_process_is_lost(
    team: Any, recipe: Any, tmp_path: Path, ending: str, status: Any
) -> None:
    found = team.outcomes("train_until", recipe(), tmp_path / "run", 7, 1, ending, size=2)
    assert status in found[1]
    assert found[0][0] == "PeerLostError"
    assert "rank 0" in found[0][1]
    assert len(RunDirectory(tmp_path / "run").read_metrics()) == 7
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000005"]


@pytest.mark.parametrize("rank", [pytest.param(0, marks=distributed), 1])
def test_signal_to_one_process_saves_all(
    whole: dict[str, Any], team: Any, recipe: Any, tmp_path: Path, rank: int
) -> None:
    found = team.outcomes("train_until", recipe(), tmp_path / "run", 7, rank, "signalled", size=2)
    assert [how for how, _ in found] == ["KeyboardInterrupt"] * 2
    directory = RunDirectory(tmp_path / "run")
    assert max(directory.checkpoints.iterdir()).name == "step-00000008"
    team("command", tmp_path, ["train", "--resume", "run"], size=2)
    assert record(directory) == whole


def test_run_restarted_by_torchrun_resumes(whole: dict[str, Any], team: Any, folder: Path) -> None:
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
    assert record(directory) == whole


@pytest.mark.parametrize(
    "ending, status", [("frozen", FROZEN), pytest.param("frozen in C", 1, marks=distributed)]
)
def test_frozen_process_ends_the_run_with_all_stacks(
    team: Any, recipe: Any, tmp_path: Path, ending: str, status: int
) -> None:
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
def started(folder: Path, *words: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """`overnight train` with these words, in a process group of its own."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "overnight", "train", *words],
        cwd=folder,
        env=os.environ | environment,
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


def ended(process: subprocess.Popen[str], seconds: float = 250) -> tuple[int, str]:
    """The exit status and standard error."""
    message = process.communicate(timeout=seconds)[1]
    return process.returncode, message


def finish(folder: Path, *words: str) -> dict[str, Any]:
    """The record of the run after its resumption."""
    with started(folder, "--resume", "runs/small", *words) as process:
        status, said = ended(process)
    assert status == 0, said
    return record(RunDirectory(folder / "runs/small"))


def process_of(rank: int, parent: int) -> int:
    """The id of the process of `rank` that `parent` started."""
    return next(
        int(status.parent.name)
        for status in Path("/proc").glob("[0-9]*/stat")
        if is_child(status, parent) and f"RANK={rank}".encode() in environment_of(status.parent)
    )


def is_child(status: Path, parent: int) -> bool:
    with contextlib.suppress(OSError):
        return status.read_text().rpartition(")")[2].split()[1] == str(parent)
    return False


def environment_of(process: Path) -> list[bytes]:
    with contextlib.suppress(OSError):
        return (process / "environ").read_bytes().split(b"\0")
    return []


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def wait_for(condition: Callable[[], bool], seconds: float = 250) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "the condition was never met"
        time.sleep(0.002)


def reach(folder: Path, process: subprocess.Popen[str], lines: int) -> None:
    """Return after `lines` steps."""
    metrics = folder / "runs/small/metrics.jsonl"
    wait_for(lambda: process.poll() is not None or count_lines(metrics) >= lines)
    assert process.poll() is None, ended(process)


@linux
@distributed
@pytest.mark.parametrize("seed", range(5))
def test_killed_process_is_restarted(folder: Path, whole: dict[str, Any], seed: int) -> None:
    draw = random.Random(seed)
    rank, lines = draw.randrange(2), draw.randrange(1, 16)
    with started(folder, "small.toml", "--processes", "2", "--max-restarts", "1") as process:
        reach(folder, process, lines)
        os.kill(process_of(rank, process.pid), signal.SIGKILL)
        status, message = ended(process)
    assert status == 0, message
    assert record(RunDirectory(folder / "runs/small")) == whole


@linux
@distributed
@pytest.mark.parametrize("rank", [0, 1])
def test_killed_process_without_restarts_is_named(folder: Path, whole: dict[str, Any], rank: int) -> None:
    with started(folder, "small.toml", "--processes", "2") as process:
        reach(folder, process, 7)
        os.kill(process_of(rank, process.pid), signal.SIGKILL)
        status, message = ended(process)
    assert status == 1
    assert f"rank {rank} failed (signal 9)" in message
    assert "--resume runs/small" in message
    assert "Traceback" not in message
    assert finish(folder) == whole


@linux
@distributed
@pytest.mark.parametrize("whom", ["rank 0", "rank 1", "the command", "the terminal"])
def test_signal_to_anyone_saves_all(folder: Path, whole: dict[str, Any], whom: str) -> None:
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
    assert finish(folder) == whole


@linux
@distributed
@pytest.mark.parametrize("is_stopped", [False, True], ids=["asleep", "SIGSTOP"])
def test_frozen_process_ends_the_command(folder: Path, whole: dict[str, Any], is_stopped: bool) -> None:
    """A process that the system has stopped can't print its stack; the others do."""
    (folder / "site").mkdir()
    (folder / "site/sitecustomize.py").write_text("" if is_stopped else SITE)
    words = ("small.toml", "--processes", "2", "--timeout-seconds", "4")
    with started(folder, *words, PYTHONPATH=python_path(folder / "site")) as process:
        reach(folder, process, 7)
        if is_stopped:
            os.kill(process_of(1, process.pid), signal.SIGSTOP)
        status, message = ended(process)
    assert status == FROZEN
    assert "rank 0 made no progress for 4 s" in message
    if not is_stopped:
        assert "rank 1 made no progress for 4 s" in message
        assert "in all_gather_object" in message, "where rank 0 waits"
        assert "in watch" in message, "where rank 1 sleeps"
    assert finish(folder) == whole


def python_path(folder: Path) -> str:
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


@distributed
def test_command_prints_a_refusal_once(folder: Path) -> None:
    with started(folder, "small.toml", "--processes", "3") as process:
        status, message = ended(process)
    assert status == 2
    assert message.count("3 processes") == 1
    assert message.count("\n") == 1, message
    assert not (folder / "runs").exists()
