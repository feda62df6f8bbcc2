"""Each backward pass that is written out, against autograd's of the formula."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from overnight.model.fused import rms_norm, rotate_halves, soft_cap, squared_relu, weighted_sum

X, Y, GAIN = (3, 8), (3, 8), (1,)
PARTS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "rms_norm": (rms_norm, lambda x: x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt(), [X]),
    "squared_relu": (squared_relu, lambda x: x.clamp(min=0) ** 2, [X]),
    "soft_cap": (lambda x: soft_cap(x, 0.7), lambda x: 0.7 * torch.tanh(x / 0.7), [X]),
    "weighted_sum": (weighted_sum, lambda x, y, a, b: a * x + b * y, [X, Y, GAIN, GAIN]),
}


def gradients_of(function: Callable[..., Tensor], shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """The output, and the gradient of its weighted sum for each argument."""
    draw = torch.Generator().manual_seed(0)
    leaves = [torch.randn(shape, generator=draw).requires_grad_() for shape in shapes]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, torch.randn(X, generator=draw))]


@pytest.mark.parametrize("name", PARTS)
def test_gradients_are_autograd_s(name: str) -> None:
    ours, formula, shapes = PARTS[name]
    for found, expected in zip(gradients_of(ours, shapes), gradients_of(formula, shapes), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_rotation_turns_back() -> None:
    """The gradient is rotated by the opposite angle."""
    angle = torch.linspace(0, 2, 4)
    cosine, sine = torch.cat([angle.cos()] * 2), torch.cat([-angle.sin(), angle.sin()])
    output, gradient = gradients_of(lambda x: rotate_halves(x, cosine, sine), [X])
    x = torch.randn(X, generator=(draw := torch.Generator().manual_seed(0)))
    weight = torch.randn(X, generator=draw)
    torch.testing.assert_close((output * weight).sum(), (gradient * x).sum())
