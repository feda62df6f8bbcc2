"""The environment of a process and its share of the machine."""

from __future__ import annotations

import os
import platform
import re
import signal
import subprocess
import sys

import pytest
import torch

from overnight import cli
from overnight.distributed import launcher as machine
from overnight.distributed import world
from overnight.distributed.launcher import (
    LauncherEnv,
    count_cores,
    count_restarts,
    divide_cores,
    is_launched,
    is_main_process,
    read_launcher_env,
    restart_with_large_pages,
    use_new_rendezvous_store,
)
from overnight.distributed.world import open_world

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
SLURM = {
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    "SLURM_STEP_NODELIST": "node[03-04]",
    "SLURM_JOB_ID": "1234567",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
}


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, None),
        ({"WORLD_SIZE": "1"}, None),
        ({"RANK": "5", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}, None),
        (TORCHRUN, LauncherEnv(5, 8, 1, 4, None)),
        (TORCHRUN | SLURM, LauncherEnv(5, 8, 1, 4, None)),
        (SLURM, LauncherEnv(9, 16, 1, 8, "node03:34567")),
        (SLURM | {"MASTER_PORT": "29500"}, LauncherEnv(9, 16, 1, 8, "node03:29500")),
        (SLURM | {"MASTER_ADDR": "10.0.0.1"}, LauncherEnv(9, 16, 1, 8, "10.0.0.1:34567")),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, None),  # a script of sbatch
    ],
)
def test_launcher_environment_is_read(environment, expected):
    assert read_launcher_env(environment) == expected


@pytest.mark.parametrize(
    "nodes, first",
    [
        *[("localhost", "localhost"), ("node003,node004", "node003"), ("node[003-007,12],other1", "node003")],
        *[("gpu-a-[1,3]", "gpu-a-1"), ("login1,node[1-2]", "login1")],
    ],
)
def test_rendezvous_is_at_the_first_host_of_slurm(nodes, first):
    found = read_launcher_env(SLURM | {"SLURM_STEP_NODELIST": nodes})
    assert found is not None
    assert found.address == f"{first}:34567"


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"RANK": ""}, "RANK is not set"),
        ({"RANK": "8"}, "RANK=8"),
        ({"LOCAL_RANK": "4"}, "LOCAL_RANK=4"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR"),
        ({"MASTER_PORT": "x"}, "MASTER_PORT is 'x'"),
        ({"TORCHELASTIC_RESTART_COUNT": "x"}, "TORCHELASTIC_RESTART_COUNT is 'x'"),
    ],
    ids=str,
)
def test_wrong_launcher_variables_are_named(changes, named, monkeypatch):
    """Before any process is waited for."""
    for name, value in (TORCHRUN | {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"} | changes).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=re.escape(named)):
        count_restarts(), world.join_world("cpu", 1).__enter__()


def test_process_knows_whether_it_was_launched(monkeypatch):
    assert (is_launched(), is_main_process(), count_restarts()) == (False, True, 0)
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert (is_launched(), is_main_process(), count_restarts()) == (True, False, 2)
    monkeypatch.setenv("RANK", "0")
    assert is_main_process()


@pytest.mark.parametrize(
    "library, setting, restarts",
    [("glibc", None, True), ("glibc", "glibc.malloc.arena_max=1", False), ("", None, False)],
)
def test_command_restarts_once_with_large_pages(monkeypatch, library, setting, restarts):
    """Not with another C library, nor against the user's setting."""
    started: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda program, words: started.append([program, *words]))
    monkeypatch.setattr(platform, "libc_ver", lambda: (library, "2.36"))
    monkeypatch.setenv("GLIBC_TUNABLES", setting or "")
    if setting is None:
        monkeypatch.delenv("GLIBC_TUNABLES")
    for _ in range(2):
        restart_with_large_pages(["train", "quickstart"])
    words = [sys.executable, sys.executable, "-P", "-m", "overnight", "train", "quickstart"]
    assert started == [words] * restarts
    assert restarts or os.environ.get("GLIBC_TUNABLES") == setting


def test_restart_imports_nothing_from_the_current_folder(tmp_path):
    (tmp_path / "random.py").write_text("raise SystemExit('the random of the current folder')")
    program = "import sys; from overnight.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-P", "-c", program, "train"],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "overnight train needs a recipe" in done.stderr


