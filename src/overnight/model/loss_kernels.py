"""The output layer and its loss in less memory (chunks) or in 8 bits; `head_loss` chooses among them.

Shapes: N positions, C channels, V rows of the padded vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from overnight.model.fused import soft_cap

CHUNKS_AT_MOST = 8  # 64 made a compiled output layer and its loss 1.5 times slower (pytorch #124480)
CHUNK_BYTES_AT_LEAST = 2**28  # of a chunk's logits in float32: products of fewer rows are slow


# ---------------------------------------------------------------- chunks of positions


def rows_of_chunk(rows: int, vocabulary: int) -> int:
    """Positions of a chunk, of `rows` in all: an eighth, but at least 256 MB of float32 logits."""
    return max(-(-rows // CHUNKS_AT_MOST), CHUNK_BYTES_AT_LEAST // (4 * vocabulary))


class ChunkedLoss(torch.autograd.Function):
    """The output layer and its loss, chunk by chunk.

    The loss is a sum, so the gradients of a chunk are known as soon as its logits are.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NC: Tensor,
        weight_VC: Tensor,
        targets_N: Tensor,
        logits: tuple[int, float | None],
        wants_gradients: bool,
    ) -> Tensor:
        """The summed loss; gradients are computed now, and kept for `backward`.

        `logits` are their number and the value that bounds them.
        """
        dtype = _product_dtype(hidden_NC)
        hidden, weight = hidden_NC.detach().to(dtype), weight_VC.detach().to(dtype)
        nats, hidden_gradients = torch.zeros((), device=hidden.device), []
        weight_gradient = torch.zeros_like(weight_VC, dtype=torch.float32) if wants_gradients else None
        size = rows_of_chunk(len(hidden), len(weight))
        for part, targets in zip(torch.split(hidden, size), torch.split(targets_N, size), strict=True):
            chunk_nats, gradient = _nats_and_gradient(part @ weight.T, targets, *logits)
            nats = nats + chunk_nats
            if weight_gradient is not None:
                hidden_gradients.append(gradient @ weight)
                weight_gradient += gradient.T @ part
        if weight_gradient is not None:
            ctx.save_for_backward(torch.cat(hidden_gradients), weight_gradient)
            ctx.dtypes = hidden_NC.dtype, weight_VC.dtype
        return nats

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of hidden states and weight, scaled by `grad`."""
        hidden_gradient, weight_gradient = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        scaled = (hidden_gradient.float() * grad).to(hidden_dtype)
        return scaled, (weight_gradient * grad).to(weight_dtype), None, None, None


def _nats_and_gradient(
    logits_NV: Tensor, targets_N: Tensor, vocab_size: int, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """The summed loss of some positions, and its gradient by their logits, in their precision."""
    ids_V = torch.arange(logits_NV.shape[1], device=logits_NV.device)
    capped_NV = soft_cap(logits_NV.float(), softcap)
    scores_NV = torch.where(ids_V < vocab_size, capped_NV, -torch.inf)
    total_N1 = scores_NV.logsumexp(dim=1, keepdim=True)
    nats = (total_N1 - scores_NV.gather(1, targets_N[:, None])).sum()
    gradient_NV = (scores_NV - total_N1).exp() - (ids_V == targets_N[:, None]).float()
    if softcap is not None:
        gradient_NV *= 1 - (capped_NV / softcap).square()
    return nats, gradient_NV.to(logits_NV.dtype)


def _product_dtype(tensor: Tensor) -> torch.dtype:
    """What a matrix product of it is computed in: autocast's precision where that is on."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


# ---------------------------------------------------------------- 8-bit products


def fp8_unavailable_reason(device: str) -> str | None:
    """Why the output layer's products can't be computed in 8 bits on `device`; None if they can."""
    if device.startswith("cuda") and torch.cuda.get_device_capability(device) >= (8, 9):
        return None
    return f"loss=fp8 needs an NVIDIA GPU since Ada or Hopper (2022), not {device}; leave it out"


class Fp8Product(torch.autograd.Function):
    """hidden @ weight.T and both gradients, multiplied in 8 bits and summed in float32.

    Activations and weights are e4m3, gradients e5m2 (Micikevicius et al. 2022, section 3); each tensor is
    scaled by its largest absolute value.
    """

    @staticmethod
    def forward(ctx: Any, hidden_NC: Tensor, weight_VC: Tensor) -> Tensor:
        """Returns hidden @ weight.T, (N, V) in bfloat16."""
        ctx.save_for_backward(hidden_NC, weight_VC)
        return _multiply_in_fp8(hidden_NC, weight_VC, torch.float8_e4m3fn)

    @staticmethod
    def backward(ctx: Any, gradient_NV: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of hidden states and weight."""
        hidden_NC, weight_VC = ctx.saved_tensors
        hidden_gradient = _multiply_in_fp8(gradient_NV, weight_VC.T, torch.float8_e5m2)
        weight_gradient = _multiply_in_fp8(gradient_NV.T, hidden_NC.T, torch.float8_e5m2)
        return hidden_gradient.to(hidden_NC.dtype), weight_gradient.to(weight_VC.dtype)


def _multiply_in_fp8(left_MK: Tensor, right_NK: Tensor, left_dtype: torch.dtype) -> Tensor:
    """Left @ right.T, (M, N) in bfloat16."""
    left, left_scale = _quantize(left_MK, left_dtype)
    right, right_scale = _quantize(right_NK, torch.float8_e4m3fn)
    product: Tensor = torch._scaled_mm(
        left, right.T, scale_a=left_scale, scale_b=right_scale, out_dtype=torch.bfloat16
    )
    return product


def _quantize(matrix: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The matrix in 8 bits, contiguous, and the float32 scalar that scales it back."""
    largest = matrix.abs().amax().float().clamp(min=1e-12)
    scale = torch.finfo(dtype).max / largest
    return (matrix.float() * scale).to(dtype).contiguous(), scale.reciprocal()
