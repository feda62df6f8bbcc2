"""The state of training: weights, optimizer, step, guard, loss scale. All else is recomputed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.distributed.tensor import DTensor
from torch.optim import AdamW

from overnight.model.gpt import GPT
from overnight.training.guard import Guard
from overnight.training.muon import Muon
from overnight.training.optim import build_scaler


class TensorShard(NamedTuple):
    """Some rows of a tensor."""

    rows: Tensor
    first: int
    """Index of the first of them."""


def local_shard(tensor: Tensor) -> TensorShard:
    """The shard of a parameter or moment that this process holds; all of it if it is not sharded."""
    if not isinstance(tensor, DTensor):
        return TensorShard(tensor, 0)
    (dimension,) = (number for number, placement in enumerate(tensor.placements) if placement.is_shard(0))
    chunk = -(-len(tensor) // tensor.device_mesh.size(dimension))  # as torch.chunk divides
    first = min(len(tensor), chunk * tensor.device_mesh.get_local_rank(dimension))
    rows = tensor.to_local()
    assert len(rows) == min(len(tensor), first + chunk) - first
    return TensorShard(rows, first)


def is_writer(parameter: Tensor, *, is_owner: bool) -> bool:
    """True if this process saves its shard; of several copies one is saved."""
    if not isinstance(parameter, DTensor):
        return is_owner
    copies = [number for number, placement in enumerate(parameter.placements) if placement.is_replicate()]
    return all(parameter.device_mesh.get_local_rank(number) == 0 for number in copies)


@torch.no_grad()
def set_weights(model: GPT, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Copy whole tensors into this process's shards of the parameters; none may be missing."""
    parameters = dict(model.named_parameters())
    for name, weight in weights:
        rows, first = local_shard(parameters.pop(name).detach())
        wanted = weight[first : first + len(rows)]
        rows[: len(wanted)].copy_(wanted)
        rows[len(wanted) :] = 0.0  # the padding of the vocabulary
    assert not parameters, f"no weights for {', '.join(parameters)}"


@dataclass
class TrainState:
    """The state of a run after a step."""

    model: GPT
    optimizer: AdamW | Muon
    step: int = 0
    """Finished optimizer steps."""
    guard: Guard = field(default_factory=Guard)
    """Losses and norms of the last steps, and what was skipped."""
    scaler: GradScaler = field(default_factory=lambda: build_scaler("cpu", None))
    """Enabled in fp16 only."""
