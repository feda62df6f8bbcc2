from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from overnight.distributed import machine, world
from overnight.distributed.launcher import (
    CollectiveValueError,
    LauncherEnv,
    count_restarts,
    is_launched,
    is_main_process,
    read_launcher_env,
    use_new_rendezvous_store,
)
from overnight.distributed.machine import (
    count_cores,
    divide_cores,
    keep_compiled_code,
    restart_with_large_pages,
)
from overnight.distributed.world import SINGLE_PROCESS, World, count_processes, join_world, open_world

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
SLURM = {
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    "SLURM_STEP_NODELIST": "node[03-04]",
    "SLURM_JOB_ID": "1234567",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
}


def test_a_single_process_is_the_main_one() -> None:
    world = open_world("cpu")
    assert (world.rank, world.size, world.device, world.is_main) == (0, 1, "cpu", True)


def test_the_best_device_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for cuda, mps, expected in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=cuda: found)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda found=mps: found)
        assert open_world(None).device == expected


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cuda:", "cpu:0", "mps:0"])
def test_an_unknown_device_is_refused(device: str) -> None:
    with pytest.raises(ValueError, match=f"device={device} is not known"):
        open_world(device)


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="choose --device cpu"):
        open_world("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert open_world("cuda:1").device == "cuda:1"
    with pytest.raises(ValueError, match="cuda:0 to cuda:1"):
        open_world("cuda:2")


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE is set and RANK is not"):
        open_world("cpu")
    for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    with pytest.raises(ValueError, match="without torchrun"):
        open_world("cpu")


def test_a_training_command_starts_anew_with_large_pages_once(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda program, words: started.append([program, *words]))
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    restart_with_large_pages(["train", "quickstart"])
    restart_with_large_pages(["train", "quickstart"])
    assert started == [[sys.executable, sys.executable, "-P", "-m", "overnight", "train", "quickstart"]]


def test_starting_anew_finds_no_modules_in_the_users_folder(tmp_path: Path) -> None:
    (tmp_path / "random.py").write_text("raise SystemExit('the random of the current folder')")
    program = "import sys; from overnight.cli import main; sys.exit(main())"
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", program, "train"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "overnight train needs a recipe" in done.stderr


def test_another_c_library_and_a_users_own_setting_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "execv", lambda program, words: pytest.fail("started anew"))
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=1")
    restart_with_large_pages(["train"])
    assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.arena_max=1"
    monkeypatch.delenv("GLIBC_TUNABLES")
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    restart_with_large_pages(["train"])


def test_compiled_code_is_kept_where_the_user_says_or_else_in_the_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "chosen")
    keep_compiled_code(tmp_path)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "chosen"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    keep_compiled_code(tmp_path)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path)


def two_threads_a_core(folder: Path) -> Path:
    """Four processors on two cores, as Linux tells it."""
    for processor, siblings in enumerate(["0,2", "1,3", "0,2", "1,3"]):
        place = folder / f"cpu{processor}" / "topology"
        place.mkdir(parents=True)
        (place / "thread_siblings_list").write_text(siblings)
    return folder


@pytest.mark.parametrize(
    ("quota", "cores"), [("max 100000", 2), ("100000 100000", 1), ("50000 100000", 1), ("800000 100000", 2)]
)
def test_the_cores_are_counted_and_not_their_threads_nor_those_of_others(
    quota: str, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2, 3}, raising=False)
    (tmp_path / "cpu.max").write_text(quota)
    topology = two_threads_a_core(tmp_path / "cpu")
    assert count_cores(topology, tmp_path / "cpu.max") == cores
    assert count_cores(tmp_path / "none", tmp_path / "none") == 4, "a machine that tells nothing"


