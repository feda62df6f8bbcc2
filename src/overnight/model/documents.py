"""Attention that stays within documents: which document each position belongs to, and who may look at whom.

An end-of-text id begins each document, so the ids themselves say where one ends and the next begins. What
stands before the first of these ids in a row is the rest of a document that began in another row.

Shapes: B rows, T positions, H heads, D channels a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NO_MASKS_IN_TRAINING = "with a mask cuDNN's backward pass gives NaN at some lengths (pytorch #196678)"


class Documents(NamedTuple):
    """Where every position of a batch stands, int64."""

    numbers: Tensor
    """Which document of its row it belongs to, (B, T): equal within a document, then one more."""
    positions: Tensor
    """Its place in that document, (B, T), counted from 0; in a first rest from the row's beginning."""


def find_documents(ids_BT: Tensor, end_of_text: int) -> Documents:
    """The documents of `ids_BT`, each of which begins with the id `end_of_text`."""
    begins_BT = ids_BT == end_of_text
    place_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
    start_BT = torch.where(begins_BT, place_T, 0).cummax(1).values
    return Documents(begins_BT.cumsum(1), place_T - start_BT)


def attend_with_mask(
    q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, document_BT: Tensor, *, dropout_p: float = 0.0
) -> Tensor:
    """Causal attention within documents by a mask (B, 1, T, T) that all heads share.

    It works everywhere and computes the whole square. Not for training with cuDNN's kernel.
    """
    # A compiler can't read which kernels are enabled.
    if q_BHTD.is_cuda and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        assert not torch.backends.cuda.cudnn_sdp_enabled(), NO_MASKS_IN_TRAINING  # type: ignore[no-untyped-call]
    same_BTT = document_BT[:, :, None] == document_BT[:, None, :]
    return F.scaled_dot_product_attention(
        q_BHTD, k_BHTD, v_BHTD, attn_mask=same_BTT.tril()[:, None], dropout_p=dropout_p
    )


# ---------------------------------------------------------------- on a CPU, one document after the other


def attend_one_by_one(
    q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, document_BT: Tensor, *, dropout_p: float = 0.0
) -> Tensor:
    """Causal attention within documents by torch's CPU kernel, called for each document: no mask at all.

    The kernel has no dropout.
    """
    assert not dropout_p
    mixed_BTHD: Tensor = _attend(q_BHTD, k_BHTD, v_BHTD, document_BT)[0]
    return mixed_BTHD.transpose(1, 2)


def _stretches(document_BT: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Where each document lies in a tensor (B, H, T, ...)."""
    for row, document_T in enumerate(document_BT):
        begins = (torch.nonzero(document_T.diff()).flatten() + 1).tolist()
        for start, end in pairwise([0, *begins, len(document_T)]):
            yield slice(row, row + 1), slice(None), slice(start, end)


@torch.library.custom_op("overnight::attend_documents", mutates_args=())
def _attend(q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, document_BT: Tensor) -> tuple[Tensor, Tensor]:
    """The mixed values (B, T, H, D), and the logarithm of each softmax's sum (B, H, T) in float32."""
    mixed_BTHD, sums_BHT = _attend_shapes(q_BHTD)
    for at in _stretches(document_BT):
        mixed, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_BHTD[at], k_BHTD[at], v_BHTD[at], 0.0, True
        )
        mixed_BTHD.transpose(1, 2)[at] = mixed
        sums_BHT[at] = sums
    return mixed_BTHD, sums_BHT


@_attend.register_fake
def _attend_shapes(q_BHTD: Tensor, *_others: Tensor) -> tuple[Tensor, Tensor]:
    B, H, T, D = q_BHTD.shape
    return q_BHTD.new_empty(B, T, H, D), q_BHTD.new_empty((B, H, T), dtype=torch.float32)


@torch.library.custom_op("overnight::attend_documents_backward", mutates_args=())
def _attend_backward(
    grad_BTHD: Tensor, qkv: list[Tensor], document_BT: Tensor, mixed_BTHD: Tensor, sums_BHT: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients (B, H, T, D) of queries, keys and values."""
    gradients: tuple[Tensor, Tensor, Tensor] = _gradient_shapes(grad_BTHD)
    inputs = (grad_BTHD.transpose(1, 2), *qkv, mixed_BTHD.transpose(1, 2), sums_BHT)
    for at in _stretches(document_BT):
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(part[at] for part in inputs), 0.0, True
        )
        for gradient_BHTD, part in zip(gradients, found, strict=True):
            gradient_BHTD[at] = part
    return gradients


@_attend_backward.register_fake
def _gradient_shapes(grad_BTHD: Tensor, *_others: Any) -> tuple[Tensor, Tensor, Tensor]:
    dq_BHTD, dk_BHTD, dv_BHTD = (grad_BTHD.new_empty(grad_BTHD.shape).transpose(1, 2) for _ in range(3))
    return dq_BHTD, dk_BHTD, dv_BHTD


def _remember(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx: Any, grad_BTHD: Tensor, _sums: Tensor | None) -> tuple[Tensor | None, ...]:
    *qkv, document_BT, mixed_BTHD, sums_BHT = ctx.saved_tensors
    gradients: tuple[Tensor, ...] = _attend_backward(grad_BTHD, qkv, document_BT, mixed_BTHD, sums_BHT)
    return *gradients, None


_attend.register_autograd(_backward, setup_context=_remember)
