"""Precision, compilation, attention kernel, activation checkpointing: applied to a finished model."""

from __future__ import annotations

import functools
import shutil
import sys
import sysconfig
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from overnight.hardware import SHORT_DTYPES, native_precision
from overnight.model.gpt import GPT
from overnight.model.kernels import LEAST_CHANNELS, CausalKernel, DocumentKernel, allowed_backends
from overnight.model.loss import next_token_loss
from overnight.model.loss_kernels import fp8_unavailable_reason
from overnight.model.model_config import ModelConfig
from overnight.training import Compute, ComputeConfig, Precision
from overnight.training.sharding import FULLY_SHARDED

OF_PROCESSES = frozenset({"processes", "sharding", "deterministic_reduce", "timeout_seconds", "max_restarts"})

DOCUMENT_KERNELS: dict[DocumentKernel, str] = {
    "flex": "flex",
    "compiled-flex": "flex",
    "efficient-mask": "efficient with a mask",
    "one-by-one": "flash, one document after the other",
    "mask": "torch's choice with a mask",
}
"""Kernel -> its name in reports, for attention within documents."""


def resolve_compute(config: ComputeConfig, device: str) -> Compute:
    """`config` with everything decided for `device`. Raises ValueError for what the device lacks."""
    problems = []
    has_tf32 = device.startswith("cuda") and torch.cuda.get_device_capability(device) >= (8, 0)
    if config.precision == "tf32" and not has_tf32:
        problems.append(f"precision=tf32 needs an NVIDIA GPU since Ampere (2020), not {device}; choose fp32")
    if config.loss == "fp8" and (reason := fp8_unavailable_reason(device)):
        problems.append(reason)
    if config.compile and not can_compile():
        problems.append(
            "compile=True needs a C++ compiler (g++ or clang++) and Python's headers; leave it out"
        )
    if problems:
        raise ValueError("; ".join(problems))
    precision = config.precision or native_precision(device)
    return complete_compute(config, device, precision, compiles=can_compile() and device != "mps")


def complete_compute(config: ComputeConfig, device: str, precision: Precision, *, compiles: bool) -> Compute:
    """`config` with everything decided for a device, also one of another machine, that `compiles` or not."""
    blocks_are_fast = device == "cpu" and precision == "bf16"
    return Compute(
        device=device,
        precision=precision,
        compile=compiles if config.compile is None else config.compile,
        attention=config.attention or ("blocks" if blocks_are_fast else "fused"),
        loss=config.loss or "full",
        activation_checkpointing=config.activation_checkpointing,
        sharding=config.sharding or "none",
        deterministic_reduce=config.deterministic_reduce,
    )


def can_compile() -> bool:
    """True where torch.compile finds its C++ compiler and Python's headers."""
    compiler = shutil.which("clang++" if sys.platform == "darwin" else "g++")
    return compiler is not None and Path(sysconfig.get_path("include"), "Python.h").is_file()


def explain_compute(
    asked: ComputeConfig, decided: Compute, requested: str = "as requested"
) -> dict[str, str]:
    """The value of each setting and the reason for it, by name; settings of several processes left out.

    `requested` is the reason for a setting that is not the default.
    """
    uncompiled = "not on Apple's GPUs" if can_compile() else "no C++ compiler or no Python headers"
    reasons = {
        "device": "the best one found",
        "precision": {
            "bf16": "the device multiplies it in hardware",
            "fp16": "the device multiplies it in hardware, and has no bf16",
            "fp32": "the device multiplies nothing shorter in hardware",
        }.get(decided.precision, ""),
        "compile": "a compiler was found" if decided.compile else uncompiled,
        "attention": "the fastest on this device",
        "loss": "all logits fit",
    }
    for name, default in vars(ComputeConfig()).items():
        if getattr(asked, name) != default:
            reasons[name] = requested
    return {
        name: f"{value} ({reasons.get(name, 'the default')})"
        for name, value in vars(decided).items()
        if name not in OF_PROCESSES
    }


def autocast(device: str, precision: str, *, cache_weights: bool = True) -> AbstractContextManager[Any]:
    """Context manager: matrix products run in `precision`; weights, norms and losses stay float32.

    With `cache_weights`, autocast keeps its copy of each weight until the context ends.
    """
    if precision not in SHORT_DTYPES:
        return nullcontext()
    return torch.autocast(device.partition(":")[0], SHORT_DTYPES[precision], cache_enabled=cache_weights)


