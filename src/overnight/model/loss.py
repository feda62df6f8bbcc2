"""A loss is a sum and a count: add both over micro-batches, ranks and evaluation batches; divide once.

Shapes: B rows, T positions, N rows times positions, C channels, V rows of the padded vocabulary.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from overnight.model import LossMethod
from overnight.model.gpt import GPT
from overnight.model.kernels import find_documents

CHUNKS_AT_MOST = (
    8  # more cost time: 64 made a compiled head and its loss half again as slow (pytorch #124480)
)
CHUNK_BYTES_AT_LEAST = 2**28  # of a chunk's logits in float32: products of fewer rows are slow


class LossSum(NamedTuple):
    """Cross-entropy in nats, summed over `tokens` targets."""

    nats: Tensor
    """A scalar, float32 or float64."""
    tokens: int
    """How many targets were summed."""

    def plus(self, other: LossSum) -> LossSum:
        """Both sums together (a NamedTuple's own `+` would join them end to end)."""
        return LossSum(self.nats + other.nats, self.tokens + other.tokens)

    def per_token(self) -> float:
        """Mean nats per token. Waits for the device."""
        return self.nats.item() / self.tokens

    def perplexity(self) -> float:
        """Exponential of the mean; infinite beyond 709 nats per token, where a float ends."""
        try:
            return math.exp(self.per_token())
        except OverflowError:
            return math.inf

    def bits_per_byte(self, text_bytes: int) -> float:
        """Bits needed for each byte of the text that the targets spell: comparable across tokenizers."""
        return self.nats.item() / math.log(2) / text_bytes


def cross_entropy_nats(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Minus the log-likelihood of every target under the logits at its place, summed; float32 scalar, nats.

    Computed in float32 whatever the precision of the logits: a sum of many small terms.
    """
    return F.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten(), reduction="sum")


def head_loss(
    hidden_BTC: Tensor, weight_VC: Tensor, targets_BT: Tensor, *, vocab_size: int, method: LossMethod
) -> Tensor:
    """Minus the log-likelihood of every target after the hidden states, summed; float32 scalar, nats.

    Rows of the weight from `vocab_size` on are padding: no probability falls on them, and they get no
    gradient. `full` computes all logits at once; `chunked` those of some positions at a time, so that
    memory holds a chunk's and no more; `fp8` computes the head's three products in 8 bits.
    """
    if method == "chunked":
        hidden_NC, targets_N = hidden_BTC.flatten(0, 1), targets_BT.flatten()
        nats: Tensor = _ChunkedNats.apply(  # type: ignore[no-untyped-call]
            hidden_NC, weight_VC, targets_N, vocab_size, torch.is_grad_enabled()
        )
        return nats
    if method == "fp8":
        logits_NV: Tensor = _Fp8Product.apply(hidden_BTC.flatten(0, 1), weight_VC)  # type: ignore[no-untyped-call]
        return cross_entropy_nats(logits_NV[None, :, :vocab_size], targets_BT.flatten()[None])
    return cross_entropy_nats(F.linear(hidden_BTC, weight_VC)[..., :vocab_size], targets_BT)


# ---------------------------------------------------------------- some positions at a time


def rows_of_chunk(rows: int, vocabulary: int) -> int:
    """How many of so many positions are computed at once: an eighth, or as many as have 256 MB of logits."""
    return max(-(-rows // CHUNKS_AT_MOST), CHUNK_BYTES_AT_LEAST // (4 * vocabulary))


class _ChunkedNats(torch.autograd.Function):
    """The whole head and its loss. Since the loss is a sum, a chunk's gradients are known with its logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NC: Tensor,
        weight_VC: Tensor,
        targets_N: Tensor,
        vocab_size: int,
        wants_gradients: bool,
    ) -> Tensor:
        dtype = _product_dtype(hidden_NC)
        hidden, weight = hidden_NC.detach().to(dtype), weight_VC.detach().to(dtype)
        nats, hidden_gradients = torch.zeros((), device=hidden.device), []
        weight_gradient = torch.zeros_like(weight_VC, dtype=torch.float32) if wants_gradients else None
        size = rows_of_chunk(len(hidden), len(weight))
        for part, targets in zip(torch.split(hidden, size), torch.split(targets_N, size), strict=True):
            chunk_nats, gradient = _nats_and_gradient(part @ weight.T, targets, vocab_size)
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
        hidden_gradient, weight_gradient = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        scaled = (hidden_gradient.float() * grad).to(hidden_dtype)
        return scaled, (weight_gradient * grad).to(weight_dtype), None, None, None


def _nats_and_gradient(logits_NV: Tensor, targets_N: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """The summed loss of some positions, and its gradient by their logits, in their precision."""
    ids_V = torch.arange(logits_NV.shape[1], device=logits_NV.device)
    scores_NV = torch.where(ids_V < vocab_size, logits_NV.float(), -torch.inf)
    total_N1 = scores_NV.logsumexp(dim=1, keepdim=True)
    nats = (total_N1 - scores_NV.gather(1, targets_N[:, None])).sum()
    gradient_NV = (scores_NV - total_N1).exp() - (ids_V == targets_N[:, None]).float()
    return nats, gradient_NV.to(logits_NV.dtype)


def _product_dtype(tensor: Tensor) -> torch.dtype:
    """What a matrix product of it is computed in: autocast's precision where that is on."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


# ---------------------------------------------------------------- in 8 bits


def fp8_obstacle(device: str) -> str | None:
    """Why the head's products can't be computed in 8 bits on `device`; None if they can."""
    if device.startswith("cuda") and torch.cuda.get_device_capability(device) >= (8, 9):
        return None
    return f"loss=fp8 needs an NVIDIA GPU since Ada or Hopper (2022), not {device}; leave it out"


class _Fp8Product(torch.autograd.Function):
    """hidden times weight, transposed, and both gradients: in 8 bits, added up in float32.

    Activations and weights have 4 bits of exponent and 3 of mantissa, gradients 5 and 2 (Micikevicius et
    al. 2022, section 3); each tensor is scaled by its own largest value.
    """

    @staticmethod
    def forward(ctx: Any, hidden_NC: Tensor, weight_VC: Tensor) -> Tensor:
        ctx.save_for_backward(hidden_NC, weight_VC)
        return _multiply_in_fp8(hidden_NC, weight_VC, torch.float8_e4m3fn)

    @staticmethod
    def backward(ctx: Any, gradient_NV: Tensor) -> tuple[Tensor, Tensor]:
        hidden_NC, weight_VC = ctx.saved_tensors
        hidden_gradient = _multiply_in_fp8(gradient_NV, weight_VC.T, torch.float8_e5m2)
        weight_gradient = _multiply_in_fp8(gradient_NV.T, hidden_NC.T, torch.float8_e5m2)
        return hidden_gradient.to(hidden_NC.dtype), weight_gradient.to(weight_VC.dtype)


def _multiply_in_fp8(left_MK: Tensor, right_NK: Tensor, left_dtype: torch.dtype) -> Tensor:
    """Left times right, transposed: (M, N) in bfloat16."""
    left, left_scale = _quantize(left_MK, left_dtype)
    right, right_scale = _quantize(right_NK, torch.float8_e4m3fn)
    product: Tensor = torch._scaled_mm(
        left, right.T, scale_a=left_scale, scale_b=right_scale, out_dtype=torch.bfloat16
    )
    return product


def _quantize(matrix: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The matrix in 8 bits, its rows contiguous, and the float32 scalar that it is to be multiplied by."""
    largest = matrix.abs().amax().float().clamp(min=1e-12)
    scale = torch.finfo(dtype).max / largest
    return (matrix.float() * scale).to(dtype).contiguous(), scale.reciprocal()


def next_token_loss(
    model: GPT, ids_BT: Tensor, targets_BT: Tensor, method: LossMethod, document_separator: int | None = None
) -> Tensor:
    """What pretraining minimises: the cross-entropy of every next token, summed, in nats.

    `document_separator` is the id at which a document begins that sees nothing before it; None if a row sees itself.
    """
    documents = None if document_separator is None else find_documents(ids_BT, document_separator)
    hidden_BTC = model.trunk(ids_BT, documents=documents)
    return head_loss(hidden_BTC, model.wte.weight, targets_BT, vocab_size=model.vocab_size, method=method)
