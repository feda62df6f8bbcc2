"""Feed-forward parts beyond GPT-2's: gated (SwiGLU), and a mixture of experts.

Shapes: B rows, T positions, N tokens, C channels, F hidden channels, E experts, A pairs of token and expert.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from overnight.model.fused import squared_relu
from overnight.model.model_config import ModelConfig

BALANCE_GRADIENT = 1e-20  # only its sign is used; too small to change the norm for clipping


def activate(wide: Tensor, activation: str) -> Tensor:
    """The activation of a hidden layer; swiglu takes (gate, up) side by side and halves the channels."""
    if activation == "gelu":
        return F.gelu(wide, approximate="tanh")
    if activation == "relu2":
        return squared_relu(wide)
    gate, up = wide.chunk(2, dim=-1)
    return F.silu(gate) * up


class FeedForward(nn.Module):
    """As GPT-2's MLP, with another activation."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.hidden_width
        wide = 2 * width if config.activation == "swiglu" else width
        self.activation, self.dropout = config.activation, config.dropout
        self.c_fc = nn.Linear(config.n_embd, wide, bias=config.biases)
        self.c_proj = nn.Linear(width, config.n_embd, bias=config.biases)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        wide = activate(self.c_fc(x_BTC), self.activation)
        return F.dropout(self.c_proj(wide), self.dropout, self.training)


class MixtureOfExperts(nn.Module):
    """A router chooses a few experts for each token; shared experts serve every token.

    The weights of the chosen experts are a softmax over their scores. A bias is added to choose them, which
    balances the load without a term in the loss (Wang et al. 2024, arXiv 2408.15664). Its gradient is the
    load, so that it is summed over micro-batches and processes, saved and skipped like any other gradient.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        C, width = config.n_embd, config.hidden_width
        self.activation, self.dropout = config.activation, config.dropout
        self.experts, self.chosen = config.n_expert, config.chosen_experts
        self.shared = config.shared_experts or 0
        wide = 2 * width if config.activation == "swiglu" else width
        self.c_fc = nn.Parameter(torch.zeros(self.experts + self.shared, wide, C))
        self.c_proj = nn.Parameter(torch.zeros(self.experts + self.shared, C, width))
        self.router = nn.Parameter(torch.zeros(self.experts, C))
        self.balance = nn.Parameter(torch.zeros(self.experts)) if config.load_balance_rate else None

    def forward(self, x_BTC: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x_NC = x_BTC.flatten(0, 1)
        expert_NA, share_NA = self.choose(x_NC)
        # Pairs of token and expert in the order of experts: each expert's rows are one product.
        expert_A, order_A = expert_NA.flatten().sort(stable=True)
        token_A = order_A // expert_NA.shape[1]
        all_E = torch.arange(len(self.c_fc), device=x_NC.device)
        ends_E = torch.searchsorted(expert_A, all_E, right=True, out_int32=True)
        dtype = _product_dtype(x_NC)
        wide = _grouped_product(x_NC[token_A].to(dtype), self.c_fc.to(dtype), ends_E)
        narrow = _grouped_product(activate(wide, self.activation), self.c_proj.to(dtype), ends_E)
        weighted_AC = narrow * share_NA.flatten()[order_A, None].to(dtype)
        mixed_NC = torch.zeros_like(x_NC, dtype=dtype).index_add(0, token_A, weighted_AC)
        return F.dropout(mixed_NC.view(x_BTC.shape), self.dropout, self.training)

    def choose(self, x_NC: Tensor) -> tuple[Tensor, Tensor]:
        """The experts of each token, shared ones included, and the weight of each."""
        with torch.autocast(x_NC.device.type, enabled=False):  # a rounded score chooses another expert
            scores_NE = F.linear(x_NC.float(), self.router.float())
        preference_NE = scores_NE.softmax(dim=1).detach()
        if self.balance is not None:
            preference_NE = preference_NE + self.balance.detach()
        expert_NA = preference_NE.topk(self.chosen, dim=1).indices
        share_NA = scores_NE.gather(1, expert_NA).softmax(dim=1)
        if self.balance is not None:
            share_NA = _CountLoad.apply(share_NA, self.balance, expert_NA)  # type: ignore[no-untyped-call]
        if self.shared:
            always = torch.arange(self.experts, self.experts + self.shared, device=x_NC.device)
            expert_NA = torch.cat([expert_NA, always.expand(len(x_NC), -1)], dim=1)
            share_NA = torch.cat([share_NA, share_NA.new_ones(len(x_NC), self.shared)], dim=1)
        return expert_NA, share_NA


class _CountLoad(torch.autograd.Function):
    """Passes the weights through; the gradient of the bias is the load of each expert, less the mean."""

    @staticmethod
    def forward(ctx: Any, share_NA: Tensor, balance_E: Tensor, expert_NA: Tensor) -> Tensor:
        """The weights, unchanged."""
        ctx.save_for_backward(expert_NA)
        ctx.experts = len(balance_E)
        return share_NA.clone()

    @staticmethod
    def backward(ctx: Any, gradient_NA: Tensor) -> tuple[Tensor, Tensor, None]:
        """Of the weights, and of the bias."""
        (expert_NA,) = ctx.saved_tensors
        all_E = torch.arange(ctx.experts, device=expert_NA.device)
        load_E = (expert_NA[..., None] == all_E).sum((0, 1)).float()
        return gradient_NA, (load_E - load_E.mean()) * BALANCE_GRADIENT, None


def _product_dtype(tensor: Tensor) -> torch.dtype:
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


# ---------------------------------------------------------------- one product for each expert


def _grouped_product(rows_AK: Tensor, weight_EMK: Tensor, ends_E: Tensor) -> Tensor:
    """Each expert's rows times its matrix, transposed; `ends_E` are the ends of their rows."""
    is_aligned = all(size * rows_AK.element_size() % 16 == 0 for size in weight_EMK.shape[1:])
    # What torch's kernel takes when it is compiled; the oldest torch that we allow may not have it.
    if hasattr(F, "grouped_mm") and rows_AK.dtype is torch.bfloat16 and is_aligned:
        product: Tensor = F.grouped_mm(rows_AK, weight_EMK.transpose(1, 2), offs=ends_E)
        return product
    return _products(rows_AK, weight_EMK, ends_E)  # type: ignore[no-any-return]


