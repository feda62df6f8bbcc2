"""Precision, compilation, attention kernel: applied from outside to a finished model."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from overnight.hardware import native_precision

if TYPE_CHECKING:  # a recipe is read without torch, so that --help is instant
    from torch import Tensor

    from overnight.model.gpt import GPT


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """How the machine is used; what is left out is chosen for it, and written into the run's recipe."""

    device: str | None = None
    """cpu, cuda, cuda:1, mps; the best one found if left out."""
    precision: Literal["fp32", "bf16"] | None = None
    """Of the matrix products; weights, sums and losses stay float32. The device's native one if left out."""
    compile: bool | None = None
    """Compile the training step with torch.compile; if left out, wherever its compiler is found."""
    attention: Literal["fused", "plain"] = "fused"
    """fused: torch's best kernel; plain: the written-out product, for comparison."""


def resolve_compute(config: ComputeConfig, device: str) -> ComputeConfig:
    """`config` with everything that was left open decided for `device`."""
    return dataclasses.replace(
        config,
        device=device,
        precision=config.precision or native_precision(device),
        compile=(can_compile() and device != "mps") if config.compile is None else config.compile,
    )


def can_compile() -> bool:
    """True where torch.compile finds what it needs: its C++ compiler, and Python's headers."""
    compiler = shutil.which("clang++" if sys.platform == "darwin" else "g++")
    return compiler is not None and Path(sysconfig.get_path("include"), "Python.h").is_file()


def build_loss(
    model: GPT, loss: Callable[[GPT, Tensor, Tensor], Tensor], compute: ComputeConfig
) -> Callable[[Tensor, Tensor], Tensor]:
    """`loss` of `model` as a function (ids, targets) -> nats, in `compute`'s precision, compiled if asked.

    Compiled for one fixed shape; whatever else the model is used for takes the plain module.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    assert compute.device is not None
    device_type = torch.device(compute.device).type

    def in_precision(ids: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(device_type, torch.bfloat16, enabled=compute.precision == "bf16"):
            return loss(model, ids, targets)

    def written_out(ids: Tensor, targets: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return in_precision(ids, targets)

    chosen = written_out if compute.attention == "plain" else in_precision
    return torch.compile(chosen, dynamic=False, fullgraph=True) if compute.compile else chosen
