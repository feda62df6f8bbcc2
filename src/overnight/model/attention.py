"""Attention beyond GPT-2's: grouped queries, rotary positions, QK-norm, windows, value embeddings, MLA.

The part is chosen when a block is built; see `model_config.ModelConfig`. GPT-2's own attention is in `gpt`.

Shapes: B rows, T positions of this call, S positions of keys, C channels, H heads, D channels a head; K heads
of keys and values, N heads of all kinds, R channels of the latent vector, P rotated channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from overnight.model.fused import rms_norm
from overnight.model.inputs import BlockInputs
from overnight.model.kernels import CausalKernel, DocumentKernel, Visible, attend
from overnight.model.model_config import VALUE_GATE_CHANNELS, ModelConfig
from overnight.model.norms import build_norm, unchanged, zero_embedding
from overnight.model.positions import rotate
from overnight.model.windows import attend_in_window


class HeadMixing(nn.Module):
    """Values of earlier positions mixed by queries and keys, within the block's window, then projected."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.window = config.window(layer)
        self.c_proj: nn.Module
        self.kernel: CausalKernel = "fused"
        self.document_kernel: DocumentKernel = "mask"

    def mix(
        self, q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, mask: Tensor | None, inputs: BlockInputs
    ) -> Tensor:
        """(B, H, T, D) -> the output of attention (B, T, C)."""
        dropout = self.dropout if self.training else 0.0
        visible = Visible(mask, inputs.document_BT, self.window, inputs.positions)
        if self.window is not None:
            mixed_BHTD = attend_in_window(q_BHTD, k_BHSD, v_BHSD, visible, self.kernel, dropout)
        else:
            kernels = self.kernel, self.document_kernel
            mixed_BHTD = attend(q_BHTD, k_BHSD, v_BHSD, visible, kernels, dropout)
        mixed_BTC = mixed_BHTD.transpose(1, 2).flatten(2)
        return F.dropout(self.c_proj(mixed_BTC), self.dropout, self.training)


class GroupedAttention(HeadMixing):
    """Groups of query heads share a head of keys and values (Ainslie et al. 2023, arXiv 2305.13245)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.layer = layer
        self.heads, self.kv_heads, self.D = config.n_head, config.kv_heads, config.head_channels
        rows = config.n_embd + 2 * self.kv_heads * self.D
        self.c_attn = nn.Linear(config.n_embd, rows, bias=config.biases)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.biases)
        self.normalize: Callable[..., Tensor] = rms_norm if config.qk_norm else unchanged
        self.rotate: Callable[..., Tensor] = rotate if config.positions == "rotary" else unchanged
        has_embedding = config.has_value_embedding(layer)
        self.value_embedding = ValueEmbedding(config) if has_embedding else NoValueEmbedding()

    def forward(self, x_BTC: Tensor, inputs: BlockInputs) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        heads = [self.heads, self.kv_heads]
        qkv_BNTD = self.c_attn(x_BTC).unflatten(2, (-1, self.D)).transpose(1, 2)
        qk_BNTD, v_BKTD = torch.split(qkv_BNTD, [sum(heads), self.kv_heads], dim=1)
        v_BKSD = self.value_embedding(v_BKTD, x_BTC, inputs.ids_BT)
        # Normalized before they are rotated: YaRN's rotation has a magnitude.
        qk_BNTD = self.rotate(self.normalize(qk_BNTD), inputs.rotation).to(v_BKTD.dtype)
        q_BHTD, k_BKSD = torch.split(qk_BNTD, heads, dim=1)
        mask = None
        if inputs.cache is not None:
            k_BKSD, v_BKSD, mask = inputs.cache.append(self.layer, k_BKSD, v_BKSD)
        k_BHSD, v_BHSD = (share_heads(part, self.heads) for part in (k_BKSD, v_BKSD))
        return self.mix(q_BHTD, k_BHSD, v_BHSD, mask, inputs)


def share_heads(x_BKSD: Tensor, heads: int) -> Tensor:
    """Each head of keys or values repeated for its group of query heads: (B, H, S, D)."""
    B, K, S, D = x_BKSD.shape
    if heads == K:
        return x_BKSD
    return x_BKSD[:, :, None].expand(B, K, heads // K, S, D).reshape(B, heads, S, D)


class ValueEmbedding(nn.Module):
    """Adds an embedding of the token to the values, multiplied by a gate for each head.

    As in nanochat: the gate depends on the first channels of the normalized stream. It is initialized to 1.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        channels = config.kv_heads * config.head_channels
        self.table = zero_embedding(config.vocabulary, channels)
        self.read = min(VALUE_GATE_CHANNELS, config.n_embd)
        self.gate = nn.Linear(self.read, config.kv_heads, bias=False)

    def forward(self, v_BKTD: Tensor, x_BTC: Tensor, ids_BT: Tensor) -> Tensor:
        """(B, K, T, D) -> (B, K, T, D)."""
        K, D = v_BKTD.shape[1], v_BKTD.shape[3]
        gate_BKT1 = 2 * torch.sigmoid(self.gate(x_BTC[..., : self.read]).float()).transpose(1, 2)[..., None]
        added_BKTD = self.table(ids_BT).unflatten(2, (K, D)).transpose(1, 2)
        summed_BKTD: Tensor = v_BKTD + gate_BKT1 * added_BKTD
        return summed_BKTD.to(v_BKTD.dtype)


