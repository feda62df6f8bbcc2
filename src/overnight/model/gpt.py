"""True GPT-2, in reading order: attention, feed-forward, block, model, initialisation.

The configuration is `model_config.ModelConfig`; faster attention kernels are in `kernels`, chosen by name.
A switch replaces a part when the model is built: see `attention`, `feed_forward`, `norms`, `positions`.

Shapes: B rows, T positions of this call, S positions of keys, C channels, H heads, D channels a head, V ids.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from overnight.model.attention import GroupedAttention, LatentAttention
from overnight.model.feed_forward import FeedForward, MixtureOfExperts
from overnight.model.fused import soft_cap
from overnight.model.initialization import STANDARD_DEVIATION, adapt_weight, draw_weight
from overnight.model.inputs import BlockInputs, Cache
from overnight.model.kernels import CausalKernel, DocumentKernel, Documents, Visible, attend
from overnight.model.model_config import PADDED, VOCABULARY_MULTIPLE, ModelConfig, round_up, weight_shapes
from overnight.model.norms import EmbeddingShortcut, build_norm, unchanged, zero_embedding
from overnight.model.positions import LearnedPositions, RotaryPositions


class CausalSelfAttention(nn.Module):
    """Every position attends to itself and to earlier positions."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.biases)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.biases)
        self.kernel: CausalKernel = "fused"
        self.document_kernel: DocumentKernel = "mask"

    def forward(self, x_BTC: Tensor, inputs: BlockInputs) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        B, T, C = x_BTC.shape
        q_BHTD, k_BHSD, v_BHSD = (
            part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
            for part in self.c_attn(x_BTC).split(C, dim=2)
        )
        mask = None
        if inputs.cache is not None:
            k_BHSD, v_BHSD, mask = inputs.cache.append(self.layer, k_BHSD, v_BHSD)
        visible, kernels = Visible(mask, inputs.document_BT), (self.kernel, self.document_kernel)
        dropout = self.dropout if self.training else 0.0
        mixed_BHTD = attend(q_BHTD, k_BHSD, v_BHSD, visible, kernels, dropout)
        mixed_BTC = mixed_BHTD.transpose(1, 2).reshape(B, T, C)
        return F.dropout(self.c_proj(mixed_BTC), self.dropout, self.training)


class MLP(nn.Module):
    """The feed-forward part of a block, with a hidden width of 4 C unless the configuration says another."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.hidden_width, bias=config.biases)
        self.c_proj = nn.Linear(config.hidden_width, config.n_embd, bias=config.biases)
        self.dropout = config.dropout

    def forward(self, x_BTC: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        wide = F.gelu(self.c_fc(x_BTC), approximate="tanh")
        return F.dropout(self.c_proj(wide), self.dropout, self.training)


class Block(nn.Module):
    """Attention, then feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.shortcut = EmbeddingShortcut() if config.embedding_shortcut else unchanged
        self.ln_1 = build_norm(config, config.n_embd)
        self.attn = _build_attention(config, layer)
        self.ln_2 = build_norm(config, config.n_embd)
        self.mlp = _build_feed_forward(config)

    def forward(self, x_BTC: Tensor, inputs: BlockInputs) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x_BTC = self.shortcut(x_BTC, inputs.embedding_BTC)
        x_BTC = x_BTC + self.attn(self.ln_1(x_BTC), inputs)
        return x_BTC + self.mlp(self.ln_2(x_BTC))  # type: ignore[no-any-return]  # as in GPT.trunk


def _build_attention(config: ModelConfig, layer: int) -> nn.Module:
    if config.latent_rank is not None:
        return LatentAttention(config, layer)
    is_gpt2 = config.positions == "learned" and config.kv_heads == config.n_head and not config.qk_norm
    if is_gpt2 and config.window(layer) is None and not config.has_value_embedding(layer):
        return CausalSelfAttention(config, layer)
    return GroupedAttention(config, layer)


def _build_feed_forward(config: ModelConfig) -> nn.Module:
    if config.n_expert:
        return MixtureOfExperts(config)
    return MLP(config) if config.activation == "gelu" else FeedForward(config)


