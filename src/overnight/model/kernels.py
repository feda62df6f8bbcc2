"""Attention kernels, chosen by name: blocks on a CPU; documents by a mask, one by one, or by flex_attention.

An end-of-text id begins each document, so the ids alone say where one ends and the next begins. What precedes
the first such id of a row is the rest of a document that began in an earlier row.

Shapes: B rows, T positions, S positions of keys, H heads, D channels a head, N rows times heads.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

NO_MASKS_IN_TRAINING = "with a mask cuDNN's backward pass gives NaN at some lengths (pytorch #196678)"

CausalKernel = Literal["fused", "without-cudnn", "blocks", "math"]
"""fused: torch's choice; without-cudnn: torch's choice without cuDNN; math: the unfused formula."""
DocumentKernel = Literal["mask", "efficient-mask", "one-by-one", "flex", "compiled-flex"]
"""How attention within documents is computed; `mask` works everywhere."""

WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def allowed_backends(kernel: CausalKernel) -> AbstractContextManager[None]:
    """Context manager: scaled_dot_product_attention uses only the backends that `kernel` allows."""
    if kernel == "math":
        return sdpa_kernel([SDPBackend.MATH])
    return sdpa_kernel(WITHOUT_CUDNN) if kernel == "without-cudnn" else nullcontext()


class Visible(NamedTuple):
    """Which keys a query attends to, besides causality."""

    mask: Tensor | None
    """Of a cache: boolean, broadcastable to (B, H, T, S)."""
    document_ids: Tensor | None
    """Only keys of the same document, (B, T)."""
    window: int | None = None
    """Number of newest positions whose keys are visible, the query's own included."""
    positions: Tensor | None = None
    """Of the queries, (T,) or (B, T), where they are not their indices."""


def attend(
    q_BHTD: Tensor,
    k_BHSD: Tensor,
    v_BHSD: Tensor,
    visible: Visible,
    kernels: tuple[CausalKernel, DocumentKernel],
    dropout_p: float,
) -> Tensor:
    """Attention of T queries over the newest S keys that are visible: (B, H, T, D)."""
    mask, document_BT, window, _ = visible
    kernel, document_kernel = kernels
    assert window is None, "windows.attend_in_window has windows"
    assert mask is None or not torch.is_grad_enabled(), NO_MASKS_IN_TRAINING
    assert mask is None or document_BT is None, "a cache holds one document"
    with allowed_backends(kernel):
        if document_BT is None:
            return attend_causal(q_BHTD, k_BHSD, v_BHSD, mask, kernel, dropout_p)
        # Evaluation uses the mask, so that it does not depend on the kernel used in training.
        chosen = document_kernel if torch.is_grad_enabled() else "mask"
        return attend_within_documents(q_BHTD, k_BHSD, v_BHSD, document_BT, chosen, dropout_p)


def attend_causal(
    q_BHTD: Tensor,
    k_BHSD: Tensor,
    v_BHSD: Tensor,
    mask: Tensor | None,
    kernel: CausalKernel,
    dropout_p: float,
) -> Tensor:
    """Attention of T queries over S keys, (B, H, T, D). Without a mask it is causal, and T is S or 1."""
    is_causal = mask is None and q_BHTD.shape[2] > 1
    attend = attend_in_blocks if kernel == "blocks" else F.scaled_dot_product_attention
    return attend(q_BHTD, k_BHSD, v_BHSD, attn_mask=mask, dropout_p=dropout_p, is_causal=is_causal)


def attend_within_documents(
    q_BHTD: Tensor,
    k_BHTD: Tensor,
    v_BHTD: Tensor,
    document_BT: Tensor,
    kernel: DocumentKernel,
    dropout_p: float,
) -> Tensor:
    """Causal attention within documents, (B, H, T, D). Kernels other than the masks have no dropout."""
    if kernel == "flex":
        return attend_in_flex(q_BHTD, k_BHTD, v_BHTD, document_BT)
    if kernel == "compiled-flex":
        return _compile_flex()(q_BHTD, k_BHTD, v_BHTD, document_BT)
    if kernel == "one-by-one":
        return attend_one_by_one(q_BHTD, k_BHTD, v_BHTD, document_BT)
    if kernel == "efficient-mask":
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            return attend_with_mask(q_BHTD, k_BHTD, v_BHTD, document_BT, dropout_p=dropout_p)
    return attend_with_mask(q_BHTD, k_BHTD, v_BHTD, document_BT, dropout_p=dropout_p)


# ---------------------------------------------------------------- documents, by a mask