@pytest.mark.parametrize("chosen", [None, "0"])
def test_cache_and_rendezvous_store_are_set_unless_the_user_has(monkeypatch, tmp_path, chosen):
    names = ("TORCHINDUCTOR_CACHE_DIR", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE")
    for name in names:
        monkeypatch.setenv(name, chosen or "")
        if chosen is None:
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cli.launcher, "restart_with_large_pages", lambda words: None)
    cli._prepare_process(["train"])
    use_new_rendezvous_store()
    expected = [chosen] * 2 if chosen else [str(tmp_path / "overnight/compiled"), "1"]
    assert [os.environ[name] for name in names] == expected


@pytest.mark.parametrize(
    ("quota", "cores"), [("max 100000", 2), ("100000 100000", 1), ("50000 100000", 1), ("800000 100000", 2)]
)
def test_cores_are_counted_without_hyperthreads_within_the_quota(quota, cores, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2, 3}, raising=False)
    (tmp_path / "cpu.max").write_text(quota)
    for processor, siblings in enumerate(["0,2", "1,3", "0,2", "1,3"]):
        topology = tmp_path / f"cpu{processor}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(siblings)
    assert count_cores(tmp_path, tmp_path / "cpu.max") == cores
    assert count_cores(tmp_path / "none", tmp_path / "none") == 4, "a machine that says nothing"


def test_processes_divide_the_cores_unless_the_user_has(monkeypatch):
    threads: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    for module in (world, machine):
        monkeypatch.setattr(module, "count_cores", lambda: 4)
    open_world("cpu")
    divide_cores(2)
    assert (threads, os.environ["OMP_NUM_THREADS"]) == ([], "1"), "as it was set"
    monkeypatch.delenv("OMP_NUM_THREADS")
    open_world("cpu")
    assert threads == [4]
    for processes, share in ((2, "2"), (3, "1"), (64, "1")):
        divide_cores(processes)
        assert os.environ["OMP_NUM_THREADS"] == share
        monkeypatch.delenv("OMP_NUM_THREADS")


PARENT = """
import os, signal, subprocess, sys
subprocess.Popen([sys.executable, "-c", *sys.argv[1:]])
sys.stdin.readline()
os.kill(os.getpid(), signal.SIGKILL)
"""
CHILD = """
import os, signal, sys, time
from overnight.distributed.launcher import end_with_parent, terminate_with_parent
signal.signal(signal.SIGTERM, lambda *_: (print("stopped", flush=True), sys.exit()))
if sys.argv[2] == "killed":
    end_with_parent(os.getppid())
terminate_with_parent()
print("ready", flush=True)
time.sleep(float(sys.argv[1]))
print("slept", flush=True)
"""


# The last is the negative control.
@pytest.mark.parametrize(
    "is_launched, how, sleeps, expected",
    [(True, "saved", 60, "stopped\n"), (False, "killed", 60, ""), (False, "left", 3, "slept\n")],
)
def test_process_of_a_killed_parent_is_ended(is_launched, how, sleeps, expected):
    environment = {name: value for name, value in os.environ.items() if name not in TORCHRUN}
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, CHILD, str(sleeps), how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,  # the child's as well: its end is that of both
        env=environment | (TORCHRUN if is_launched else {}),
        text=True,
    )
    assert parent.stdout.readline() == "ready\n"
    said, _ = parent.communicate("\n", timeout=50)
    assert parent.returncode == -signal.SIGKILL
    assert said == expected


def test_process_whose_launcher_died_before_it_began_is_terminated():
    """Python and torch take seconds to load: the parent may have died since."""
    command = [sys.executable, "-c", CHILD, "60", "saved"]
    environment = {**os.environ, **TORCHRUN, machine.PARENT: str(2**22 + 1)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=50, check=False)
    assert done.stdout.splitlines()[-1] == "stopped"