class GPT(nn.Module):
    """ids (B, T) -> logits (B, T, V). `forward` is `head(trunk(ids))`, and either may be used alone.

    The embedding is padded to a multiple of 64 rows, so that its matrix products use whole tiles.
    Padding rows are zero, get no gradient and never leave the module: `head` returns exactly V columns and
    `weights` exactly V rows. The weights are initialised as GPT-2's, unless the module is built on the meta
    device. Raises ValueError for sizes that do not fit together, and without a vocabulary.
    """

    def __init__(
        self, config: ModelConfig, vocabulary_multiple: int = VOCABULARY_MULTIPLE, *, seed: int = 1337
    ) -> None:
        super().__init__()
        if problems := config.problems():
            raise ValueError("; ".join(problems))
        self.config = config
        self.vocab_size = config.vocabulary
        padded = round_up(self.vocab_size, vocabulary_multiple)
        self.wte = zero_embedding(padded, config.n_embd)
        self.wpe = LearnedPositions(config) if config.positions == "learned" else RotaryPositions(config)
        no_gains = replace(config, norm_gains=False)
        self.ln_e = build_norm(no_gains, config.n_embd) if config.embedding_norm else nn.Identity()
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = build_norm(config, config.n_embd)
        self.lm_head = self.wte if config.tied_head else zero_embedding(padded, config.n_embd)
        if not self.wte.weight.is_meta:
            initialize(self, seed)

    def forward(self, ids_BT: Tensor, documents: Documents | None = None) -> Tensor:
        """Logits (B, T, V) for the id after each position."""
        return self.head(self.trunk(ids_BT, documents=documents))

    def trunk(self, ids_BT: Tensor, cache: Cache | None = None, documents: Documents | None = None) -> Tensor:
        """Hidden states (B, T, C) after the final layer norm. Raises IndexError beyond the context.

        With `documents`, positions restart at 0 in each document, and attention stays within it.
        """
        T = ids_BT.shape[1]
        if self.config.context_length < T:
            raise IndexError(f"{T} positions do not fit context_length={self.config.context_length}")
        positions = document_BT = None
        if documents is not None:
            document_BT, positions = documents
        elif cache is not None:
            positions = cache.positions(T)
        x_BTC, rotation = self.wpe(self.wte(ids_BT), positions)
        x_BTC = F.dropout(self.ln_e(x_BTC), self.config.dropout, self.training)
        inputs = BlockInputs(ids_BT, cache, document_BT, rotation, x_BTC, positions)
        for block in self.h:
            x_BTC = block(x_BTC, inputs)
        return self.ln_f(x_BTC)  # type: ignore[no-any-return]  # nn.Module.__call__ is untyped

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., C) -> logits (..., V)."""
        logits = F.linear(hidden, self.lm_head.weight)[..., : self.vocab_size]
        return soft_cap(logits, self.config.logit_softcap)

    def weights(self) -> dict[str, Tensor]:
        """Every parameter by name, detached, without the vocabulary's padding: views into the model."""
        return {
            name: parameter.detach()[: self.vocab_size] if name in PADDED else parameter.detach()
            for name, parameter in self.named_parameters()
        }

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Copy `weights` in. Raises ValueError, and changes nothing, if a name or a shape does not fit."""
        own = self.weights()
        problems = [f"{name} is missing" for name in own.keys() - weights.keys()]
        problems += [f"{name} is unknown" for name in weights.keys() - own.keys()]
        problems += [
            f"{name} has shape {tuple(weights[name].shape)}, not {tuple(own[name].shape)}"
            for name in own.keys() & weights.keys()
            if weights[name].shape != own[name].shape
        ]
        if problems:
            raise ValueError("the weights do not fit the model: " + "; ".join(sorted(problems)))
        for name, parameter in own.items():
            parameter.copy_(weights[name])
        self.zero_padding()

    @torch.no_grad()
    def zero_padding(self) -> None:
        """Zero the rows that pad the vocabulary; no gradient reaches them, so they stay zero."""
        for embedding in (self.wte, self.lm_head):
            embedding.weight[self.vocab_size :] = 0.0


def empty_model(config: ModelConfig) -> GPT:
    """A GPT on the CPU with uninitialised weights: to draw them would double the time of opening a model."""
    with torch.device("meta"):
        model = GPT(config)
    return model.to_empty(device="cpu")


@contextmanager
def eval_mode(model: GPT) -> Iterator[None]:
    """Context manager that puts `model` into evaluation mode and restores its mode at the end."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


# ---------------------------------------------------------------- initialisation


@torch.no_grad()
def initialize(model: GPT, seed: int) -> None:
    """Draw all weights of `model`; see `init_weights`."""
    own = model.weights()
    for name, weight in init_weights(model.config, seed):
        own.pop(name).copy_(weight)
    assert not own, f"no rule initialises {', '.join(own)}"
    model.zero_padding()


def init_weights(config: ModelConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Every weight by name, one at a time, on the CPU: a pure function of the configuration and `seed`.

    Matrices N(0, 0.02); those that write into the residual stream N(0, 0.02 / sqrt(2 n_layer)), since
    2 n_layer of them add up there (GPT-2 paper, section 2.3); biases 0; layer norms 1 and 0. What GPT-2 does
    not have is in `initialization`. Every parameter is initialised by exactly one rule.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes, residual = weight_shapes(config), STANDARD_DEVIATION / math.sqrt(2 * config.n_layer)
    gpt2 = weight_shapes(gpt2_sizes(config))
    # All of GPT-2's weights are drawn, in its order: two models that differ in a part begin with the same
    # weights in all others.
    for name, shape in gpt2.items():
        if name.endswith("c_proj.weight"):
            weight = torch.empty(shape).normal_(0.0, residual, generator=generator)
        elif name.endswith(("wte.weight", "wpe.weight", "c_attn.weight", "c_fc.weight")):
            weight = torch.empty(shape).normal_(0.0, STANDARD_DEVIATION, generator=generator)
        elif name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight")):
            weight = torch.ones(shape)
        else:
            assert name.endswith(".bias"), f"no rule initialises {name}"
            weight = torch.zeros(shape)
        if shapes.get(name) == shape:
            yield name, adapt_weight(name, weight, config)
    for name, shape in shapes.items():
        if gpt2.get(name) != shape:
            yield name, draw_weight(name, shape, config, seed)


def gpt2_sizes(config: ModelConfig) -> ModelConfig:
    """GPT-2 of the same sizes: every switch at its default."""
    sizes = {name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd", "context_length")}
    return ModelConfig(**sizes, vocab_size=config.vocab_size, dropout=config.dropout)
