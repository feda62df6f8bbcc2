"""Small parts: LayerNorm and RMSNorm, the embedding and its shortcut."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from overnight.model.fused import RMS_EPSILON, rms_norm, weighted_sum
from overnight.model.model_config import ModelConfig


def unchanged(x: Tensor, *_others: object) -> Tensor:
    """Returns `x`: stands for a part that is switched off."""
    return x


def build_norm(config: ModelConfig, channels: int) -> nn.Module:
    """The normalization of `config` for vectors of `channels`."""
    if config.normalization == "rms":
        return nn.RMSNorm(channels, eps=RMS_EPSILON) if config.norm_gains else PlainRmsNorm()
    return nn.LayerNorm(channels, elementwise_affine=config.norm_gains, bias=config.biases)


class PlainRmsNorm(nn.Module):
    """RMSNorm without gains: no parameters."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C), float32."""
        return rms_norm(x)


class EmbeddingShortcut(nn.Module):
    """A block reads a learned mix of the residual stream and the embedding (modded-nanogpt, 2024-11-06)."""

    def __init__(self) -> None:
        super().__init__()
        self.stream_gain, self.embedding_gain = (nn.Parameter(torch.zeros(1)) for _ in range(2))

    def forward(self, x_BTC: Tensor, embedding_BTC: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        return weighted_sum(x_BTC, embedding_BTC, self.stream_gain, self.embedding_gain)


def zero_embedding(rows: int, channels: int) -> nn.Embedding:
    """An embedding of zeros, which `initialize` overwrites.

    nn.Embedding(rows, channels) would draw weights; on the meta device this draw alone costs two seconds of
    imports.
    """
    zeros = torch.zeros(rows, channels)
    embedding: nn.Embedding = nn.Embedding.from_pretrained(zeros, freeze=False)  # type: ignore[no-untyped-call]
    return embedding
