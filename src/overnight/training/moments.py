"""What an optimizer keeps of each parameter, and what a checkpoint therefore holds: the only count of it."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from overnight.model.model_config import ModelConfig, Shape, weight_shapes
from overnight.training import OptimizerConfig
from overnight.training.activations import FLOAT32
from overnight.training.muon import RULES, Muon, parameter_kind


def moment_shapes(shapes: Mapping[str, Shape], config: OptimizerConfig) -> dict[str, dict[str, Shape]]:
    """The tensors that the optimizer keeps of each parameter, by name."""
    found = {}
    for name, shape in shapes.items():
        rule = RULES.get(parameter_kind(name, len(shape), config), "adamw")
        kept = {"adamw": ("exp_avg", "exp_avg_sq"), "muon": ("momentum",), "sign": ()}[rule]
        found[name] = dict.fromkeys(kept, shape)
        if rule == "muon" and config.row_normalization:
            found[name]["row_square"] = (*shape[:-1], 1)
    return found


def saved_bytes(model: ModelConfig, optimizer: OptimizerConfig) -> int:
    """Bytes of the tensors of a checkpoint: weights and what the optimizer keeps, float32."""
    return FLOAT32 * sum(map(math.prod, _saved_shapes(model, optimizer)))


def count_saved_tensors(model: ModelConfig, optimizer: OptimizerConfig) -> int:
    """Number of tensors of a checkpoint."""
    return len(_saved_shapes(model, optimizer))


def _saved_shapes(model: ModelConfig, optimizer: OptimizerConfig) -> list[Shape]:
    weights = weight_shapes(model)
    moments = moment_shapes(weights, optimizer).values()
    return [*weights.values(), *(shape for each in moments for shape in each.values())]


def reserve_moments(optimizer: AdamW | Muon, model: nn.Module) -> list[Tensor]:
    """Uninitialised tensors as large as what the optimizer will keep; [] after its first step."""
    if optimizer.state:
        return []
    updated = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    named = {name: each for name, each in model.named_parameters() if each in updated}
    config = optimizer.config if isinstance(optimizer, Muon) else OptimizerConfig()
    moments = moment_shapes({name: tuple(each.shape) for name, each in named.items()}, config)
    return [
        torch.empty(shape, device=named[name].device)
        for name, shapes in moments.items()
        for shape in shapes.values()
    ]
