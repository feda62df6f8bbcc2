"""Small parts: LayerNorm and RMSNorm, the embedding and its shortcut, a bound on logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from overnight.model.model_config import ModelConfig

RMS_EPSILON = 1e-6  # added to the mean of squares, as Transformers does


def unchanged(x: Tensor, *_others: object) -> Tensor:
    """The part that is switched off."""
    return x


def build_norm(config: ModelConfig, channels: int) -> nn.Module:
    """The normalization of `config` for vectors of `channels`."""
    if config.normalization == "rms":
        return nn.RMSNorm(channels, eps=RMS_EPSILON, elementwise_affine=config.norm_gains)
    return nn.LayerNorm(channels, elementwise_affine=config.norm_gains, bias=config.biases)


def rms_norm(x: Tensor, *_others: object) -> Tensor:
    """`x` divided by the root of the mean of its squares over the last dimension, float32."""
    return F.rms_norm(x.float(), x.shape[-1:], eps=RMS_EPSILON)


class EmbeddingShortcut(nn.Module):
    """A block reads a learned mix of the residual stream and the embedding (modded-nanogpt, 2024-11-06)."""

    def __init__(self) -> None:
        super().__init__()
        self.stream_gain, self.embedding_gain = (nn.Parameter(torch.zeros(1)) for _ in range(2))

    def forward(self, x_BTC: Tensor, embedding_BTC: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        return self.stream_gain * x_BTC + self.embedding_gain * embedding_BTC


def soft_cap(logits: Tensor, cap: float | None) -> Tensor:
    """Logits bounded to the open interval from -cap to cap, in float32; unchanged without a cap."""
    return logits if cap is None else cap * torch.tanh(logits.float() / cap)


def zero_embedding(rows: int, channels: int) -> nn.Embedding:
    """An embedding of zeros, which `initialize` overwrites.

    nn.Embedding(rows, channels) would draw weights; on the meta device this draw alone costs two seconds of
    imports.
    """
    zeros = torch.zeros(rows, channels)
    embedding: nn.Embedding = nn.Embedding.from_pretrained(zeros, freeze=False)  # type: ignore[no-untyped-call]
    return embedding
