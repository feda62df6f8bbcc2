"""Attention within a window: on a CPU in blocks of queries, which read only the keys that they see.

Shapes: B rows, T positions, S positions of keys, H heads, D channels a head, N rows times heads; Q queries of
a block, K keys that it reads.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from overnight.model.kernels import QUERIES, WITHOUT_CUDNN, CausalKernel, Visible


def attend_in_window(
    q_BHTD: Tensor,
    k_BHSD: Tensor,
    v_BHSD: Tensor,
    visible: Visible,
    kernel: CausalKernel,
    dropout_p: float,
) -> Tensor:
    """As `kernels.attend`, with `visible.window`: every query reads its own key and the newest before it."""
    window, T = visible.window, q_BHTD.shape[2]
    assert window is not None, "without a window, attention is kernels.attend"
    if T == 1 and dropout_p == 0:  # of a cache, whose last column is the query's own
        k_BHSD, v_BHSD = k_BHSD[:, :, -window:], v_BHSD[:, :, -window:]
        mask = None if visible.mask is None else visible.mask[..., -window:]
        return F.scaled_dot_product_attention(q_BHTD, k_BHSD, v_BHSD, attn_mask=mask)
    # Within a document positions differ as columns do, so only those of a cache are needed.
    are_columns = visible.mask is None and (visible.positions is None or visible.document_ids is not None)
    if q_BHTD.device.type != "cpu" or not are_columns:
        seen = _seen_keys(visible, k_BHSD, T)
        with sdpa_kernel(WITHOUT_CUDNN):
            return F.scaled_dot_product_attention(q_BHTD, k_BHSD, v_BHSD, attn_mask=seen, dropout_p=dropout_p)
    if kernel == "blocks" and q_BHTD.dtype is torch.bfloat16 and torch.is_grad_enabled() and dropout_p == 0:
        scaled_BHTD = q_BHTD * q_BHTD.shape[-1] ** -0.5
        q_NTD, k_NTD, v_NTD = (part.flatten(0, 1).contiguous() for part in (scaled_BHTD, k_BHSD, v_BHSD))
        mixed_NTD = _attend_by_products(q_NTD, k_NTD, v_NTD, visible.document_ids, window)
        return mixed_NTD.view(q_BHTD.shape)
    return _attend_block_by_block(q_BHTD, k_BHSD, v_BHSD, visible.document_ids, (window, dropout_p))


def _seen_keys(visible: Visible, k_BHSD: Tensor, queries: int) -> Tensor:
    """The mask of the full square, boolean, broadcastable to (B, H, T, S)."""
    mask, document_BT, window, positions = visible
    S = k_BHSD.shape[2]
    if positions is None or queries < S:  # of cached keys the differences of positions are those of columns
        positions = torch.arange(S, device=k_BHSD.device)
    distance = positions[..., -queries:, None] - positions[..., None, :]
    seen = (distance >= 0) & (distance < (window or S))
    if seen.dim() == 3:
        seen = seen[:, None]
    if mask is not None:
        seen = seen & mask
    if document_BT is not None:
        seen = seen & (document_BT[:, None, :, None] == document_BT[:, None, None, :])
    return seen


def block_spans(length: int, window: int) -> list[tuple[int, int, int]]:
    """First key, first query and end of each block of queries."""
    starts = range(0, length, QUERIES)
    return [(max(0, start - window + 1), start, min(start + QUERIES, length)) for start in starts]


def _seen_in_block(span: tuple[int, int, int], document_BT: Tensor | None, window: int) -> Tensor:
    """The keys that each query of a block sees: boolean, (Q, K), with documents (B, 1, Q, K)."""
    first, start, end = span
    distance_QK = torch.arange(start, end)[:, None] - torch.arange(first, end)
    seen = (distance_QK >= 0) & (distance_QK < window)
    if document_BT is not None:
        same_BQK = document_BT[:, start:end, None] == document_BT[:, None, first:end]
        seen = seen & same_BQK[:, None]
    return seen


def _attend_block_by_block(
    q_BHTD: Tensor,
    k_BHSD: Tensor,
    v_BHSD: Tensor,
    document_BT: Tensor | None,
    limits: tuple[int, float],
) -> Tensor:
    """By torch's kernel; `limits` are the window and the probability of dropout."""
    window, dropout_p = limits
    mixed = []
    for span in block_spans(q_BHTD.shape[2], window):
        first, start, end = span
        mixed.append(
            F.scaled_dot_product_attention(
                q_BHTD[:, :, start:end],
                k_BHSD[:, :, first:end],
                v_BHSD[:, :, first:end],
                attn_mask=_seen_in_block(span, document_BT, window),
                dropout_p=dropout_p,
            )
        )
    return torch.cat(mixed, dim=2)


def _attend_by_products(
    q_NTD: Tensor, k_NTD: Tensor, v_NTD: Tensor, document_BT: Tensor | None, window: int
) -> Tensor:
    """By matrix products in bfloat16, as `kernels.attend_in_blocks`. The queries are scaled already."""
    mixed = []
    for span in block_spans(q_NTD.shape[1], window):
        first, start, end = span
        seen = _seen_in_block(span, document_BT, window)
        if document_BT is not None:  # the same for all heads of a row
            seen = seen.expand(-1, len(q_NTD) // len(document_BT), -1, -1).flatten(0, 1)
        bias = torch.zeros(seen.shape, dtype=q_NTD.dtype).masked_fill(~seen, -math.inf)
        scores_NQK = torch.baddbmm(bias, q_NTD[:, start:end], k_NTD[:, first:end].transpose(1, 2))
        mixed.append(torch.bmm(scores_NQK.softmax(dim=2), v_NTD[:, first:end]))
    return torch.cat(mixed, dim=1)
