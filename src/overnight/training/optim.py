"""AdamW: weight decay groups, gradient clipping, and an update that can be skipped."""

from __future__ import annotations

from collections.abc import Container, Sequence

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.tensor import DTensor
from torch.optim import AdamW

from overnight.training import OptimizerConfig
from overnight.training.muon import Muon, needs_groups, parameter_groups


def build_optimizer(
    model: nn.Module,
    config: OptimizerConfig,
    *,
    fused: bool | None = None,
    names: Container[str] | None = None,
    stacked: bool = True,
) -> AdamW | Muon:
    """AdamW over `model`, with weight decay for matrices and embeddings, not for biases and layer norms.

    `fused` computes each parameter in one pass instead of a dozen; None: wherever torch supports it. With
    `names`, only these parameters are updated. Other rules than AdamW's are in `muon`, and so is `stacked`.
    """
    owned = {name: each for name, each in model.named_parameters() if names is None or name in names}
    if needs_groups(owned, config):
        return Muon(parameter_groups(model, owned, config), config, stacked=stacked)
    groups = [
        {"params": [each for each in owned.values() if each.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [each for each in owned.values() if each.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=config.peak_learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=all(each.device.type in {"cpu", "cuda"} for each in owned.values()) if fused is None else fused,
    )


def build_scaler(device: str, precision: str | None) -> GradScaler:
    """Loss scaling, which keeps float16 gradients from vanishing; enabled for fp16 only.

    The scale begins at 65,536, is halved by every overflow and doubled after 2,000 steps without one
    (Micikevicius et al. 2018, section 3.2; the numbers are torch's).
    """
    return GradScaler(device.partition(":")[0], enabled=precision == "fp16")


def clip_gradients(parameters: Sequence[Tensor], max_grad_norm: float | None) -> Tensor:
    """Scale all gradients down to `max_grad_norm`; returns the norm before clipping, a float32 scalar."""
    limit = float("inf") if max_grad_norm is None else max_grad_norm
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
    return grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm  # of FSDP's shards


def step_if(optimizer: AdamW | Muon, scaler: GradScaler, is_sound: Tensor, learning_rate: float) -> None:
    """Update the parameters if the boolean scalar `is_sound` is true; otherwise change nothing.

    With loss scaling, the scaler decides instead, and lowers its scale. Does not wait for the device if
    the optimizer is fused.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("rate_factor", 1.0)
    if scaler.is_enabled():
        scaler.step(optimizer)
        scaler.update()
    elif optimizer.defaults["fused"]:
        # torch's fused AdamW skips its update where `found_inf` is 1: the gradient scaler's own way. To
        # multiply the update by 0 instead would keep what is not finite.
        optimizer.found_inf = (~is_sound).float()  # type: ignore[union-attr]
        try:
            optimizer.step()
        finally:
            del optimizer.found_inf  # type: ignore[union-attr]
    elif is_sound:
        optimizer.step()
