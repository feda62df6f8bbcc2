from __future__ import annotations

import pytest
import torch

from overnight.world import open_world


def test_a_single_process_is_the_main_one() -> None:
    world = open_world("cpu")
    assert (world.rank, world.size, world.device, world.is_main) == (0, 1, "cpu", True)


def test_the_best_device_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for cuda, mps, expected in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=cuda: found)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda found=mps: found)
        assert open_world(None).device == expected


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cpu:one"])
def test_an_unknown_device_is_refused(device: str) -> None:
    with pytest.raises(ValueError, match=f"device={device} is not known"):
        open_world(device)


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="leave it out to take"):
        open_world("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="cuda:0 to cuda:1"):
        open_world("cuda:2")


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="without torchrun"):
        open_world("cpu")
