"""The first weights of the parts that GPT-2 does not have."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from overnight.model.model_config import ModelConfig, Shape

STANDARD_DEVIATION = 0.02  # GPT-2's released code, model.py: initializer_range of every matrix
HEAD_DEVIATION = 0.001  # nanochat: the first logits are near 0, and the first loss is ln V
EMBEDDING_SHARE = 0.1  # nanochat: of the embedding in the stream that a block reads


def adapt_weight(name: str, weight: Tensor, config: ModelConfig) -> Tensor:
    """A weight as GPT-2 draws it, changed where a switch says so."""
    if config.zero_projections and name.endswith("c_proj.weight"):
        return torch.zeros_like(weight)
    if config.embedding_norm and not config.tied_head and name == "wte.weight":
        return weight / STANDARD_DEVIATION  # a norm follows; updates should be small beside the weights
    return weight


def draw_weight(name: str, shape: Shape, config: ModelConfig, seed: int) -> Tensor:
    """A weight that GPT-2 of the same sizes has not, from its own generator: a function of seed and name.

    Matrices as GPT-2's; value embeddings N(0, 1 / sqrt(n_embd)), which is about the size of the values; gains
    1; gates, biases and balance 0.
    """
    if name.endswith((".bias", "balance", "gate.weight")):
        return torch.zeros(shape)
    if name.endswith("embedding_gain"):
        return torch.full(shape, EMBEDDING_SHARE)
    if name.endswith("stream_gain") or len(shape) == 1:
        return torch.ones(shape)
    is_projection = name.endswith(("c_proj", "c_proj.weight"))
    if is_projection and config.zero_projections:
        return torch.zeros(shape)
    deviation = STANDARD_DEVIATION
    if is_projection:
        deviation /= (2 * config.n_layer) ** 0.5
    elif name == "lm_head.weight":
        deviation = HEAD_DEVIATION
    elif name.endswith("value_embedding.table.weight"):
        deviation = config.n_embd**-0.5
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(shape).normal_(0.0, deviation, generator=generator)
