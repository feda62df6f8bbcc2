"""Precision, compilation, attention kernel, recomputation: applied from outside to a finished model."""

from __future__ import annotations

import dataclasses
import functools
import shutil
import sys
import sysconfig
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from overnight.hardware import native_precision
from overnight.model import LossMethod
from overnight.model.gpt import GPT
from overnight.model.kernels import (
    LEAST_CHANNELS,
    attend_in_blocks,
    attend_in_compiled_flex,
    attend_in_flex,
    attend_one_by_one,
    attend_with_mask,
)
from overnight.model.loss import fp8_obstacle
from overnight.model.model_config import ModelConfig
from overnight.training import ComputeConfig

Loss = Callable[["GPT", "Tensor", "Tensor", LossMethod], "Tensor"]
"""(model, ids, targets, how the head is computed) -> summed nats."""


OF_PROCESSES = frozenset({"processes", "sharding", "deterministic_reduce", "timeout_seconds", "max_restarts"})


def resolve_compute(config: ComputeConfig, device: str) -> ComputeConfig:
    """`config` with everything that was left open decided. Raises ValueError for what `device` lacks."""
    problems = [
        obstacle for obstacle in (_precision_obstacle(config, device), _head_obstacle(config, device))
    ]
    if config.compile and not can_compile():
        problems.append(
            "compile=True needs a C++ compiler (g++ or clang++) and Python's headers; leave it out"
        )
    if any(problems):
        raise ValueError("; ".join(filter(None, problems)))
    precision = config.precision or native_precision(device)
    return dataclasses.replace(
        config,
        device=device,
        precision=precision,
        attention=config.attention or ("blocks" if (device, precision) == ("cpu", "bf16") else "fused"),
        compile=(can_compile() and device != "mps") if config.compile is None else config.compile,
        loss=config.loss or "full",
    )


def _precision_obstacle(config: ComputeConfig, device: str) -> str | None:
    has_tf32 = device.startswith("cuda") and torch.cuda.get_device_capability(device) >= (8, 0)
    if config.precision == "tf32" and not has_tf32:
        return f"precision=tf32 needs an NVIDIA GPU since Ampere (2020), not {device}; choose fp32"
    return None


def _head_obstacle(config: ComputeConfig, device: str) -> str | None:
    return fp8_obstacle(device) if config.loss == "fp8" else None


def can_compile() -> bool:
    """True where torch.compile finds what it needs: its C++ compiler, and Python's headers."""
    compiler = shutil.which("clang++" if sys.platform == "darwin" else "g++")
    return compiler is not None and Path(sysconfig.get_path("include"), "Python.h").is_file()


def explain_compute(asked: ComputeConfig, decided: ComputeConfig) -> dict[str, str]:
    """Why each setting is what it is, by name: a few words to be printed and kept with the run.

    What concerns several processes is left out.
    """
    reasons = {
        "device": "the best one found",
        "precision": {
            "bf16": "the device multiplies it in hardware",
            "fp16": "the device multiplies it in hardware, and has no bf16",
            "fp32": "the device multiplies nothing shorter in hardware",
        }.get(decided.precision or "", ""),
        "compile": "a compiler was found"
        if decided.compile
        else "no C++ compiler or no Python headers were found"
        if not can_compile()
        else "not on Apple's GPUs",
        "attention": "the fastest here",
        "loss": "all logits fit",
    }
    defaults = ComputeConfig()
    found = {}
    for name, value in vars(decided).items():
        if name in OF_PROCESSES:
            continue
        given = getattr(asked, name)
        reason = "as asked" if given != getattr(defaults, name) else reasons.get(name, "the default")
        found[name] = f"{value} ({reason})"
    return found