@torch.library.custom_op("overnight::expert_products", mutates_args=())
def _products(rows_AK: Tensor, weight_EMK: Tensor, ends_E: Tensor) -> Tensor:
    """The same, one expert after the other."""
    return torch.cat(
        [rows @ weight.T for rows, weight in zip(_split(rows_AK, ends_E), weight_EMK, strict=True)]
    )


@_products.register_fake
def _products_shape(rows_AK: Tensor, weight_EMK: Tensor, _ends_E: Tensor) -> Tensor:
    return rows_AK.new_empty(rows_AK.shape[0], weight_EMK.shape[1])


@torch.library.custom_op("overnight::expert_products_backward", mutates_args=())
def _products_backward(
    gradient_AM: Tensor, rows_AK: Tensor, weight_EMK: Tensor, ends_E: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of rows and weights."""
    gradients, rows = _split(gradient_AM, ends_E), _split(rows_AK, ends_E)
    of_rows = torch.cat([gradient @ weight for gradient, weight in zip(gradients, weight_EMK, strict=True)])
    return of_rows, torch.stack([gradient.T @ part for gradient, part in zip(gradients, rows, strict=True)])


@_products_backward.register_fake
def _gradient_shapes(
    _gradient_AM: Tensor, rows_AK: Tensor, weight_EMK: Tensor, _ends_E: Tensor
) -> tuple[Tensor, Tensor]:
    return rows_AK.new_empty(rows_AK.shape), weight_EMK.new_empty(weight_EMK.shape)


def _remember(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient_AM: Tensor) -> tuple[Tensor, Tensor, None]:
    of_rows, of_weight = _products_backward(gradient_AM.contiguous(), *ctx.saved_tensors)
    return of_rows, of_weight, None


_products.register_autograd(_backward, setup_context=_remember)


def _split(rows_AK: Tensor, ends_E: Tensor) -> tuple[Tensor, ...]:
    """The rows of each expert."""
    return rows_AK.tensor_split(ends_E[:-1].tolist())