class NoValueEmbedding(nn.Module):
    """Returns the values unchanged."""

    def forward(self, v_BKTD: Tensor, _x_BTC: Tensor, _ids_BT: Tensor) -> Tensor:
        """(B, K, T, D) -> the same."""
        return v_BKTD


class LatentAttention(HeadMixing):
    """Keys and values of all heads are made from one short vector a position (DeepSeek-V2, arXiv 2405.04434).

    A head has P rotated channels, whose key is shared by all heads, and D - P others. The cache holds R + P
    numbers a position. A token after the prompt is computed in the latent space: the matrix that would expand
    every cached vector is applied to the query and to the result instead.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        assert config.latent_rank is not None, "heads of their own are GroupedAttention"
        self.layer, self.heads, self.D = layer, config.n_head, config.head_channels
        self.P, self.R = config.rotary_channels, config.latent_rank
        self.c_query = nn.Linear(config.n_embd, config.n_embd, bias=config.biases)
        self.c_latent = nn.Linear(config.n_embd, self.R + self.P, bias=config.biases)
        self.ln_latent = build_norm(config, self.R)
        self.c_expand = nn.Parameter(torch.zeros(self.heads * (2 * self.D - self.P), self.R))
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.biases)

    def forward(self, x_BTC: Tensor, inputs: BlockInputs) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        assert inputs.rotation is not None, "ModelConfig.problems asks for rotary positions"
        content, P = self.D - self.P, self.P
        q_BHTD = self.c_query(x_BTC).unflatten(2, (self.heads, self.D)).transpose(1, 2)
        latent_BTR, key_BTP = self.c_latent(x_BTC).split((self.R, P), dim=2)
        latent_B1SR = self.ln_latent(latent_BTR.float())[:, None].to(q_BHTD.dtype)
        key_B1SP = rotate(key_BTP[:, None], inputs.rotation).to(q_BHTD.dtype)
        q_BHTP = rotate(q_BHTD[..., content:], inputs.rotation).to(q_BHTD.dtype)
        mask = None
        if inputs.cache is not None:
            key_B1SP, latent_B1SR, mask = inputs.cache.append(self.layer, key_B1SP, latent_B1SR)
            if x_BTC.shape[1] == 1:
                return self._absorbed(q_BHTD[..., :content], q_BHTP, key_B1SP, latent_B1SR, mask)
        expanded_BSE: Tensor = F.linear(latent_B1SR[:, 0], self.c_expand)
        B, S, _ = expanded_BSE.shape
        expanded_BHSE = expanded_BSE.view(B, S, self.heads, -1).transpose(1, 2)
        k_BHSN, v_BHSD = expanded_BHSE[..., :content], expanded_BHSE[..., content:]
        k_BHSD = torch.cat([k_BHSN, key_B1SP.expand(-1, self.heads, -1, -1).to(k_BHSN.dtype)], dim=3)
        q_BHTD = torch.cat([q_BHTD[..., :content], q_BHTP], dim=3)
        return self.mix(q_BHTD, k_BHSD, v_BHSD, mask, inputs)

    def _absorbed(
        self, q_BHTN: Tensor, q_BHTP: Tensor, key_B1SP: Tensor, latent_B1SR: Tensor, mask: Tensor | None
    ) -> Tensor:
        """One query a row over the cached vectors themselves; (B, 1, C)."""
        by_head_HER = self.c_expand.view(self.heads, -1, self.R).to(q_BHTN.dtype)
        content = self.D - self.P
        to_key_HNR, to_value_HDR = by_head_HER[:, :content], by_head_HER[:, content:]
        q_BHTX = torch.cat([q_BHTN @ to_key_HNR, q_BHTP], dim=3)
        k_B1SX = torch.cat([latent_B1SR, key_B1SP], dim=3)
        if self.window is not None and k_B1SX.shape[2] > self.window:
            k_B1SX, latent_B1SR = k_B1SX[:, :, -self.window :], latent_B1SR[:, :, -self.window :]
            mask = None if mask is None else mask[..., -self.window :]
        scores_BHTS = (q_BHTX @ k_B1SX.transpose(2, 3)).float() * self.D**-0.5
        if mask is not None:
            scores_BHTS = scores_BHTS.masked_fill(~mask, -torch.inf)
        mixed_BHTR = scores_BHTS.softmax(dim=3).to(latent_B1SR.dtype) @ latent_B1SR
        mixed_BHTD = mixed_BHTR @ to_value_HDR.transpose(1, 2)
        projected: Tensor = self.c_proj(mixed_BHTD.transpose(1, 2).flatten(2))
        return projected
