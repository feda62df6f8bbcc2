"""AdamW: which parameters decay, and one step of it."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import AdamW

from overnight.training import OptimizerConfig


def build_optimizer(
    model: nn.Module,
    config: OptimizerConfig,
    *,
    fused: bool | None = None,
    names: Container[str] | None = None,
) -> AdamW:
    """AdamW over `model`: matrices and embeddings decay, biases and layer norms do not.

    `fused` is one pass over each parameter instead of a dozen; None: wherever torch has it. With `names`,
    only these parameters are updated.
    """
    owned = [parameter for name, parameter in model.named_parameters() if names is None or name in names]
    matrices = [parameter for parameter in owned if parameter.dim() >= 2]
    vectors = [parameter for parameter in owned if parameter.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=config.peak_learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=all(each.device.type in {"cpu", "cuda"} for each in owned) if fused is None else fused,
    )


class Update(NamedTuple):
    """What became of a step's gradients."""

    grad_norm: Tensor
    """Before clipping, a float32 scalar."""
    is_applied: Tensor
    """A bool scalar; False: nothing was changed."""


def apply_gradients(
    optimizer: AdamW,
    parameters: Sequence[Tensor],
    learning_rate: float,
    max_grad_norm: float | None,
    scaler: GradScaler,
    accept: Callable[[Tensor], Tensor] = lambda norm: norm.isfinite(),
) -> Update:
    """Clip, update, and forget the gradients.

    The norm is that of all `parameters`, of which the optimizer may update a share only. Where `accept` says
    no to it, weights and moments are left as they are, to the bit; where `scaler` is on, it decides, and
    lowers its scale. Nothing here waits for the device, if the optimizer is fused.
    """
    scaler.unscale_(optimizer)
    limit = float("inf") if max_grad_norm is None else max_grad_norm
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
    whole: Callable[[], Tensor] | None = getattr(grad_norm, "full_tensor", None)  # of FSDP's shards
    grad_norm = grad_norm if whole is None else whole()
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    is_applied = grad_norm.isfinite() if scaler.is_enabled() else accept(grad_norm)
    if scaler.is_enabled():
        scaler.step(optimizer)
        scaler.update()
    else:
        _step_if(optimizer, is_applied)
    for parameter in parameters:
        parameter.grad = None
    return Update(grad_norm, is_applied)


def _step_if(optimizer: AdamW, is_sound: Tensor) -> None:
    """One step of the optimizer if the scalar says so: to multiply by 0 would keep what is not finite.

    A fused optimizer is told where the weights lie, by the way that torch keeps for its gradient scaler.
    """
    if not optimizer.defaults["fused"]:
        if is_sound:
            optimizer.step()
        return
    optimizer.found_inf = (~is_sound).float()  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]