def autocast(device: str, precision: str | None, *, keeps_copies: bool = True) -> AbstractContextManager[Any]:
    """Within, matrix products are computed in `precision`; weights, norms and losses stay float32.

    `keeps_copies`: of each weight in that precision, to the end, in case that it is used again.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision or "")
    if dtype is None:
        return nullcontext()
    return torch.autocast(device.partition(":")[0], dtype, cache_enabled=keeps_copies)


def build_loss(
    model: GPT, loss: Loss, compute: ComputeConfig, *, by_block: bool = False
) -> Callable[[Tensor, Tensor], Tensor]:
    """`loss` of `model` as a function (ids, targets) -> nats, as `compute` has it, compiled if asked.

    Compiled for one fixed shape; whatever else the model is used for takes the plain module. With `by_block`
    each block is compiled by itself, since between them weights are gathered and given back.
    """
    device, head = compute.device, compute.loss
    assert device is not None
    assert head is not None
    torch.set_float32_matmul_precision("high" if compute.precision == "tf32" else "highest")
    _adapt_blocks(model, compute)

    def nats(ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
        with autocast(device, compute.precision, keeps_copies=not by_block):  # a whole model of shards
            return loss(model, ids_BT, targets_BT, head)

    if by_block and compute.compile:
        for block in model.h:
            block.forward = torch.compile(block.forward)
        return nats
    return torch.compile(nats, dynamic=False, fullgraph=True) if compute.compile else nats


def _adapt_blocks(model: GPT, compute: ComputeConfig) -> None:
    """Let each block use `compute`'s attention kernels and keep what `compute.activation_checkpointing` says.

    Both belong together: what is computed again must be computed by the same kernels. Blocks that were
    adapted before are adapted anew.
    """
    _, attend_documents = _attention_within_documents(model.config, compute)
    kernels = _attention_kernels(compute, model.config.context_length)
    again: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": model.config.dropout > 0}
    if compute.activation_checkpointing == "selective":
        again["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _costly_operations())
    attend = attend_in_blocks if compute.attention == "blocks" else F.scaled_dot_product_attention
    for block in model.h:
        vars(block).pop("forward", None)
        attention: Any = block.attn
        attention.attend, attention.attend_documents = attend, attend_documents
        if kernels:
            block.forward = sdpa_kernel(kernels)(block.forward)
        if compute.activation_checkpointing != "none":
            block.forward = functools.partial(checkpoint, block.forward, **again)


def _attention_kernels(compute: ComputeConfig, context_length: int) -> list[Any]:
    """The kernels that scaled_dot_product_attention may choose from; [] for all."""
    assert compute.device is not None
    if compute.attention == "math":
        return [SDPBackend.MATH]
    if compute.device.startswith("cuda") and context_length % 128:
        # cuDNN before 9.15.1 reads past the end of rows that are no multiple of 128 (pytorch #169849).
        return [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return []


def _attention_within_documents(model: ModelConfig, compute: ComputeConfig) -> tuple[str, Callable[..., Any]]:
    """The kernel for attention that does not leave a document, in words, and what attends so.

    flex_attention and the CPU's kernel have no dropout. On a GPU no mask comes to cuDNN while training.
    """
    assert compute.device is not None
    if compute.attention == "math":
        return "math with a mask", attend_with_mask
    if compute.device.startswith("cuda"):
        if model.dropout == 0 and model.n_embd // model.n_head >= LEAST_CHANNELS and can_compile():
            return "flex", attend_in_flex if compute.compile else attend_in_compiled_flex
        kernels = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        return "efficient with a mask", sdpa_kernel(kernels)(attend_with_mask)
    if compute.device == "cpu" and model.dropout == 0:
        return "flash, one document after the other", attend_one_by_one
    return "torch's choice with a mask", attend_with_mask


def find_attention_kernel(
    model: ModelConfig, compute: ComputeConfig, *, within_documents: bool = False
) -> str:
    """The kernel that attention is computed with while training: blocks, flash, efficient, cudnn or math.

    Within documents another, and more words.
    """
    assert compute.device is not None
    if within_documents:
        return _attention_within_documents(model, compute)[0]
    if (compute.attention, compute.precision, model.dropout) == ("blocks", "bf16", 0):
        return "blocks"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(compute.precision or "", torch.float32)
    shape = (1, model.n_head, model.context_length, model.n_embd // model.n_head)
    q_BHTD = torch.empty(shape, device=compute.device, dtype=dtype, requires_grad=True)
    kernels = _attention_kernels(compute, model.context_length) or list(SDPBackend.__members__.values())
    with sdpa_kernel([kernel for kernel in kernels if kernel != SDPBackend.ERROR]):
        choose: Callable[..., int] = torch._fused_sdp_choice
        chosen = SDPBackend(choose(q_BHTD, q_BHTD, q_BHTD, dropout_p=model.dropout, is_causal=True))
    return str(chosen.name).lower().removesuffix("_attention")


def _costly_operations() -> list[Any]:
    """What selective recomputation keeps: matrix products and attention, most of a block's time."""
    aten = torch.ops.aten
    names = (
        "mm",
        "addmm",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
    ours = ("attend_in_blocks", "attend_documents")
    return [getattr(aten, name).default for name in names] + [
        getattr(torch.ops.overnight, name).default for name in ours
    ]