class NextTokenLoss:
    """(ids, targets) -> the summed loss of `model` in nats, computed as `compute` says.

    Compiled for one fixed shape; other users of the model call the uncompiled module. Where weights are
    sharded, each block is compiled separately, since its weights are gathered between blocks.
    """

    def __init__(self, model: GPT, compute: Compute, document_separator: int | None = None) -> None:
        self.model, self.compute, self.document_separator = model, compute, document_separator
        torch.set_float32_matmul_precision("high" if compute.precision == "tf32" else "highest")
        set_attention_kernels(model, compute)
        apply_activation_checkpointing(model, compute)
        self._is_sharded = compute.sharding in FULLY_SHARDED
        self._compute: Callable[[Tensor, Tensor], Tensor] = self._nats
        if compute.compile and self._is_sharded:
            for block in model.h:
                block.forward = torch.compile(block.forward)
        elif compute.compile:
            self._compute = torch.compile(self._nats, dynamic=False, fullgraph=True)

    def __call__(self, ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Cross-entropy of every target, summed: a scalar in nats."""
        return self._compute(ids_BT, targets_BT)

    def _nats(self, ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
        # Copies of sharded weights would amount to a whole model: autocast must not keep them.
        with autocast(self.compute.device, self.compute.precision, cache_weights=not self._is_sharded):
            return next_token_loss(self.model, ids_BT, targets_BT, self.compute.loss, self.document_separator)


def set_attention_kernels(model: GPT, compute: Compute) -> None:
    """Set the attention kernels of each block."""
    for block in model.h:
        attention: Any = block.attn
        attention.kernel = causal_kernel(model.config, compute)
        attention.document_kernel = document_kernel(model.config, compute)


def apply_activation_checkpointing(model: GPT, compute: Compute) -> None:
    """Apply `compute.activation_checkpointing` to each block; a second call replaces the first."""
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": model.config.dropout > 0}
    if compute.activation_checkpointing == "selective":
        kept = functools.partial(create_selective_checkpoint_contexts, _costly_operations())
        options["context_fn"] = kept
    for block in model.h:
        # The wrapped forward shadows the class's as an attribute of the instance, so that parameter names
        # stay GPT-2's; a wrapper module would change them.
        vars(block).pop("forward", None)
        if compute.activation_checkpointing != "none":
            block.forward = functools.partial(checkpoint, block.forward, **options)


def causal_kernel(model: ModelConfig, compute: Compute) -> CausalKernel:
    """The kernel for plain causal attention."""
    if compute.attention != "fused":
        return compute.attention
    # cuDNN before 9.15.1 reads past the end of rows that are not a multiple of 128 (pytorch #169849).
    return "without-cudnn" if compute.device.startswith("cuda") and model.context_length % 128 else "fused"


def document_kernel(model: ModelConfig, compute: Compute) -> DocumentKernel:
    """The kernel for attention within documents. Flex and the CPU's kernel have no dropout."""
    if compute.attention == "math":
        return "mask"
    if compute.device.startswith("cuda"):
        if model.dropout == 0 and model.n_embd // model.n_head >= LEAST_CHANNELS and can_compile():
            return "flex" if compute.compile else "compiled-flex"
        return "efficient-mask"  # cuDNN must not get a mask in training
    return "one-by-one" if compute.device == "cpu" and model.dropout == 0 else "mask"


def describe_attention_kernel(model: ModelConfig, compute: Compute, *, within_documents: bool = False) -> str:
    """The kernel of training, in words: blocks, flash, efficient, cudnn, math, or one for documents."""
    if within_documents and compute.attention == "math":
        return "math with a mask"
    if within_documents:
        return DOCUMENT_KERNELS[document_kernel(model, compute)]
    kernel = causal_kernel(model, compute)
    if (kernel, compute.precision, model.dropout) == ("blocks", "bf16", 0):
        return "blocks"
    dtype = SHORT_DTYPES.get(compute.precision, torch.float32)
    shape = (1, model.n_head, model.context_length, model.n_embd // model.n_head)
    q_BHTD = torch.empty(shape, device=compute.device, dtype=dtype, requires_grad=True)
    with allowed_backends(kernel):
        choose: Callable[..., int] = torch._fused_sdp_choice
        chosen = SDPBackend(choose(q_BHTD, q_BHTD, q_BHTD, dropout_p=model.dropout, is_causal=True))
    return str(chosen.name).lower().removesuffix("_attention")


def _costly_operations() -> list[Any]:
    """The operations whose outputs selective checkpointing keeps: matrix products and attention."""
    aten, ours = torch.ops.aten, torch.ops.overnight
    packets = [
        aten.mm,
        aten.addmm,
        aten._scaled_dot_product_flash_attention,
        aten._scaled_dot_product_flash_attention_for_cpu,
        aten._scaled_dot_product_efficient_attention,
        aten._scaled_dot_product_cudnn_attention,
        aten._grouped_mm,
        ours.attend_in_blocks,
        ours.attend_documents,
        ours.expert_products,
    ]
    return [packet.default for packet in packets]
