"""A finished model made ready to write: every matrix stored as the machine reads it fastest.

Each id that is drawn takes one reading of all weights, so writing waits for memory: half the bytes are
nearly twice the speed. On a CPU the matrices change and nothing else does. What lies between them (layer
norms, attention, the residual stream, the logits) is computed in float32, since torch's attention in
bfloat16 takes twice the time there.

The kernels are those to which torch.compile lowers a CPU's products, called without compiling anything.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from overnight.hardware import native_precision
from overnight.model.gpt import GPT

DecodingPrecision = Literal["fp32", "fp16", "bf16", "int8"]


def generation_precisions(device: str) -> tuple[DecodingPrecision, ...]:
    """The precisions in which a torch device writes well; the first is its best.

    On a CPU that is fp16: as few bytes as bf16, eight times as exact, and faster for one row or a few.
    For eight rows bf16 is faster where the processor multiplies it.
    """
    native = native_precision(device)
    if device != "cpu":
        several: dict[str, tuple[DecodingPrecision, ...]] = {
            "bf16": ("bf16", "fp16", "fp32"),
            "fp16": ("fp16", "fp32"),
            "fp32": ("fp32",),
        }
        return several[native]
    found: dict[DecodingPrecision, bool] = {
        "fp16": "fbgemm" in torch.backends.quantized.supported_engines,
        "bf16": _has_onednn() and native == "bf16",
        "fp32": True,
        "int8": _has_onednn() and platform.machine().lower() in {"x86_64", "amd64"},
    }
    return tuple(precision for precision, is_there in found.items() if is_there)


@torch.no_grad()
def prepare_for_generation(model: GPT, precision: DecodingPrecision) -> None:
    """Store the matrices of `model`, and its head's apart from the embedding's, in `precision`, in place.

    From then on it can write and be judged, no more: its matrices are no parameters any longer.
    """
    device = model.wte.weight.device
    if device.type != "cpu":
        if precision != "fp32":
            _narrow(model, torch.float16 if precision == "fp16" else torch.bfloat16)
        return
    if precision == "fp32" and not _has_onednn():
        return
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, _store(child.weight, child.bias, precision))
    head = _store(model.wte.weight[: model.vocab_size], None, precision)
    model.head = head.forward  # type: ignore[method-assign]  # of this one model


def _has_onednn() -> bool:
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


def _narrow(model: GPT, dtype: torch.dtype) -> None:
    """A GPU's way: everything in 16 bits but the head, whose logits would lie too far apart.

    Those of GPT-2 lie between -30 and -130, where bfloat16 knows quarters and halves only.
    """
    head = model.wte.weight.detach()[: model.vocab_size]
    model.to(dtype)
    model.head = lambda hidden: F.linear(hidden.float(), head)  # type: ignore[method-assign]


def _store(weight: Tensor, bias: Tensor | None, precision: DecodingPrecision) -> nn.Module:
    stores: dict[DecodingPrecision, Callable[[Tensor, Tensor | None], nn.Module]] = {
        "fp32": partial(PackedLinear, dtype=torch.float32),
        "bf16": partial(PackedLinear, dtype=torch.bfloat16),
        "fp16": HalfLinear,
        "int8": QuantizedLinear,
    }
    return stores[precision](weight.detach(), None if bias is None else bias.detach())


class PackedLinear(nn.Module):
    """A product of float32 or bfloat16 by oneDNN, which has its matrix in the blocks that it multiplies."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.matrix = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype).contiguous())
        self.bias = None if bias is None else bias.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N), both float32."""
        product: Tensor = torch.ops.mkldnn._linear_pointwise(
            x.to(self.dtype), self.matrix, self.bias, "none", [], ""
        )
        return product.float()


class HalfLinear(nn.Module):
    """A product of float32 by FBGEMM with a matrix kept in float16, which alone is rounded."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.matrix = torch.ops.quantized.linear_prepack_fp16(weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N), both float32."""
        product: Tensor = torch.ops.quantized.linear_dynamic_fp16(x, self.matrix)
        return product


class QuantizedLinear(nn.Module):
    """A product by oneDNN with a matrix of int8, each of its rows with one scale, symmetric about 0.

    Only the weights are rounded to 8 bits. A row of x becomes two rows of 7 bits, a high and a low digit,
    which are multiplied in one reading of the matrix: 14 bits of the row's greatest number. Digits of 7
    bits, because older processors add two products in 16, and 2 * 127 * 127 still fits.
    """

    STEPS, ZERO = 63, 64  # a digit lies between -63 and 63, and is kept as an unsigned number around 64

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.scale_N = weight.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / 127
        rounded = (weight / self.scale_N[:, None]).round().to(torch.int8)
        self.matrix = torch.ops.onednn.qlinear_prepack(rounded, None)
        self.zeros_N = torch.zeros(len(weight), dtype=torch.int32)
        self.bias = torch.zeros(len(weight)) if bias is None else bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N), both float32."""
        x_MK = x.reshape(-1, x.shape[-1])
        scale_M1 = x_MK.abs().amax(dim=1, keepdim=True).clamp_(min=torch.finfo(x.dtype).tiny).div_(self.STEPS)
        steps_MK = x_MK / scale_M1
        high_MK = steps_MK.round()
        low_MK = steps_MK.sub_(high_MK).mul_(2 * self.STEPS).round_()
        digits = torch.cat([high_MK, low_MK]).add_(self.ZERO).to(torch.uint8)
        scales = (1.0, self.ZERO, self.matrix, self.scale_N, self.zeros_N)
        product = torch.ops.onednn.qlinear_pointwise(
            digits, *scales, None, 1.0, 0, torch.float32, "none", [], ""
        )
        high_MN, low_MN = product.chunk(2)
        product_MN = torch.addcmul(self.bias, torch.add(high_MN, low_MN, alpha=0.5 / self.STEPS), scale_M1)
        return product_MN.view(*x.shape[:-1], -1)