def test_torch_computes_with_a_thread_for_each_core(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    monkeypatch.setattr(world, "count_cores", lambda: 4)
    open_world("cpu")
    assert told == [], "OMP_NUM_THREADS is set, in these tests"
    monkeypatch.delenv("OMP_NUM_THREADS")
    open_world("cpu")
    assert told == [4]


# ---------------------------------------------------------------- a place among others


@pytest.mark.parametrize(
    "environment, place",
    [
        ({}, None),
        ({"WORLD_SIZE": "1"}, None),
        (TORCHRUN, LauncherEnv(5, 8, 1, 4, None)),
        (TORCHRUN | SLURM, LauncherEnv(5, 8, 1, 4, None)),
        (SLURM, LauncherEnv(9, 16, 1, 8, "node03:34567")),
        (SLURM | {"MASTER_PORT": "29500"}, LauncherEnv(9, 16, 1, 8, "node03:29500")),
        (SLURM | {"MASTER_ADDR": "10.0.0.1"}, LauncherEnv(9, 16, 1, 8, "10.0.0.1:34567")),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, None),
    ],
    ids=[
        "by itself",
        "nothing said",
        "torchrun",
        "torchrun in a job of Slurm's",
        "srun",
        "srun, a port",
        "srun, an address",
        "srun, a single task",
        "a batch script",
    ],
)
def test_a_launcher_s_environment_says_the_place(
    environment: dict[str, str], place: LauncherEnv | None
) -> None:
    assert read_launcher_env(environment) == place


@pytest.mark.parametrize(
    "nodes, first",
    [
        ("localhost", "localhost"),
        ("node3", "node3"),
        ("node003,node004", "node003"),
        ("node[003-007,12],other1", "node003"),
        ("gpu-a-[1,3]", "gpu-a-1"),
        ("login1,node[1-2]", "login1"),
    ],
)
def test_the_first_of_slurm_s_hosts_is_where_they_meet(nodes: str, first: str) -> None:
    found = read_launcher_env(SLURM | {"SLURM_STEP_NODELIST": nodes})
    assert found is not None
    assert found.address == f"{first}:34567"