class Documents(NamedTuple):
    """The document of every position of a batch, and the position within it; int64."""

    document_ids: Tensor
    """Number of the document within its row, (B, T): it increases by one with each document."""
    positions: Tensor
    """Position within the document, (B, T), from 0; a continued document counts from the row's start."""


def find_documents(ids_BT: Tensor, end_of_text: int) -> Documents:
    """The documents of `ids_BT`; each begins with the id `end_of_text`."""
    begins_BT = ids_BT == end_of_text
    index_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
    start_BT = torch.where(begins_BT, index_T, 0).cummax(1).values
    return Documents(begins_BT.cumsum(1), index_T - start_BT)


def attend_with_mask(
    q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, document_BT: Tensor, *, dropout_p: float = 0.0
) -> Tensor:
    """Causal attention within documents by a mask (B, 1, T, T) that all heads share.

    Works everywhere and computes the full T x T scores. Not for training with cuDNN's kernel.
    """
    # torch.compile can't trace the query of enabled backends.
    if q_BHTD.is_cuda and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        assert not torch.backends.cuda.cudnn_sdp_enabled(), NO_MASKS_IN_TRAINING  # type: ignore[no-untyped-call]
    same_BTT = document_BT[:, :, None] == document_BT[:, None, :]
    return F.scaled_dot_product_attention(
        q_BHTD, k_BHTD, v_BHTD, attn_mask=same_BTT.tril()[:, None], dropout_p=dropout_p
    )


# ---------------------------------------------------------------- documents on a CPU, one after the other


def attend_one_by_one(q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, document_BT: Tensor) -> Tensor:
    """Causal attention within documents by torch's CPU kernel, called for each document, without a mask."""
    mixed_BTHD: Tensor = _attend(q_BHTD, k_BHTD, v_BHTD, document_BT)[0]
    return mixed_BTHD.transpose(1, 2)


def _document_slices(document_BT: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """The slice of each document in a tensor (B, H, T, ...)."""
    for row, document_T in enumerate(document_BT):
        begins = (torch.nonzero(document_T.diff()).flatten() + 1).tolist()
        for start, end in pairwise([0, *begins, len(document_T)]):
            yield slice(row, row + 1), slice(None), slice(start, end)


@torch.library.custom_op("overnight::attend_documents", mutates_args=())
def _attend(q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, document_BT: Tensor) -> tuple[Tensor, Tensor]:
    """The mixed values (B, T, H, D), and the logarithm of each softmax's sum (B, H, T) in float32."""
    mixed_BTHD, sums_BHT = _attend_shapes(q_BHTD)
    for at in _document_slices(document_BT):
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
    for at in _document_slices(document_BT):
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


# ---------------------------------------------------------------- blocks of queries on a CPU, in bfloat16


QUERIES = 128  # of a block


def attend_in_blocks(
    q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, *, is_causal: bool = False, **others: Any
) -> Tensor:
    """F.scaled_dot_product_attention as bfloat16 matrix products, one block of queries after the other.

    Used for causal training attention in bfloat16 on a CPU without dropout; any other call goes to torch's
    kernel, so that an evaluation does not depend on how a model was trained. Scores are rounded to bfloat16
    before their softmax, as unfused attention under autocast rounds them.
    """
    is_supported = q_BHTD.dtype is torch.bfloat16 and q_BHTD.device.type == "cpu"
    in_blocks = is_supported and is_causal and torch.is_grad_enabled()
    if not in_blocks or others.get("dropout_p") or others.get("attn_mask") is not None:
        return F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, is_causal=is_causal, **others)
    scaled_BHTD = q_BHTD * q_BHTD.shape[-1] ** -0.5
    q_NTD, k_NTD, v_NTD = (part.flatten(0, 1).contiguous() for part in (scaled_BHTD, k_BHTD, v_BHTD))
    mixed_NTD: Tensor = _block_attention(q_NTD, k_NTD, v_NTD)[0]
    return mixed_NTD.view(q_BHTD.shape)


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    """First query and end of each block."""
    return ((start, min(start + QUERIES, length)) for start in range(0, length, QUERIES))


def _count(rows: int, length: int) -> int:
    """Attention weights of all blocks."""
    return sum(rows * (end - start) * end for start, end in _blocks(length))


def _split(weights: Tensor, rows: int, length: int) -> Iterator[tuple[int, int, Tensor]]:
    """First query, end and weights (N, Q, S) of each block; the weights are views of one flat tensor."""
    for start, end in _blocks(length):
        before, shape = _count(rows, start), (rows, end - start, end)
        yield start, end, weights[before : before + math.prod(shape)].view(shape)


