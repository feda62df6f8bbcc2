"""Causal self-attention, and the protocol by which a generator lends it a memory.

Shapes: B rows, T positions of this call, S positions in all, C channels, H heads, D channels a head.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from overnight.model.config import ModelConfig
from overnight.model.documents import NO_MASKS_IN_TRAINING, attend_with_mask


class Cache(Protocol):
    """Keys and values of earlier positions. The generator owns, fills and resets it."""

    def positions(self, length: int) -> Tensor:
        """Positions of the next `length` ids, int64 (T,) or, where rows differ, (B, T)."""
        ...

    def append(self, layer: int, k_BHTD: Tensor, v_BHTD: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Remember these; return all keys and values so far (B, H, S, D) and who may look at whom.

        The last is a boolean mask broadcastable to (B, H, T, S), or None: nothing was cached before
        and attention is plainly causal, or T is 1 and everything may be seen.
        """
        ...


class CausalSelfAttention(nn.Module):
    """Every position looks at itself and what stands before it."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.attend = F.scaled_dot_product_attention
        self.attend_documents = attend_with_mask

    def forward(self, x_BTC: Tensor, cache: Cache | None = None, document_BT: Tensor | None = None) -> Tensor:
        """(B, T, C) -> (B, T, C). With a cache, earlier positions are looked at as well.

        With documents, positions look only at those of their own document; of a model that is judged with
        torch's kernel, whatever it is trained with.
        """
        B, T, C = x_BTC.shape
        q_BHTD, k_BHSD, v_BHSD = (
            part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
            for part in self.c_attn(x_BTC).split(C, dim=2)
        )
        dropout = self.dropout if self.training else 0.0
        mask = None
        if cache is not None:
            k_BHSD, v_BHSD, mask = cache.append(self.layer, k_BHSD, v_BHSD)
        assert mask is None or not torch.is_grad_enabled(), NO_MASKS_IN_TRAINING
        if document_BT is None:
            mixed_BHTD = self.attend(
                q_BHTD,
                k_BHSD,
                v_BHSD,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None and T > 1,
            )
        else:
            assert cache is None, "a memory holds one document"
            attend = self.attend_documents if torch.is_grad_enabled() else attend_with_mask
            mixed_BHTD = attend(q_BHTD, k_BHSD, v_BHSD, document_BT, dropout_p=dropout)
        mixed_BTC = mixed_BHTD.transpose(1, 2).reshape(B, T, C)
        return F.dropout(self.c_proj(mixed_BTC), self.dropout, self.training)
