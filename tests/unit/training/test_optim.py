"""The optimizer is not moved by what is not finite; its updates are compared with torch's in test_step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import AdamW

from overnight.training import OptimizerConfig
from overnight.training.optim import build_optimizer, clip_gradients, step_if

OFF = GradScaler(enabled=False)
NOT_FINITE = (math.nan, math.inf, -math.inf)


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))


@pytest.mark.parametrize(
    "name, value",
    [
        ("peak_learning_rate", 0.0),
        ("peak_learning_rate", math.nan),
        ("beta2", 1.0),
        ("weight_decay", -0.1),
        ("max_grad_norm", 0.0),
        ("epsilon", 0.0),
    ],
)
def test_invalid_setting_is_named(name, value):
    settings: dict[str, Any] = {name: value}
    (problem,) = OptimizerConfig(**settings).problems()
    assert name in problem


def bytes_of(net: nn.Module, optimizer: AdamW) -> list[bytes]:
    """Every byte of the weights, of both moments and of the counts of updates."""
    tensors = [parameter.detach() for parameter in net.parameters()]
    for parameter in net.parameters():
        tensors += [value for value in optimizer.state[parameter].values() if isinstance(value, Tensor)]
    return [tensor.numpy().tobytes() for tensor in tensors]


def update(net: nn.Module, optimizer: AdamW, spoiled: tuple[int, int, float] | None = None) -> float:
    """One step on gradients of noise, where element `spoiled` of one parameter has another value."""
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter)
    if spoiled is not None:
        number, index, value = spoiled
        gradient = [*net.parameters()][number].grad
        assert gradient is not None
        gradient.view(-1)[index % gradient.numel()] = value
    norm = clip_gradients([*net.parameters()], 1.0)
    step_if(optimizer, OFF, norm.isfinite(), 1e-2)
    return norm.item()


@pytest.mark.parametrize("fused", [True, False])
def test_unsound_step_changes_no_byte(fused):
    """300 gradients with one element that is not finite, and a step that is unsound for another reason."""
    net = small_net()
    optimizer = build_optimizer(net, OptimizerConfig(), fused=fused)
    update(net, optimizer)
    before, parameters = bytes_of(net, optimizer), len([*net.parameters()])
    for number in range(300):
        norm = update(net, optimizer, (number % parameters, 7 * number, NOT_FINITE[number // 100]))
        assert not math.isfinite(norm)
        assert bytes_of(net, optimizer) == before
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    step_if(optimizer, OFF, torch.tensor(False), 1e-2)
    assert bytes_of(net, optimizer) == before
    update(net, optimizer)
    assert not {*bytes_of(net, optimizer)} & {*before}, "a sound step changes everything"
    assert all(parameter.isfinite().all() for parameter in net.parameters())


def test_torch_alone_spreads_one_bad_element():
    """The negative control, and why the step is not multiplied by 0."""
    net = small_net()
    optimizer = build_optimizer(net, OptimizerConfig())
    update(net, optimizer)
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, math.nan)
    optimizer.step()
    assert all(parameter.isnan().all() for parameter in net.parameters())
    assert math.isnan(0 * math.nan)


def test_unsound_first_step_leaves_no_trace():
    runs = []
    for is_spoiled in (True, False):
        net = small_net()
        optimizer = build_optimizer(net, OptimizerConfig())
        if is_spoiled:
            update(net, optimizer, (0, 0, math.nan))
        torch.manual_seed(4)
        update(net, optimizer)
        runs.append(bytes_of(net, optimizer))
    assert runs[0] == runs[1]
