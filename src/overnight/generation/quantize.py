"""Weights stored for generation: every matrix in the format that the machine reads fastest.

Each new id reads all weights once, so generation is bound by memory bandwidth: half the bytes are nearly
twice the speed. On a CPU only the matrices change. Layer norms, attention, the residual stream and the
logits stay in float32, since torch's attention in bfloat16 takes twice the time there.

The kernels are those to which torch.compile lowers a CPU's matrix products, called without compiling.
"""

from __future__ import annotations

import platform
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from overnight.hardware import native_precision
from overnight.model.fused import soft_cap
from overnight.model.gpt import GPT, eval_mode

GenerationPrecision = Literal["fp32", "fp16", "bf16", "int8"]
GPU_PRECISIONS: dict[str, tuple[GenerationPrecision, ...]] = {
    "bf16": ("bf16", "fp16", "fp32"),
    "fp16": ("fp16", "fp32"),
    "fp32": ("fp32",),
}
"""A GPU's native precision -> the precisions for generation, the best first."""


def generation_precisions(device: str) -> tuple[GenerationPrecision, ...]:
    """The precisions that a torch device generates well in, the best first.

    On a CPU that is fp16: as few bytes as bf16, eight times as exact, and faster for one row or a few. For
    eight rows bf16 is faster on processors that multiply it.
    """
    native = native_precision(device)
    if device != "cpu":
        return GPU_PRECISIONS[native]
    supported: dict[GenerationPrecision, bool] = {
        "fp16": "fbgemm" in torch.backends.quantized.supported_engines,
        "bf16": _has_onednn() and native == "bf16",
        "fp32": True,
        "int8": _has_onednn() and platform.machine().lower() in {"x86_64", "amd64"},
    }
    return tuple(precision for precision, is_supported in supported.items() if is_supported)


LARGEST = {"fp16": torch.finfo(torch.float16).max, "bf16": torch.finfo(torch.bfloat16).max}
TOLERANCE = {"fp16": 2e-3, "bf16": 1e-2, "int8": 5e-2}
"""Relative error of a matrix above which a precision does not hold it: four roundings of ordinary weights."""
MARGIN = 16  # how much larger than the probe's a real text's activations may be
PROBE_TOKENS = 16
LOOKED_UP = ("wpe.weight", "value_embedding.table.weight")  # not multiplied, and so not converted


@torch.no_grad()
def unsuitable_reason(model: GPT, precision: GenerationPrecision) -> str | None:
    """The reason why `precision` can't represent a float32 model; None if it can.

    Compares every matrix and, on a GPU, the activations of a few ids.
    """
    if precision == "fp32":
        return None
    for name, weight in model.weights().items():
        if weight.dim() == 2 and not name.endswith(LOOKED_UP) and not _holds(weight, precision):
            return f"{precision} can't represent {name}, whose largest value is {weight.abs().max():.3g}"
    if model.wte.weight.device.type == "cpu" or precision == "int8":  # activations stay in float32
        return None
    largest = _largest_activation(model)
    if not largest * MARGIN <= LARGEST[precision]:
        return f"{precision} can't represent the activations, whose largest value is {largest:.3g}"
    return None


def _holds(weight: Tensor, precision: GenerationPrecision) -> bool:
    if precision == "int8":
        scale_N1 = _int8_scale(weight)
        narrowed = (weight / scale_N1).round() * scale_N1
    else:
        narrowed = weight.to(torch.float16 if precision == "fp16" else torch.bfloat16).float()
    error, size = (narrowed - weight).norm(), weight.norm()
    return bool(torch.isfinite(error)) and bool(error <= TOLERANCE[precision] * size)


def _largest_activation(model: GPT) -> float:
    """The largest absolute output of any layer, for ids spread over the vocabulary."""
    found = [0.0]

    def record(_module: nn.Module, _inputs: object, output: object) -> None:
        if isinstance(output, Tensor):
            found.append(float(output.abs().max()))

    hooks = [module.register_forward_hook(record) for module in model.modules()]
    length = min(PROBE_TOKENS, model.config.context_length)
    ids = torch.linspace(0, model.vocab_size - 1, length, device=model.wte.weight.device).long()
    with eval_mode(model):
        model.trunk(ids[None])
    for hook in hooks:
        hook.remove()
    return max(found)


@torch.no_grad()
def prepare_for_generation(model: GPT, precision: GenerationPrecision) -> None:
    """Store the matrices of `model` in `precision`, in place, the head's apart from the embedding's.

    Afterwards the model can generate and be evaluated, but not trained: its matrices are not parameters now.
    """
    if model.wte.weight.device.type != "cpu":
        if precision != "fp32":
            _convert_on_gpu(model, torch.float16 if precision == "fp16" else torch.bfloat16)
        return
    if precision == "fp32" and not _has_onednn():
        return
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, _store(child.weight, child.bias, precision))
    # GPT.head is a method, since its weight may be the embedding's. Here it has a matrix of its own, so an
    # attribute of this one model hides the method.
    head = _store(model.lm_head.weight[: model.vocab_size], None, precision)
    cap = model.config.logit_softcap
    model.head = lambda hidden: soft_cap(head.forward(hidden), cap)  # type: ignore[method-assign]


def _has_onednn() -> bool:
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


def _convert_on_gpu(model: GPT, dtype: torch.dtype) -> None:
    """Convert all but the head to 16 bits: GPT-2's logits (-30 to -130) are too coarse in bfloat16."""
    head, cap = model.lm_head.weight.detach()[: model.vocab_size], model.config.logit_softcap
    model.to(dtype)
    model.head = lambda hidden: soft_cap(F.linear(hidden.float(), head), cap)  # type: ignore[method-assign]


def _store(weight: Tensor, bias: Tensor | None, precision: GenerationPrecision) -> nn.Module:
    """A layer that computes x @ weight.T + bias, float32 to float32."""
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    if precision == "int8":
        return QuantizedLinear(weight, bias)
    if precision == "fp16":
        return HalfLinear(weight, bias)
    return PackedLinear(weight, bias, torch.float32 if precision == "fp32" else torch.bfloat16)


class PackedLinear(nn.Module):
    """A float32 or bfloat16 product by oneDNN, its matrix stored in the blocks that oneDNN multiplies."""

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
    """A float32 product by FBGEMM; only its matrix is rounded to float16."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.matrix = torch.ops.quantized.linear_prepack_fp16(weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N), both float32."""
        product: Tensor = torch.ops.quantized.linear_dynamic_fp16(x, self.matrix)
        return product


def _int8_scale(weight_NK: Tensor) -> Tensor:
    """The value of one step of each row's int8 numbers, (N, 1)."""
    return weight_NK.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127


class QuantizedLinear(nn.Module):
    """A product by oneDNN with an int8 matrix: one scale for each of its rows, symmetric about 0.

    Only the weights are rounded to 8 bits. A row of x is split into two rows of 7 bits, a high and a low
    digit, which are multiplied in one pass over the matrix: 14 bits of the row's largest value. Digits have
    7 bits because older processors add pairs of products in 16 bits, and 2 * 127 * 127 still fits.
    """

    STEPS, ZERO = 63, 64  # a digit is -63 to 63, stored unsigned around 64

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        scale_N1 = _int8_scale(weight)
        self.scale_N = scale_N1[:, 0]
        rounded = (weight / scale_N1).round().to(torch.int8)
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
