"""Where this process stands among the processes of a run; the only reader of torchrun's environment."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class World:
    """One process's place: `rank` of `size`, computing on `device`."""

    rank: int
    size: int
    device: str

    @property
    def is_main(self) -> bool:
        """True for the one process that writes and prints."""
        return self.rank == 0


def open_world(device: str | None) -> World:
    """This process's place, on `device` ("cpu", "cuda", "cuda:1", "mps"), or the best one found for None.

    Raises ValueError for a device this machine lacks, and under a launcher that starts several processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("a run is trained by one process: start it without torchrun")
    return World(rank=0, size=1, device=_check_device(device) if device else _best_device())


def _best_device() -> str:
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _check_device(device: str) -> str:
    import torch

    kind, _, index = device.partition(":")
    if kind not in {"cpu", "cuda", "mps"} or (index and not index.isdecimal()):
        raise ValueError(f"device={device} is not known; there is cpu, cuda, cuda:1 and so on, mps")
    missing = {"cuda": not torch.cuda.is_available(), "mps": not torch.backends.mps.is_available()}
    if missing.get(kind, False):
        raise ValueError(f"device={device}: this machine has none; leave it out to take {_best_device()}")
    if kind == "cuda" and index and int(index) >= torch.cuda.device_count():
        raise ValueError(f"device={device}: this machine has cuda:0 to cuda:{torch.cuda.device_count() - 1}")
    return device
