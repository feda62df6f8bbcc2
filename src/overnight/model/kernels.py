"""Attention that stays within documents: which document each position belongs to, and who may look at whom.

An end-of-text id begins each document, so the ids themselves say where one ends and the next begins. What
stands before the first of these ids in a row is the rest of a document that began in another row.

Shapes: B rows, T positions, H heads, D channels a head.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

NO_MASKS_IN_TRAINING = "with a mask cuDNN's backward pass gives NaN at some lengths (pytorch #196678)"


class Documents(NamedTuple):
    """Where every position of a batch stands, int64."""

    document_ids: Tensor
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


# ---------------------------------------------------------------- causal attention on a cpu, block after block of queries, as matrix products in bfloat16


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
    mixed_NTD: Tensor = _block_attention(q_NTD, k_NTD, v_NTD)[0]
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
def _block_attention(q_NTD: Tensor, k_NTD: Tensor, v_NTD: Tensor) -> tuple[Tensor, Tensor]:
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


@_block_attention.register_fake
def _block_attention_shapes(q_NTD: Tensor, *_others: Tensor) -> tuple[Tensor, Tensor]:
    rows, length, _ = q_NTD.shape
    return torch.empty_like(q_NTD), q_NTD.new_empty(_count(rows, length))


@torch.library.custom_op("overnight::attend_in_blocks_backward", mutates_args=())
def _block_attention_backward(
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


@_block_attention_backward.register_fake
def _attend_backward_shapes(_grad: Tensor, q_NTD: Tensor, *_others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q_NTD), torch.empty_like(q_NTD), torch.empty_like(q_NTD)


def _save_block_attention(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])


def _backward_blocks(ctx: Any, grad_NTD: Tensor, _weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    q_NTD, k_NTD, v_NTD, weights = ctx.saved_tensors
    gradients: tuple[Tensor, Tensor, Tensor] = _block_attention_backward(
        grad_NTD.contiguous(), q_NTD, k_NTD, v_NTD, weights
    )
    return gradients


_block_attention.register_autograd(_backward_blocks, setup_context=_save_block_attention)


# ---------------------------------------------------------------- attention within documents on a gpu


BLOCK = 128  # positions: flex_attention's own block
LEAST_CHANNELS = 16  # of a head, that its kernel multiplies


def attend_in_flex(
    q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, document_BT: Tensor, *, dropout_p: float = 0.0
) -> Tensor:
    """Causal attention within documents. To be compiled: eager, it writes the whole square down.

    flex_attention has no dropout. The layers of a model build the same mask, which a compiler builds once.
    """
    assert not dropout_p
    mixed_BHTD: Tensor = flex_attention(q_BHTD, k_BHTD, v_BHTD, block_mask=build_block_mask(document_BT))
    return mixed_BHTD


def attend_in_compiled_flex(
    q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, document_BT: Tensor, *, dropout_p: float = 0.0
) -> Tensor:
    """The same, compiled by itself: for a training step that is not."""
    mixed_BHTD: Tensor = _compile()(q_BHTD, k_BHTD, v_BHTD, document_BT, dropout_p=dropout_p)
    return mixed_BHTD


@functools.cache
def _compile() -> Callable[..., Tensor]:
    """Made when it is first needed: to load the compiler takes two seconds."""
    return torch.compile(attend_in_flex, dynamic=False, fullgraph=True)


def build_block_mask(document_BT: Tensor) -> BlockMask:
    """Which blocks of keys a block of queries meets, wholly or in part; the same for all heads.

    Numbers of documents rise along a row, so a block's first and last say all: no square of T is formed.
    """
    B, T = document_BT.shape
    padding = -T % BLOCK
    # A number that no document has: a block that is padded is never whole, and nothing looks into it.
    padded_BT = F.pad(document_BT, (0, padding), value=T + 1)
    blocks_BNP = padded_BT.view(B, -1, BLOCK)
    first_BN, last_BN = blocks_BNP[..., 0], blocks_BNP[..., -1]
    place_N = torch.arange(blocks_BNP.shape[1], device=document_BT.device)
    before_NN = place_N[:, None] > place_N  # queries stand in rows, keys in columns
    whole_BNN = before_NN & (first_BN[:, None, :] == last_BN[:, :, None])
    met_BNN = before_NN & (last_BN[:, None, :] >= first_BN[:, :, None])
    in_part_BNN = (met_BNN & ~whole_BNN) | (place_N[:, None] == place_N)

    def may_look(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (padded_BT[row, query] == padded_BT[row, key])

    return BlockMask.from_kv_blocks(
        *_listed(in_part_BNN), *_listed(whole_BNN), BLOCK_SIZE=BLOCK, mask_mod=may_look, seq_lengths=(T, T)
    )


def _listed(chosen_BNN: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys are chosen (B, 1, N), and which: these come first in (B, 1, N, N)."""
    numbers = chosen_BNN.sum(-1, dtype=torch.int32)
    places = torch.argsort(chosen_BNN.int(), dim=-1, descending=True, stable=True).int()
    return numbers[:, None], places[:, None]
