"""Causal attention on a CPU, block after block of queries, as matrix products in bfloat16.

A block of queries meets the keys up to its own end and no others, so nearly half of the square is
never computed; and what is computed are plain batched products, which the CPU's bfloat16 units do at full
rate. torch's own CPU kernel does not: it took 1.8 times as long (NOTEBOOK.md, 2026-11-21). The weights of
attention are kept for the backward pass: 1.2 MB for a head and row of 1,024 positions.

Shapes: N rows times heads, T positions, D channels a head, Q queries of a block, S keys up to its end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

QUERIES = 128


def attend_in_blocks(
    q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, *, is_causal: bool = False, **others: Any
) -> Tensor:
    """What F.scaled_dot_product_attention returns: by itself where this is for, else through torch's.

    It is for training: plainly causal attention in bfloat16 on a CPU, without dropout. A model that is
    judged takes torch's kernel, so that the same weights have the same loss wherever they are. Scores are
    rounded to bfloat16 before their softmax, as everywhere where attention is written out under autocast.
    """
    is_made_for_it = q_BHTD.dtype is torch.bfloat16 and q_BHTD.device.type == "cpu"
    in_blocks = is_made_for_it and is_causal and torch.is_grad_enabled()
    if not in_blocks or others.get("dropout_p") or others.get("attn_mask") is not None:
        return F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, is_causal=is_causal, **others)
    scaled_BHTD = q_BHTD * q_BHTD.shape[-1] ** -0.5
    q_NTD, k_NTD, v_NTD = (part.flatten(0, 1).contiguous() for part in (scaled_BHTD, k_BHTD, v_BHTD))
    mixed_NTD: Tensor = _attend(q_NTD, k_NTD, v_NTD)[0]
    return mixed_NTD.view(q_BHTD.shape)


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    """First query and end of each block."""
    return ((start, min(start + QUERIES, length)) for start in range(0, length, QUERIES))


def _split(weights: Tensor, rows: int, length: int) -> list[Tensor]:
    """The (N, Q, S) weights of each block, as views of one flat tensor."""
    sizes = [rows * (end - start) * end for start, end in _blocks(length)]
    shapes = [(rows, end - start, end) for start, end in _blocks(length)]
    return [part.view(shape) for part, shape in zip(torch.split(weights, sizes), shapes, strict=True)]


def _count(rows: int, length: int) -> int:
    return sum(rows * (end - start) * end for start, end in _blocks(length))


@torch.library.custom_op("overnight::attend_in_blocks", mutates_args=())
def _attend(q_NTD: Tensor, k_NTD: Tensor, v_NTD: Tensor) -> tuple[Tensor, Tensor]:
    """The mixed values (N, T, D), and all weights, flat. The queries are scaled already."""
    rows, length, _ = q_NTD.shape
    mixed_NTD, weights = torch.empty_like(q_NTD), q_NTD.new_empty(_count(rows, length))
    for (start, end), weights_NQS in zip(_blocks(length), _split(weights, rows, length), strict=True):
        scores_NQS = torch.bmm(q_NTD[:, start:end], k_NTD[:, :end].transpose(1, 2))
        scores_NQS[:, :, start:] += _future(end - start, scores_NQS.dtype)
        torch.softmax(scores_NQS, dim=-1, out=weights_NQS)
        mixed_NTD[:, start:end] = torch.bmm(weights_NQS, v_NTD[:, :end])
    return mixed_NTD, weights


def _future(queries: int, dtype: torch.dtype) -> Tensor:
    """What takes a block's own later positions out of its softmax: -inf above the diagonal, else 0."""
    return torch.full((queries, queries), -math.inf, dtype=dtype).triu(1)


@_attend.register_fake
def _attend_shapes(q_NTD: Tensor, *_others: Tensor) -> tuple[Tensor, Tensor]:
    rows, length, _ = q_NTD.shape
    return torch.empty_like(q_NTD), q_NTD.new_empty(_count(rows, length))


@torch.library.custom_op("overnight::attend_in_blocks_backward", mutates_args=())
def _attend_backward(
    grad_NTD: Tensor, q_NTD: Tensor, k_NTD: Tensor, v_NTD: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the scaled queries, the keys and the values; summed over blocks in float32."""
    rows, length, _ = q_NTD.shape
    dq_NTD = torch.empty_like(q_NTD)
    dk_NTD, dv_NTD = (torch.zeros_like(k_NTD, dtype=torch.float32) for _ in range(2))
    for (start, end), weights_NQS in zip(_blocks(length), _split(weights, rows, length), strict=True):
        grad_NQD = grad_NTD[:, start:end]
        dv_NTD[:, :end] += torch.bmm(weights_NQS.transpose(1, 2), grad_NQD)
        grad_NQS = torch.bmm(grad_NQD, v_NTD[:, :end].transpose(1, 2))
        dscores_NQS = torch._softmax_backward_data(grad_NQS, weights_NQS, -1, weights_NQS.dtype)
        dq_NTD[:, start:end] = torch.bmm(dscores_NQS, k_NTD[:, :end])
        dk_NTD[:, :end] += torch.bmm(dscores_NQS.transpose(1, 2), q_NTD[:, start:end])
    return dq_NTD, dk_NTD.to(k_NTD.dtype), dv_NTD.to(v_NTD.dtype)


@_attend_backward.register_fake
def _attend_backward_shapes(_grad: Tensor, q_NTD: Tensor, *_others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q_NTD), torch.empty_like(q_NTD), torch.empty_like(q_NTD)


def _remember(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])


def _backward(ctx: Any, grad_NTD: Tensor, _weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    q_NTD, k_NTD, v_NTD, weights = ctx.saved_tensors
    gradients: tuple[Tensor, Tensor, Tensor] = _attend_backward(
        grad_NTD.contiguous(), q_NTD, k_NTD, v_NTD, weights
    )
    return gradients


_attend.register_autograd(_backward, setup_context=_remember)
