from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.amp import GradScaler

from overnight.optim import OptimizerConfig, apply_gradients, build_optimizer


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))


def test_matrices_decay_and_vectors_do_not() -> None:
    optimizer = build_optimizer(small_net(), OptimizerConfig())
    assert [{parameter.dim() for parameter in group["params"]} for group in optimizer.param_groups] == [
        {2},
        {1},
    ]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


def adamw_by_hand(
    weight: torch.Tensor, gradients: list[torch.Tensor], rate: float, decay: float
) -> torch.Tensor:
    """Decoupled weight decay as Loshchilov and Hutter's algorithm 2 writes it, in float64."""
    weight, mean, square = (
        weight.double(),
        torch.zeros_like(weight).double(),
        torch.zeros_like(weight).double(),
    )
    for step, gradient in enumerate(gradients, start=1):
        mean = 0.9 * mean + 0.1 * gradient.double()
        square = 0.95 * square + 0.05 * gradient.double() ** 2
        corrected = (mean / (1 - 0.9**step)) / ((square / (1 - 0.95**step)).sqrt() + 1e-8)
        weight = weight - rate * decay * weight - rate * corrected
    return weight


def test_the_update_is_adamw() -> None:
    net = small_net()
    before = [parameter.detach().clone() for parameter in net.parameters()]
    gradients = [[torch.randn_like(parameter) for parameter in net.parameters()] for _ in range(5)]
    optimizer = build_optimizer(net, OptimizerConfig())
    for step in range(5):
        for parameter, gradient in zip(net.parameters(), gradients[step], strict=True):
            parameter.grad = gradient.clone()
        apply_gradients(optimizer, list(net.parameters()), 1e-2, None, GradScaler(enabled=False))
    for index, parameter in enumerate(net.parameters()):
        decay = 0.1 if parameter.dim() >= 2 else 0.0
        expected = adamw_by_hand(before[index], [step[index] for step in gradients], 1e-2, decay)
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-5, atol=1e-7)


def test_the_norm_returned_is_the_one_before_clipping_and_the_update_is_clipped() -> None:
    net = small_net()
    twin = copy.deepcopy(net)
    for module, scale in ((net, 1.0), (twin, 100.0)):
        optimizer = build_optimizer(module, OptimizerConfig())
        for parameter in module.parameters():
            parameter.grad = torch.full_like(parameter, scale)
        elements = sum(parameter.numel() for parameter in module.parameters())
        norm = apply_gradients(optimizer, list(module.parameters()), 1e-3, 1e-9, GradScaler(enabled=False))
        assert norm.item() == pytest.approx(scale * elements**0.5, rel=1e-5)
        assert all(parameter.grad is None for parameter in module.parameters())
    for one, other in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    "wrong",
    [
        {"peak_learning_rate": 0.0},
        {"peak_learning_rate": float("nan")},
        {"beta2": 1.0},
        {"weight_decay": -0.1},
        {"max_grad_norm": 0.0},
        {"epsilon": 0.0},
    ],
)
def test_what_makes_no_sense_is_told(wrong: dict[str, float]) -> None:
    (problem,) = OptimizerConfig(**wrong).problems()
    assert next(iter(wrong)) in problem
