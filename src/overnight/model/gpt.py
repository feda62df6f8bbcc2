"""True GPT-2, in reading order: attention, feed-forward, block, model, initialisation.

The configuration is `model_config.ModelConfig`; faster attention kernels are in `kernels`, chosen by name.

Shapes: B rows, T positions of this call, S positions of keys, C channels, H heads, D channels a head, V ids.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from overnight.model.kernels import (
    NO_MASKS_IN_TRAINING,
    CausalKernel,
    DocumentKernel,
    Documents,
    allowed_backends,
    attend_causal,
    attend_within_documents,
)
from overnight.model.model_config import VOCABULARY_MULTIPLE, ModelConfig


class Cache(Protocol):
    """Keys and values of earlier positions. The generator owns, fills and resets it."""

    def positions(self, length: int) -> Tensor:
        """Positions of the next `length` ids, int64 (T,) or, where rows differ, (B, T)."""
        ...

    def append(self, layer: int, k_BHTD: Tensor, v_BHTD: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Add these; return all keys and values so far (B, H, S, D) and the attention mask.

        The mask is boolean, broadcastable to (B, H, T, S), or None: the cache was empty and attention is
        causal, or T is 1 and every position is visible.
        """
        ...


class CausalSelfAttention(nn.Module):
    """Every position attends to itself and to earlier positions."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.kernel: CausalKernel = "fused"
        self.document_kernel: DocumentKernel = "mask"

    def forward(self, x_BTC: Tensor, cache: Cache | None = None, document_BT: Tensor | None = None) -> Tensor:
        """(B, T, C) -> (B, T, C). A cache adds earlier positions; `document_BT` masks other documents."""
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
        with allowed_backends(self.kernel):
            if document_BT is None:
                mixed_BHTD = attend_causal(q_BHTD, k_BHSD, v_BHSD, mask, self.kernel, dropout)
            else:
                assert cache is None, "a cache holds one document"
                # Evaluation uses the mask, so that it does not depend on the kernel used in training.
                kernel = self.document_kernel if torch.is_grad_enabled() else "mask"
                mixed_BHTD = attend_within_documents(q_BHTD, k_BHSD, v_BHSD, document_BT, kernel, dropout)
        mixed_BTC = mixed_BHTD.transpose(1, 2).reshape(B, T, C)
        return F.dropout(self.c_proj(mixed_BTC), self.dropout, self.training)


class MLP(nn.Module):
    """The feed-forward part of a block, with a hidden width of 4 C."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = config.dropout

    def forward(self, x_BTC: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        wide = F.gelu(self.c_fc(x_BTC), approximate="tanh")
        return F.dropout(self.c_proj(wide), self.dropout, self.training)


class Block(nn.Module):
    """Attention, then feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x_BTC: Tensor, cache: Cache | None = None, document_BT: Tensor | None = None) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x_BTC = x_BTC + self.attn(self.ln_1(x_BTC), cache, document_BT)
        return x_BTC + self.mlp(self.ln_2(x_BTC))  # type: ignore[no-any-return]  # as in GPT.trunk


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
        padded = -(-self.vocab_size // vocabulary_multiple) * vocabulary_multiple
        self.wte = _embedding(padded, config.n_embd)
        self.wpe = _embedding(config.context_length, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
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
        document_BT = None
        if documents is not None:
            document_BT, position = documents.document_ids, self.wpe(documents.positions)
        else:
            position = self.wpe.weight[:T] if cache is None else self.wpe(cache.positions(T))
        x_BTC = F.dropout(self.wte(ids_BT) + position, self.config.dropout, self.training)
        for block in self.h:
            x_BTC = block(x_BTC, cache, document_BT)
        return self.ln_f(x_BTC)  # type: ignore[no-any-return]  # nn.Module.__call__ is untyped

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., C) -> logits (..., V)."""
        return F.linear(hidden, self.wte.weight)[..., : self.vocab_size]

    def weights(self) -> dict[str, Tensor]:
        """Every parameter by name, detached, `wte.weight` without its padding: views into the model."""
        named = {name: parameter.detach() for name, parameter in self.named_parameters()}
        named["wte.weight"] = named["wte.weight"][: self.vocab_size]
        return named

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
        self.wte.weight[self.vocab_size :] = 0.0


def _embedding(rows: int, n_embd: int) -> nn.Embedding:
    # nn.Embedding(rows, n_embd) would draw weights that `initialize` overwrites; on the meta device this
    # draw alone costs two seconds of imports.
    zeros = torch.zeros(rows, n_embd)
    embedding: nn.Embedding = nn.Embedding.from_pretrained(zeros, freeze=False)  # type: ignore[no-untyped-call]
    return embedding


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

STANDARD_DEVIATION = 0.02  # GPT-2's released code, model.py: initializer_range of every matrix


@torch.no_grad()
def initialize(model: GPT, seed: int) -> None:
    """Draw all weights of `model`; see `init_weights`."""
    own = model.weights()
    shapes = {name: weight.shape for name, weight in own.items()}
    for name, weight in init_weights(shapes, model.config.n_layer, seed):
        own[name].copy_(weight)
    model.zero_padding()


def init_weights(shapes: Mapping[str, torch.Size], n_layer: int, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Every weight by name, one at a time, on the CPU: a pure function of the shapes and `seed`.

    Matrices N(0, 0.02); those that write into the residual stream N(0, 0.02 / sqrt(2 n_layer)), since
    2 n_layer of them add up there (GPT-2 paper, section 2.3); biases 0; layer norms 1 and 0. Every parameter
    is initialised by exactly one rule.
    """
    generator = torch.Generator().manual_seed(seed)
    residual = STANDARD_DEVIATION / math.sqrt(2 * n_layer)
    for name, shape in shapes.items():
        if name.endswith("c_proj.weight"):
            yield name, torch.empty(shape).normal_(0.0, residual, generator=generator)
        elif name.endswith(("wte.weight", "wpe.weight", "c_attn.weight", "c_fc.weight")):
            yield name, torch.empty(shape).normal_(0.0, STANDARD_DEVIATION, generator=generator)
        elif name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight")):
            yield name, torch.ones(shape)
        elif name.endswith(".bias"):
            yield name, torch.zeros(shape)
        else:
            raise AssertionError(f"no rule initialises {name}")


@functools.lru_cache(maxsize=64)
def parameter_shapes(config: ModelConfig) -> Mapping[str, torch.Size]:
    """The shape of every parameter by name, in the model's order, the embedding padded; allocates nothing."""
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in GPT(config).named_parameters()}


def weight_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """The shape of every weight by name, the embedding without its padding; allocates nothing."""
    return {**parameter_shapes(config), "wte.weight": torch.Size((config.vocabulary, config.n_embd))}