@torch.library.custom_op("overnight::attend_in_blocks", mutates_args=())
def _block_attention(q_NTD: Tensor, k_NTD: Tensor, v_NTD: Tensor) -> tuple[Tensor, Tensor]:
    """The mixed values (N, T, D), and all weights, flat. The queries are scaled already."""
    rows, length, _ = q_NTD.shape
    mixed_NTD, weights = torch.empty_like(q_NTD), q_NTD.new_empty(_count(rows, length))
    for start, end, weights_NQS in _split(weights, rows, length):
        scores_NQS = torch.bmm(q_NTD[:, start:end], k_NTD[:, :end].transpose(1, 2))
        scores_NQS[:, :, start:] += _causal_bias(end - start, scores_NQS.dtype)
        torch.softmax(scores_NQS, dim=-1, out=weights_NQS)
        mixed_NTD[:, start:end] = torch.bmm(weights_NQS, v_NTD[:, :end])
    return mixed_NTD, weights


def _causal_bias(queries: int, dtype: torch.dtype) -> Tensor:
    """The causal bias of a block on the diagonal: -inf above it, else 0."""
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
    for start, end, weights_NQS in _split(weights, rows, length):
        grad_NQD = grad_NTD[:, start:end]
        dv_NTD[:, :end] += torch.bmm(weights_NQS.transpose(1, 2), grad_NQD)
        grad_NQS = torch.bmm(grad_NQD, v_NTD[:, :end].transpose(1, 2))
        dscores_NQS = torch._softmax_backward_data(grad_NQS, weights_NQS, -1, weights_NQS.dtype)
        dq_NTD[:, start:end] = torch.bmm(dscores_NQS, k_NTD[:, :end])
        dk_NTD[:, :end] += torch.bmm(dscores_NQS.transpose(1, 2), q_NTD[:, start:end])
    return dq_NTD, dk_NTD.to(k_NTD.dtype), dv_NTD.to(v_NTD.dtype)


@_block_attention_backward.register_fake
def _block_attention_backward_shapes(
    _grad: Tensor, q_NTD: Tensor, *_others: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
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


# ---------------------------------------------------------------- documents on a GPU, by flex_attention


BLOCK = 128  # positions: flex_attention's own block
LEAST_CHANNELS = 16  # of a head, that its kernel multiplies


def attend_in_flex(q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, document_BT: Tensor) -> Tensor:
    """Causal attention within documents by flex_attention. Must be compiled: eager, it writes T x T scores.

    Every layer builds the same mask; the compiler removes the copies.
    """
    mixed_BHTD: Tensor = flex_attention(q_BHTD, k_BHTD, v_BHTD, block_mask=build_block_mask(document_BT))
    return mixed_BHTD


@functools.cache
def _compile_flex() -> Callable[..., Tensor]:
    """`attend_in_flex` compiled separately, for an eager step; compiled on first use."""
    return torch.compile(attend_in_flex, dynamic=False, fullgraph=True)


def build_block_mask(document_BT: Tensor) -> BlockMask:
    """The blocks of keys that a block of queries attends to, fully or in part; the same for all heads.

    Document ids rise along a row, so the first and last id of a block suffice: no T x T tensor is formed.
    """
    B, T = document_BT.shape
    padding = -T % BLOCK
    # T + 1 is no document's id: a padded block is never full, and nothing attends to padding.
    padded_BT = F.pad(document_BT, (0, padding), value=T + 1)
    blocks_BNP = padded_BT.view(B, -1, BLOCK)
    first_BN, last_BN = blocks_BNP[..., 0], blocks_BNP[..., -1]
    index_N = torch.arange(blocks_BNP.shape[1], device=document_BT.device)
    before_NN = index_N[:, None] > index_N  # queries in rows, keys in columns
    full_BNN = before_NN & (first_BN[:, None, :] == last_BN[:, :, None])
    some_BNN = before_NN & (last_BN[:, None, :] >= first_BN[:, :, None])
    partial_BNN = (some_BNN & ~full_BNN) | (index_N[:, None] == index_N)

    def is_visible(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (padded_BT[row, query] == padded_BT[row, key])

    return BlockMask.from_kv_blocks(
        *_listed(partial_BNN), *_listed(full_BNN), BLOCK_SIZE=BLOCK, mask_mod=is_visible, seq_lengths=(T, T)
    )


def _listed(chosen_BNN: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys are chosen (B, 1, N), and their indices, first in (B, 1, N, N)."""
    numbers = chosen_BNN.sum(-1, dtype=torch.int32)
    indices = torch.argsort(chosen_BNN.int(), dim=-1, descending=True, stable=True).int()
    return numbers[:, None], indices[:, None]
