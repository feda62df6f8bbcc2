"""Precision, compilation, attention kernel: applied from outside to a finished model."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import dataclass
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
    """Compile the training step with torch.compile; if left out, wherever a C++ compiler is found."""
    attention: Literal["fused", "plain"] = "fused"
    """fused: torch's best kernel; plain: the written-out product, for comparison."""


def resolve_compute(config: ComputeConfig, device: str) -> ComputeConfig:
    """`config` with everything that was left open decided for `device`."""
    compiler_found = any(map(shutil.which, ("g++", "c++", "clang++")))
    return dataclasses.replace(
        config,
        device=device,
        precision=config.precision or native_precision(device),
        compile=(compiler_found and not device.startswith("mps"))
        if config.compile is None
        else config.compile,
    )


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
    plain = sdpa_kernel(SDPBackend.MATH) if compute.attention == "plain" else contextlib.nullcontext()

    def in_precision(ids: Tensor, targets: Tensor) -> Tensor:
        with plain, torch.autocast(device_type, torch.bfloat16, enabled=compute.precision == "bf16"):
            return loss(model, ids, targets)

    return torch.compile(in_precision, dynamic=False, fullgraph=True) if compute.compile else in_precision
