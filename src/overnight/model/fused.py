"""Elementwise parts with a backward pass written out: fewer passes over memory than autograd's.

On a CPU these parts cost as much as they read and write, and autograd keeps and reads every intermediate
result. Under `torch.compile` they are fused like all else.

Shapes: D is the last dimension; all other dimensions are free.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

RMS_EPSILON = 1e-6  # added to the mean of squares, as Transformers does


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = (norm.square() / x.shape[-1] + RMS_EPSILON).rsqrt()
        normalized = x * scale
        ctx.save_for_backward(normalized, scale)
        return normalized

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        normalized, scale = ctx.saved_tensors
        along = (gradient * normalized).mean(dim=-1, keepdim=True)
        return torch.addcmul(gradient, normalized, along, value=-1).mul_(scale)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return torch.addcmul(x * cosine, _swap_halves(x), sine)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cosine, sine = ctx.saved_tensors
        return torch.addcmul(gradient * cosine, _swap_halves(gradient), sine, value=-1), None, None


class _SquaredRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = F.relu(x)
        ctx.save_for_backward(positive)
        return positive.square()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (positive,) = ctx.saved_tensors
        return (gradient * positive).mul_(2)


class _SoftCap(torch.autograd.Function):
    """cap * tanh(x / cap) is cap * (2 * sigmoid(2 * x / cap) - 1); torch's tanh takes 9 times as long."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, cap: float) -> Tensor:
        share = (logits.float() * (2 / cap)).sigmoid_()
        ctx.save_for_backward(share)
        ctx.dtype = logits.dtype
        return (share * (2 * cap)).sub_(cap)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (share,) = ctx.saved_tensors
        return torch.ops.aten.sigmoid_backward(gradient, share).mul_(4).to(ctx.dtype), None


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, x_gain: Tensor, y_gain: Tensor) -> Tensor:
        ctx.save_for_backward(x, y, x_gain, y_gain)
        return torch.addcmul(x * x_gain, y, y_gain)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        x, y, x_gain, y_gain = ctx.saved_tensors
        flat = gradient.flatten()
        along = (torch.dot(flat, each.flatten().to(flat.dtype)).view(1) for each in (x, y))
        return gradient * x_gain, gradient * y_gain, *along


def rms_norm(x: Tensor, *_others: object) -> Tensor:
    """`x` (..., D) divided by the root of the mean of its squares over D, float32."""
    normalized: Tensor = _RmsNorm.apply(x.float())  # type: ignore[no-untyped-call]
    return normalized


def weighted_sum(x: Tensor, y: Tensor, x_gain: Tensor, y_gain: Tensor) -> Tensor:
    """x_gain * x + y_gain * y; the gains are tensors of one number."""
    if torch.compiler.is_compiling():  # it refuses one tensor as both inputs: x is y in the first block
        return x_gain * x + y_gain * y
    total: Tensor = _WeightedSum.apply(x, y, x_gain, y_gain)  # type: ignore[no-untyped-call]
    return total


def rotate_halves(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """`x` (..., D) whose channels i and i + D / 2 are rotated as a pair, float32.

    `cosine` is twice (..., D / 2) side by side; `sine` likewise, negative in the first half.
    """
    rotated: Tensor = _Rotate.apply(x.float(), cosine, sine)  # type: ignore[no-untyped-call]
    return rotated


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0) squared (So et al. 2021, arXiv 2109.08668)."""
    squared: Tensor = _SquaredRelu.apply(x)  # type: ignore[no-untyped-call]
    return squared


def soft_cap(logits: Tensor, cap: float | None) -> Tensor:
    """Logits bounded to the open interval from -cap to cap, in float32; unchanged without a cap."""
    return logits if cap is None else _SoftCap.apply(logits, cap)  # type: ignore[no-untyped-call]


def _swap_halves(x: Tensor) -> Tensor:
    return x.roll(x.shape[-1] // 2, dims=-1)
