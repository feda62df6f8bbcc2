"""Everything that training changes: weights, optimizer, step. The rest of a run is a function of these.

What it has learnt beside them is little: how the last steps went, and float16's scale.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.distributed.tensor import DTensor
from torch.optim import AdamW

from overnight.model.gpt import GPT
from overnight.training.checkpoint.format import TensorShard
from overnight.training.guard import Guard
from overnight.training.optim import build_scaler


def local_shard(tensor: Tensor) -> TensorShard:
    """What this process holds of a parameter or a moment: all of it, or, sharded, some of its rows."""
    if not isinstance(tensor, DTensor):
        return TensorShard(tensor, 0)
    (dimension,) = (number for number, placement in enumerate(tensor.placements) if placement.is_shard(0))
    chunk = -(-len(tensor) // tensor.device_mesh.size(dimension))  # as torch.chunk divides
    first = min(len(tensor), chunk * tensor.device_mesh.get_local_rank(dimension))
    rows = tensor.to_local()
    assert len(rows) == min(len(tensor), first + chunk) - first
    return TensorShard(rows, first)


def is_writer(parameter: Tensor, *, is_owner: bool) -> bool:
    """True if this process is the one to save what it holds: of copies, only one is saved."""
    if not isinstance(parameter, DTensor):
        return is_owner
    copies = [number for number, placement in enumerate(parameter.placements) if placement.is_replicate()]
    return all(parameter.device_mesh.get_local_rank(number) == 0 for number in copies)


@torch.no_grad()
def set_weights(model: GPT, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Copy whole tensors into what this process holds of the parameters; all of them must be there."""
    parameters = dict(model.named_parameters())
    for name, weight in weights:
        rows, first = local_shard(parameters.pop(name).detach())
        wanted = weight[first : first + len(rows)]
        rows[: len(wanted)].copy_(wanted)
        rows[len(wanted) :] = 0.0  # the padding of the vocabulary
    assert not parameters, f"nothing was given for {', '.join(parameters)}"


@dataclass
class TrainState:
    """A run at one moment."""

    model: GPT
    optimizer: AdamW
    step: int = 0
    """Finished optimizer steps."""
    guard: Guard = field(default_factory=Guard)
    """What is known of the steps before."""
    scaler: GradScaler = field(default_factory=lambda: build_scaler("cpu", None))
    """On in fp16 only."""
