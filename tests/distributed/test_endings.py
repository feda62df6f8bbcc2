"""Processes that die, freeze or get a signal end the run for all, and its resumption is the same run."""

from __future__ import annotations

import os
import signal
from pathlib import Path

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
    small = recipe(async_checkpoint=False)  # or the checkpoint may be unfinished
    found = team.outcomes("train_until", small, tmp_path / "run", 7, rank, ending, size=2)
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


@pytest.fixture
def teams(programs):
    """benchmarks/teams.py, which starts the command and finds its processes."""
    return programs["teams"]


@pytest.fixture
def train(teams, folder):
    """`with train(*words) as process`: `overnight train` with these words."""
    return lambda *words: teams.started(folder, [*teams.overnight(), "train", *words])


@pytest.fixture
def after_steps(teams, train, folder):
    """`after_steps(act, *words)`: `act(process)` when 7 steps are done; exit status and output."""

    def after_steps(act, *words):
        with train("small.toml", "--processes", "2", *words) as process:
            teams.wait_until(process, lambda: teams.count_lines(folder / "runs/small") >= 7)
            act(process)
            return teams.wait_for(process)[:2]

    return after_steps


@pytest.fixture
def finish(teams, train, folder, record):
    """Resumes the run; returns its record."""

    def resume():
        with train("--resume", "runs/small") as process:
            status, message, _ = teams.wait_for(process)
        assert status == 0, message
        return record(folder / "runs/small")

    return resume


@linux
@distributed
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("restarts", [1, 0])
def test_killed_process_is_restarted_or_named(
    teams, after_steps, folder, whole, record, finish, rank, restarts
):
    def kill(process):
        os.kill(teams.ranks_of(process.pid)[rank], signal.SIGKILL)

    status, message = after_steps(kill, "--max-restarts", str(restarts))
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
def test_signal_to_anyone_saves_all(teams, after_steps, folder, whole, finish, whom):
    def send(process):
        if whom.startswith("rank"):
            os.kill(teams.ranks_of(process.pid)[int(whom[-1])], signal.SIGTERM)
        elif whom == "the command":
            process.terminate()
        else:
            os.killpg(process.pid, signal.SIGINT)

    status, message = after_steps(send)
    assert status == 130, message
    assert "Traceback" not in message
    assert "--resume runs/small" in message
    saved = max((folder / "runs/small/checkpoints").glob("step-*"))
    assert int(saved.name[5:]) == teams.count_lines(folder / "runs/small") < 20
    assert finish() == whole


@linux
@distributed
def test_stopped_process_ends_the_command(teams, after_steps, whole, finish):
    """A process that the system has stopped can't print its stack; the others do."""

    def stop(process):
        os.kill(teams.ranks_of(process.pid)[1], signal.SIGSTOP)

    status, message = after_steps(stop, "--timeout-seconds", "4")
    assert status == FROZEN
    assert "rank 0 made no progress for 4 s" in message
    assert finish() == whole


@distributed
def test_command_prints_a_refusal_once(teams, train, folder):
    with train("small.toml", "--processes", "3") as process:
        status, message, _ = teams.wait_for(process)
    assert status == 2
    assert message.count("3 processes") == 1
    assert message.count("\n") == 1, message
    assert not (folder / "runs").exists()
