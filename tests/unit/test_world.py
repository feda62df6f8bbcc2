from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from overnight import world
from overnight.world import count_cores, keep_compiled_code, open_world, restart_with_large_pages


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
