"""Processes that die, freeze or are told to stop: the run ends for all, and goes on as if undisturbed."""

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

from overnight.config import to_toml
from overnight.recipe import load_recipe
from overnight.run_directory import RunDirectory

CLOCK = {"milliseconds", "tokens_per_second", "mfu"}  # the only values that a repetition may change
FROZEN = 70
distributed = pytest.mark.distributed  # not in a plain run

# Found by every Python of a run: lets one process sleep when it writes its share of a checkpoint.
SITE = """
import os, sys, time

def watch(event, arguments):
    if event == "open" and "building-step-00000010" in str(arguments[0]):
        time.sleep(600)

if os.environ.get("RANK") == "1":
    sys.addaudithook(watch)
"""


def record(directory: RunDirectory) -> dict[str, Any]:
    """Everything that a run wrote, but for the clock."""
    newest = max(directory.checkpoints.glob("step-*"))
    files = {path.name: path.read_bytes() for path in newest.iterdir()}
    lines = [{name: line[name] for name in line if name not in CLOCK} for line in directory.read_metrics()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return {"step": newest.name, "files": files, "metrics": lines} | {
        kind: directory.read_events(kind) for kind in ("evaluations", "samples")
    }


@pytest.fixture
def folder(recipe: Any, tmp_path: Path) -> Path:
    """Where the command is typed: small.toml lies there."""
    (tmp_path / "small.toml").write_text(to_toml(recipe()))
    return tmp_path


# ---------------------------------------------------------------- processes of a team


@pytest.mark.parametrize("ending, status", [("killed", -9), ("broken", "RuntimeError")])
def test_a_run_one_of_whose_processes_is_lost_ends_within_seconds(
    team: Any, recipe: Any, tmp_path: Path, ending: str, status: Any
) -> None:
    members = team.start("train_until", recipe(), tmp_path / "run", 7, 1, ending, size=2)
    wait_for(lambda: count_lines(tmp_path / "run/metrics.jsonl") == 7)
    ended_at = time.monotonic()
    found = [member.outcome() for member in members]
    assert time.monotonic() - ended_at < 10
    assert status in found[1]
    assert found[0][0] == "LostOthersError"
    assert found[0][1].startswith("rank 0 has lost the others (")
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000005"]


@pytest.mark.parametrize("rank", [pytest.param(0, marks=distributed), 1])
def test_one_process_is_told_to_stop_and_all_save(
    trained: Callable[..., Any], team: Any, recipe: Any, tmp_path: Path, rank: int
) -> None:
    found = team.outcomes("train_until", recipe(), tmp_path / "run", 7, rank, "told to stop", size=2)
    assert [how for how, _ in found] == ["KeyboardInterrupt"] * 2
    directory = RunDirectory(tmp_path / "run")
    assert max(directory.checkpoints.iterdir()).name == "step-00000008"
    team("go_on", directory.path, None, {}, size=2)
    assert record(directory) == record(trained(2).directory)


def test_a_run_that_torchrun_begins_anew_goes_on_by_itself(
    trained: Callable[..., Any], team: Any, folder: Path
) -> None:
    """The first time, and again where nothing was begun yet, it is a new run."""
    environment = {"TORCHELASTIC_RESTART_COUNT": "1"}
    directory = RunDirectory(folder / "runs/small")
    team.outcomes(
        "train_until", load_recipe(str(folder / "small.toml")), directory.path, 7, 1, "killed", size=2
    )
    assert len(directory.read_metrics()) == 7
    words = ["train", "small.toml"]
    (status, said), _ = team("command", folder, words, size=2)
    assert status == 2, "the same command by itself does not"
    assert "already holds a run" in said
    found = team("command", folder, words, size=2, environment=environment)
    assert [status for status, _ in found] == [0, 0]
    assert record(directory) == record(trained(2).directory)


@pytest.mark.parametrize(
    "ending, status", [("frozen", FROZEN), pytest.param("frozen in C", 1, marks=distributed)]
)
def test_a_frozen_process_ends_the_run_with_the_stacks_of_all(
    team: Any, recipe: Any, tmp_path: Path, ending: str, status: int
) -> None:
    settings = recipe(timeout_seconds=4)
    members = team.start("train_until", settings, tmp_path / "run", 7, 1, ending, size=2)
    metrics = RunDirectory(tmp_path / "run").metrics
    wait_for(lambda: count_lines(metrics) == 7)
    started_at = time.monotonic()
    assert members[1].outcome() == ("ended", status)
    assert members[0].outcome() == ("ended", FROZEN)
    assert 2 < time.monotonic() - started_at < 4 + 5 + 6
    waiting, frozen = (member.log.read_text() for member in members)
    assert "overnight: rank 0 made no progress for 4 s (--timeout-seconds)" in waiting
    assert "in all_reduce" in waiting
    assert ("in sleep_in_python" if ending == "frozen" else "in sleep_in_c") in frozen


# ---------------------------------------------------------------- the command


@contextlib.contextmanager
def started(folder: Path, *words: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """`overnight train` with these words, in a process group of its own, as a terminal starts it."""
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


def ended(process: subprocess.Popen[str], seconds: float = 60) -> tuple[int, str]:
    """The exit status, and all that was said."""
    said = process.communicate(timeout=seconds)[1]
    return process.returncode, said


def finish(folder: Path, *words: str) -> dict[str, Any]:
    """The record of the run once it has gone on to its end."""
    with started(folder, "--resume", "runs/small", *words) as process:
        status, said = ended(process)
    assert status == 0, said
    return record(RunDirectory(folder / "runs/small"))


def process_of(rank: int, parent: int) -> int:
    """The id of the process of that rank which `parent` has started."""
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


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come to that"
        time.sleep(0.002)


def reach(folder: Path, process: subprocess.Popen[str], lines: int) -> None:
    """Return when so many steps are done."""
    metrics = folder / "runs/small/metrics.jsonl"
    wait_for(lambda: process.poll() is not None or count_lines(metrics) >= lines)
    assert process.poll() is None, ended(process)


linux = pytest.mark.skipif(not Path("/proc/self/environ").is_file(), reason="needs Linux's /proc")


@linux
@distributed
@pytest.mark.parametrize("seed", range(5))
def test_a_killed_process_is_begun_anew_and_the_run_ends_by_itself(
    folder: Path, trained: Callable[..., Any], seed: int
) -> None:
    draw = random.Random(seed)
    rank, lines = draw.randrange(2), draw.randrange(1, 16)
    with started(folder, "small.toml", "--processes", "2", "--max-restarts", "1") as process:
        reach(folder, process, lines)
        os.kill(process_of(rank, process.pid), signal.SIGKILL)
        status, said = ended(process)
    assert status == 0, said
    assert record(RunDirectory(folder / "runs/small")) == record(trained(2).directory)


@linux
@distributed
@pytest.mark.parametrize("rank", [0, 1])
def test_without_restarts_the_command_ends_and_names_who_died(
    folder: Path, trained: Callable[..., Any], rank: int
) -> None:
    with started(folder, "small.toml", "--processes", "2") as process:
        reach(folder, process, 7)
        os.kill(process_of(rank, process.pid), signal.SIGKILL)
        killed_at = time.monotonic()
        status, said = ended(process)
        assert time.monotonic() - killed_at < 10
    assert status == 1
    assert f"overnight: rank {rank} failed (signal 9)" in said
    assert "next: overnight train --resume runs/small" in said
    assert "Traceback" not in said
    assert finish(folder) == record(trained(2).directory)


@linux
@distributed
@pytest.mark.parametrize("whom", ["rank 0", "rank 1", "the command", "the terminal"])
def test_whoever_is_told_to_stop_all_save(folder: Path, trained: Callable[..., Any], whom: str) -> None:
    with started(folder, "small.toml", "--processes", "2") as process:
        reach(folder, process, 7)
        if whom.startswith("rank"):
            os.kill(process_of(int(whom[-1]), process.pid), signal.SIGTERM)
        elif whom == "the command":
            process.terminate()
        else:
            os.killpg(process.pid, signal.SIGINT)
        status, said = ended(process)
    assert status == 130, said
    assert "Traceback" not in said
    saved = max((folder / "runs/small/checkpoints").glob("step-*"))
    assert int(saved.name[5:]) == count_lines(folder / "runs/small/metrics.jsonl") < 20
    assert "overnight train --resume runs/small" in said
    assert finish(folder) == record(trained(2).directory)


@distributed
def test_the_command_shows_the_stacks_of_all_when_one_freezes(
    folder: Path, trained: Callable[..., Any]
) -> None:
    (folder / "site").mkdir()
    (folder / "site/sitecustomize.py").write_text(SITE)
    words = ("small.toml", "--processes", "2", "--timeout-seconds", "4")
    with started(folder, *words, PYTHONPATH=str(folder / "site")) as process:
        reach(folder, process, 10)
        frozen_at = time.monotonic()
        status, said = ended(process)
        assert time.monotonic() - frozen_at < 15
    assert status == FROZEN
    for rank in (0, 1):
        assert f"rank {rank} made no progress for 4 s (--timeout-seconds)" in said
    assert "in gather" in said, "where rank 0 waits"
    assert "in watch" in said, "where rank 1 sleeps"
    assert finish(folder) == record(trained(2).directory)


@linux
@distributed
def test_a_process_that_the_system_has_stopped_is_not_waited_for(
    folder: Path, trained: Callable[..., Any]
) -> None:
    """It can't say where it stands; the others do."""
    with started(folder, "small.toml", "--processes", "2", "--timeout-seconds", "4") as process:
        reach(folder, process, 7)
        os.kill(process_of(1, process.pid), signal.SIGSTOP)
        status, said = ended(process)
    assert status == FROZEN
    assert "rank 0 made no progress for 4 s" in said
    assert finish(folder) == record(trained(2).directory)


@distributed
def test_a_refusal_is_said_once(folder: Path) -> None:
    with started(folder, "small.toml", "--processes", "3") as process:
        status, said = ended(process)
    assert status == 2
    assert said.count("can't be divided among 3 processes") == 1
    assert said.count("\n") == 1, said
    assert not (folder / "runs").exists()


def test_the_record_sees_another_run(trained: Callable[..., Any]) -> None:
    """The negative control: one process rounds otherwise."""
    assert record(trained(2).directory) != record(trained(1).directory)