@pytest.mark.parametrize("missing", TORCHRUN)
def test_half_a_launcher_is_refused(missing: str) -> None:
    environment = {name: value for name, value in TORCHRUN.items() if name != missing}
    if missing == "WORLD_SIZE":
        assert read_launcher_env(environment) is None
    else:
        with pytest.raises(ValueError, match=f"WORLD_SIZE is set and {missing} is not: start with torchrun"):
            read_launcher_env(environment)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment of one of several processes."""
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_a_process_knows_whether_it_was_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (is_launched(), is_main_process(), count_restarts()) == (False, True, 0)
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert (is_launched(), is_main_process(), count_restarts()) == (True, False, 2)
    monkeypatch.setenv("RANK", "0")
    assert is_main_process()


@pytest.mark.parametrize(
    "device, gpus, nccl, complaint",
    [
        ("cuda", 2, True, "4 processes on this machine are more than its 2 GPUs: start 2"),
        ("cuda", 8, False, "this torch has no NCCL, by which GPUs talk: .* give --device cpu"),
        ("cuda:1", 8, True, "device=cuda:1 is one device, and processes=8: say cuda"),
        ("mps", 0, True, "on the CPU or on NVIDIA's GPUs, not on mps"),
        ("gpu", 8, True, "device=gpu is not known"),
    ],
)
def test_a_device_that_several_can_t_share_is_refused(
    launched: pytest.MonkeyPatch, device: str, gpus: int, nccl: bool, complaint: str
) -> None:
    launched.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    launched.setattr(torch.backends.mps, "is_available", lambda: True)
    launched.setattr(torch.cuda, "device_count", lambda: gpus)
    launched.setattr(torch.distributed, "is_nccl_available", lambda: nccl)
    with pytest.raises(ValueError, match=complaint), join_world(device, 5):
        pass


@pytest.mark.parametrize(
    "asked, device, gpus, count",
    [("auto", None, 4, 4), ("auto", "cpu", 4, 1), ("auto", None, 0, 1), (3, None, 4, 3), (7, "cpu", 0, 7)],
)
def test_processes_are_counted(
    monkeypatch: pytest.MonkeyPatch, asked: int | str, device: str | None, gpus: int, count: int
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert count_processes(asked, device) == count


@pytest.mark.parametrize(
    "asked, device, complaint",
    [
        (0, "cpu", "^processes=0 must be at least 1$"),
        (0, "cuda", "^processes=0 must be at least 1, and at most 4, a GPU for each$"),
        (5, "cuda", "^processes=5 must be at least 1, and at most 4"),
        (5, None, "at most 4"),
        (2, "cuda:1", "device=cuda:1 is one device, and processes=2: say cuda"),
        (2, "mps", "device=mps: this machine has none"),
    ],
)
def test_more_processes_than_devices_are_refused(
    monkeypatch: pytest.MonkeyPatch, asked: int, device: str | None, complaint: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(ValueError, match=complaint):
        count_processes(asked, device)


def test_what_is_started_finds_its_share_of_the_cores_and_a_store_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine, "count_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS")
    for processes, threads in ((2, "4"), (3, "2"), (64, "1")):
        divide_cores(processes)
        assert os.environ["OMP_NUM_THREADS"] == threads
        monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "0")
    use_new_rendezvous_store()
    assert os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "0", "as the user has set it"
    monkeypatch.delenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE")
    use_new_rendezvous_store()
    assert os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"


# ---------------------------------------------------------------- what one process says to itself


def test_alone_everything_is_said_and_nothing_sent() -> None:
    tensors = [torch.ones(2), torch.ones(3)]
    SINGLE_PROCESS.sum(tensors)
    SINGLE_PROCESS.tree_all_reduce(tensors)
    SINGLE_PROCESS.spread(tensors, 0)
    SINGLE_PROCESS.barrier()
    assert all(tensor.eq(1).all() for tensor in tensors)
    assert (SINGLE_PROCESS.any(True), SINGLE_PROCESS.any(False), SINGLE_PROCESS.gather("word")) == (
        True,
        False,
        ["word"],
    )


def test_alone_a_refusal_is_as_it_was() -> None:
    refusal = ValueError("too large")
    with pytest.raises(ValueError, match="too large") as refused, SINGLE_PROCESS.raise_together():
        raise refusal
    assert refused.value is refusal


@pytest.mark.parametrize(
    "refusals, said",
    [
        (["too large"] * 3, "too large"),
        (["", "too large", ""], "rank 1: too large"),
        (["no", "", "too large"], "rank 0: no; rank 2: too large"),
    ],
)
def test_refusals_of_several_are_one_sentence(
    monkeypatch: pytest.MonkeyPatch, refusals: list[str], said: str
) -> None:
    monkeypatch.setattr(World, "gather", lambda self, word: refusals)

    def refuse() -> None:
        with World(1, 3, "cpu").raise_together():
            if refusals[1]:
                raise ValueError(refusals[1])

    with pytest.raises(CollectiveValueError) as refused:
        refuse()
    assert str(refused.value) == said


def test_another_error_is_not_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are not asked: they will lose this process."""
    monkeypatch.setattr(World, "gather", lambda self, word: pytest.fail("asked"))
    with pytest.raises(KeyError), World(0, 2, "cpu").raise_together():
        raise KeyError("ours")


@pytest.mark.parametrize(
    "sizes, stretches", [([10, 10, 10], [30]), ([40, 1], [40, 1]), ([39, 1, 5], [40, 5])]
)
def test_a_bucket_is_full_with_the_tensor_that_fills_it(
    monkeypatch: pytest.MonkeyPatch, sizes: list[int], stretches: list[int]
) -> None:
    monkeypatch.setattr(world, "BUCKET_BYTES", 160)
    said: list[int] = []

    def double(flat: torch.Tensor) -> None:
        said.append(len(flat))
        flat *= 2

    monkeypatch.setattr(torch.distributed, "all_reduce", double)
    tensors = [torch.full((size,), float(place)) for place, size in enumerate(sizes)]
    World(0, 2, "cpu").sum(tensors)
    assert said == stretches
    assert all(tensor.eq(2 * place).all() for place, tensor in enumerate(tensors))
