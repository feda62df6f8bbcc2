from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from overnight.world import open_world, restart_with_large_pages


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
