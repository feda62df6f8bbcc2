"""The batch script, run with programs that stand for Slurm's."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from overnight.jobs.targets import JobRequest, job_file
from overnight.preparation.prepare_commands import JobText

Build = Callable[..., JobRequest]

# Runs the command once for each node, as a process of its own, which scancel then knows.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for node in $(seq 0 $((SLURM_NNODES - 1))); do
  SLURM_NODEID=$node "$@" & echo $! >> "$STAND_INS/tasks"
done
for task in $(jobs -p); do wait "$task" || status=$?; done
exit "${status:-0}"
"""
SCANCEL = """#!/bin/bash
[ "$*" = "--signal=TERM $SLURM_JOB_ID" ] && kill -TERM $(cat "$STAND_INS/tasks")
"""
SCONTROL = """#!/bin/bash
case "$*" in
  "show hostnames node[1-2]") printf 'localhost\\nlocalhost\\n' ;;
  "requeue $SLURM_JOB_ID") echo "$SLURM_JOB_ID" >> "$STAND_INS/requeued" ;;
  *) exit 1 ;;
esac
"""


@pytest.fixture
def slurm(machines: Any) -> Any:
    machines.prepare_text()
    for name, script in (("srun", SRUN), ("scancel", SCANCEL), ("scontrol", SCONTROL)):
        machines.add(name, script)
    return machines


@pytest.fixture
def job_id(free_port: int) -> int:
    """A job whose port is free here."""
    return free_port - 20_000


@pytest.fixture
def submit(slurm: Any, request_job: Build, job_id: int) -> Callable[..., subprocess.Popen[str]]:
    """submit(variables, without=pattern, **values): the process of such a job's script, on two nodes."""

    def start(
        variables: dict[str, str] | None = None, without: str = "$^", **values: Any
    ) -> subprocess.Popen[str]:
        path = slurm.work / "mine.sbatch"
        job = job_file("slurm", request_job(nodes=2, **values))
        path.write_text(re.sub(without, "", job, flags=re.MULTILINE))
        for kind in ("calls", "saved", "tasks"):
            (slurm.notes / kind).unlink(missing_ok=True)
        allocation = {"SLURM_JOB_ID": str(job_id), "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2"}
        process: subprocess.Popen[str] = slurm.start("bash", str(path), **allocation, **variables or {})
        return process

    return start


def test_two_nodes_meet_save_at_the_time_limit_and_resume(slurm: Any, submit: Any, job_id: int) -> None:
    """All real except Slurm: two agents of torchrun, their rendezvous, a sum over both processes."""
    slurm.use_real_torchrun()
    variables = {"TOGETHER": "yes", "OMP_NUM_THREADS": "1"}
    process = submit(variables, gpus_per_node=1)
    slurm.wait_for_calls(2, process)
    calls = sorted(slurm.noted("calls"), key=lambda call: str(call["RANK"]))
    ranks = [(call["RANK"], call["WORLD_SIZE"], call["LOCAL_RANK"]) for call in calls]
    assert ranks == [("0", "2", "0"), ("1", "2", "0")]
    assert [call["sum_of_ranks"] for call in calls] == [1.0, 1.0]
    assert slurm.calls() == 2 * [["train", "long"]]
    os.kill(process.pid, signal.SIGUSR1)  # to the batch script only, as in B:USR1
    assert slurm.wait(process) != [0]
    assert sorted(slurm.noted("saved")) == [0, 1], slurm.output
    assert slurm.noted("requeued") == [job_id]

    assert slurm.wait(submit(variables, gpus_per_node=1)) == [0], slurm.output
    assert slurm.calls() == 2 * [["train", "--resume", "runs/mine"]]
    assert slurm.noted("requeued") == [job_id], "a finished run is not requeued"


def test_nothing_is_saved_without_the_trap(slurm: Any, submit: Any) -> None:
    """The control."""
    process = submit(without="^trap .* USR1$")
    slurm.wait_for_calls(2, process)
    os.kill(process.pid, signal.SIGUSR1)
    assert process.wait(timeout=60) == -signal.SIGUSR1
    os.killpg(process.pid, signal.SIGKILL)
    assert slurm.noted("saved") == slurm.noted("requeued") == []


def test_cancelled_job_saves_and_is_not_requeued(slurm: Any, submit: Any) -> None:
    """Scancel signals every process, the batch script too."""
    process = submit()
    slurm.wait_for_calls(2, process)
    for task in (process.pid, *map(int, (slurm.notes / "tasks").read_text().split())):
        os.kill(task, signal.SIGTERM)
    slurm.wait(process)
    assert len(slurm.noted("saved")) == 2, slurm.output
    assert slurm.noted("requeued") == []


def test_torchrun_gets_its_options_and_programs_of_this_machine_come_first(
    slurm: Any, submit: Any, job_id: int
) -> None:
    elsewhere = slurm.work / "my env"
    elsewhere.mkdir()
    slurm.programs.joinpath("overnight").rename(elsewhere / "overnight")
    words = ("short", "--sample-prompts", "it's", 'a "b"', "$(touch x)", "two\nlines")
    assert slurm.wait(submit(words=words, max_restarts=4, programs=str(elsewhere))) == [0], slurm.output
    assert slurm.calls() == 2 * [["train", *words]]
    first, second = sorted(slurm.torchruns(), key=lambda node: str(node.rdzv_conf))
    assert (first.rdzv_conf, second.rdzv_conf) == ("is_host=0", "is_host=1")
    assert (first.nnodes, first.nproc_per_node, first.max_restarts) == ("2", "8", 4)
    assert (first.rdzv_backend, first.rdzv_id) == ("c10d", str(job_id))
    assert first.rdzv_endpoint == f"localhost:{20_000 + job_id}"


def test_error_ends_the_job_with_its_status(slurm: Any, submit: Any) -> None:
    assert slurm.wait(submit(words=("wrong",))) == [2]
    (slurm.notes / "torchrun").unlink()
    prepare = ("overnight", "prepare", "other", "--out", "a b")
    texts = (JobText("s3://elsewhere/text"), JobText("data/other", prepare))
    assert slurm.wait(submit(texts=texts)) == [2]
    assert "overnight prepare other --out 'a b'" in slurm.output
    assert slurm.noted("torchrun") == slurm.noted("requeued") == []
