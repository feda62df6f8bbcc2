"""Muon for the matrices of blocks, AdamW for all else, signs for the balance of experts: one optimizer.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) replaces a matrix's momentum by an orthogonal
matrix near it, so that an update changes all directions equally. Options: rows of equal size (NorMuon, Li et
al. 2025, arXiv 2510.05491), and a decay only of weights that the update makes smaller.

Shapes: K matrices of one shape, R rows, C columns.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from overnight.hardware import native_precision
from overnight.model.model_config import ModelConfig, parameter_shapes
from overnight.training import OptimizerConfig
from overnight.training.activations import FLOAT32

Rule = Literal["adamw", "muon", "sign"]
RULES: dict[str, Rule] = {"matrix": "muon", "balance": "sign"}  # of kinds of parameters; others have AdamW
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the polynomial that draws singular values near 1
ITERATIONS = 5
FIRST_MOMENTUM = 0.85  # as modded-nanogpt and nanochat
ROW_DECAY = 0.95  # of the running mean of a row's squares: NorMuon's beta2
SMALLEST = 1e-7  # added to a norm
BATCH = 2**26  # numbers of the matrices that are orthogonalized together, at most: more are no faster
MATRICES = re.compile(r"h\.\d+\.(attn|mlp)\.c_\w+(\.weight)?")
TABLES = re.compile(r"(wte|wpe|.*value_embedding\.table)\.weight")


def needs_groups(names: Mapping[str, nn.Parameter], config: OptimizerConfig) -> bool:
    """True if AdamW alone, with one rate for all parameters, is not the optimizer."""
    return config.optimizer == "muon" or any(name.endswith(".balance") for name in names)


def parameter_kind(name: str, dimensions: int, config: OptimizerConfig) -> str:
    """The kind of a parameter: its rule and its learning rate depend on it."""
    if name.endswith(".balance"):
        return "balance"
    if config.optimizer == "muon" and MATRICES.fullmatch(name) and dimensions >= 2:
        return "matrix"
    if config.optimizer == "muon" and (TABLES.fullmatch(name) or name == "lm_head.weight"):
        return "head" if name == "lm_head.weight" else "embedding"
    return "scalar" if dimensions < 2 else "other"


def parameter_groups(
    model: nn.Module, named: Mapping[str, nn.Parameter], config: OptimizerConfig
) -> list[dict[str, Any]]:
    """The groups of `named` parameters of `model`, by rule and rate, the rest at the peak learning rate."""
    members = defaultdict[str, list[str]](list, {"scalar": []})
    for name, parameter in named.items():
        members[parameter_kind(name, parameter.dim(), config)].append(name)
    sizes, peak = getattr(model, "config", None), config.peak_learning_rate
    rates = {kind: getattr(config, f"{kind}_learning_rate") for kind in ("scalar", "embedding", "head")}
    rates |= {"matrix": config.matrix_rate, "balance": sizes.load_balance_rate if sizes else None}
    decays = {"scalar": 0.0, "balance": 0.0, "matrix": config.matrix_weight_decay or 0.0}
    return [
        {
            "params": [named[name] for name in names],
            "rows": [fused_rows(sizes, name) for name in names],
            "kind": kind,
            "rule": RULES.get(kind, "adamw"),
            "rate_factor": (rates.get(kind) or peak) / peak,
            "weight_decay": decays.get(kind, config.weight_decay),
            "fused": True,
        }
        for kind, names in members.items()
    ]


def fused_rows(config: ModelConfig | None, name: str) -> tuple[int, ...] | None:
    """The rows of each matrix in a fused parameter; None if the parameter is a single matrix."""
    if config is not None and name.endswith("c_attn.weight"):
        kv = config.kv_heads * config.head_channels
        return config.n_embd, kv, kv
    if config is not None and config.activation == "swiglu" and ".c_fc" in name:
        return config.hidden_width, config.hidden_width
    return None


def orthogonal_bytes(config: ModelConfig, width: int) -> int:
    """Temporary memory of the largest batch of matrices, whose products have numbers of `width` bytes."""
    counts = Counter[tuple[int, int]]()
    for name, shape in parameter_shapes(config).items():
        if MATRICES.fullmatch(name):
            rows = fused_rows(config, name) or (shape[-2],)
            for each in rows:
                counts[each, shape[-1]] += math.prod(shape[:-2])
    return max(
        min(count, max(1, BATCH // (rows * columns)))
        * (FLOAT32 * rows * columns + width * (3 * rows * columns + 2 * min(rows, columns) ** 2))
        for (rows, columns), count in counts.items()
    )


class Muon(torch.optim.Optimizer):
    """Updates each group of `parameter_groups` by its rule.

    As torch's fused AdamW it changes nothing where the attribute `found_inf` is 1, without waiting for the
    device. With `stacked`, matrices of one shape are orthogonalized together; without, one by one, so that
    rounding does not depend on which of them this process updates.
    """

    found_inf: Tensor

    def __init__(self, groups: list[dict[str, Any]], config: OptimizerConfig, *, stacked: bool) -> None:
        super().__init__(groups, {"lr": config.peak_learning_rate, "fused": True})
        self.config, self.stacked = config, stacked

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters."""
        del closure
        rules: dict[Rule, Callable[..., None]] = {
            "adamw": self._update_by_adamw,
            "muon": self._update_by_muon,
            "sign": _update_by_sign,
        }
        for group in self.param_groups:
            if group["params"]:
                device = group["params"][0].device
                found_inf = getattr(self, "found_inf", None)
                found_inf = torch.zeros((), device=device) if found_inf is None else found_inf.to(device)
                rules[group["rule"]](group, found_inf)

    def _update_by_adamw(self, group: dict[str, Any], found_inf: Tensor) -> None:
        states = [self._state_of(parameter, ("exp_avg", "exp_avg_sq")) for parameter in group["params"]]
        adamw(
            group["params"],
            [parameter.grad for parameter in group["params"]],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            found_inf=found_inf.float(),
            amsgrad=False,
            beta1=self.config.beta1,
            beta2=self.config.beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=self.config.epsilon,
            maximize=False,
        )

    def _update_by_muon(self, group: dict[str, Any], found_inf: Tensor) -> None:
        is_sound = 1.0 - found_inf.float()
        weights, directions, squares = list[Tensor](), list[Tensor](), list[Tensor]()
        for parameter, rows in zip(group["params"], group["rows"], strict=True):
            state = self._state_of(parameter, ("momentum",))
            weights += matrices_of(parameter.detach(), rows)
            directions += matrices_of(self._advance(parameter, state, is_sound), rows)
            if self.config.row_normalization:
                squares += matrices_of(state["row_square"], rows)
        for alike in self._batches(weights):
            updates_KRC = orthogonalize(torch.stack([directions[index] for index in alike]))
            if squares:
                updates_KRC = even_rows(updates_KRC, [squares[index] for index in alike], is_sound)
            for index, update_RC in zip(alike, updates_KRC, strict=True):
                self._apply(weights[index], update_RC, group, is_sound)
            del updates_KRC, update_RC  # or they would stay until the next batch has its own

    def _advance(self, parameter: nn.Parameter, state: dict[str, Tensor], is_sound: Tensor) -> Tensor:
        """Update the momentum. Returns Nesterov's direction, which overwrites the gradient."""
        assert parameter.grad is not None, "a parameter got no gradient"
        gradient = parameter.grad.masked_fill_(is_sound == 0, 0.0)  # 0 times what is not finite is not 0
        state["step"] += is_sound
        done = (state["step"] / self.config.momentum_steps).clamp(max=1.0)
        momentum = FIRST_MOMENTUM + (self.config.full_momentum - FIRST_MOMENTUM) * done
        state["momentum"].lerp_(gradient, (1.0 - momentum) * is_sound)
        return gradient.lerp_(state["momentum"], momentum)

    def _apply(self, weight_RC: Tensor, update_RC: Tensor, group: dict[str, Any], is_sound: Tensor) -> None:
        """Decay and update one matrix. The rate grows with the root of rows / columns, if that is above 1."""
        rate = group["lr"] * max(1.0, weight_RC.shape[0] / weight_RC.shape[1]) ** 0.5
        decay = group["lr"] * group["weight_decay"] * is_sound
        if self.config.cautious_weight_decay:
            weight_RC.sub_(weight_RC * (update_RC * weight_RC > 0) * decay)
        elif group["weight_decay"]:
            weight_RC.mul_(1.0 - decay)
        weight_RC.sub_(update_RC * (rate * is_sound))

    def _batches(self, weights: list[Tensor]) -> Iterator[list[int]]:
        """Indices of the matrices that are orthogonalized together."""
        alike = defaultdict[Any, list[int]](list)
        for index, weight in enumerate(weights):
            alike[weight.shape if self.stacked else index].append(index)
        for indices in alike.values():
            count = max(1, BATCH // weights[indices[0]].numel())
            yield from (indices[first : first + count] for first in range(0, len(indices), count))

    def _state_of(self, parameter: nn.Parameter, moments: tuple[str, ...]) -> dict[str, Tensor]:
        """A parameter's state, which begins at 0."""
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            for name in moments:
                state[name] = torch.zeros_like(parameter)
            if "momentum" in moments and self.config.row_normalization:
                state["row_square"] = torch.zeros_like(parameter[..., :1])
        return state


def _update_by_sign(group: dict[str, Any], found_inf: Tensor) -> None:
    """Lower the bias of experts whose load is above the mean; raise the others."""
    for parameter in group["params"]:
        gradient = torch.where(found_inf > 0, 0.0, parameter.grad)
        parameter.sub_(gradient.sign() * group["lr"])


def matrices_of(tensor: Tensor, rows: tuple[int, ...] | None) -> list[Tensor]:
    """The matrices that a parameter holds, as views: of each expert, of queries, keys and values, ..."""
    found = [tensor] if tensor.dim() == 2 else list(tensor.unbind(0))
    return [matrix for each in found for matrix in (torch.split(each, list(rows)) if rows else (each,))]


def orthogonalize(matrices_KRC: Tensor) -> Tensor:
    """Orthogonal matrices near the given ones: all singular values become about 1 (0.7 to 1.2), float32.

    Five iterations of Newton and Schulz in 16 bits, where the device multiplies them; else in 32.
    """
    device = str(matrices_KRC.device)
    x_KRC = matrices_KRC.to(torch.bfloat16 if native_precision(device) == "bf16" else torch.float32)
    is_tall = x_KRC.shape[1] > x_KRC.shape[2]
    if is_tall:
        x_KRC = x_KRC.mT
    x_KRC = x_KRC / x_KRC.norm(dim=(1, 2), keepdim=True).clamp(min=SMALLEST)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram_KRR = x_KRC @ x_KRC.mT
        polynomial_KRR = torch.baddbmm(gram_KRR, gram_KRR, gram_KRR, beta=b, alpha=c)
        x_KRC = torch.baddbmm(x_KRC, polynomial_KRR, x_KRC, beta=a)
    return (x_KRC.mT if is_tall else x_KRC).float()


def even_rows(updates_KRC: Tensor, squares: list[Tensor], is_sound: Tensor) -> Tensor:
    """Divide the rows of updates by the running root of their mean square; keep the norm of each update."""
    found_KR1 = updates_KRC.square().mean(dim=2, keepdim=True)
    for square_R1, now_R1 in zip(squares, found_KR1, strict=True):
        square_R1.lerp_(now_R1, (1.0 - ROW_DECAY) * is_sound)
    even_KRC = updates_KRC / (torch.stack(squares).sqrt() + SMALLEST)
    sizes = [each.norm(dim=(1, 2), keepdim=True) for each in (updates_KRC, even_KRC)]
    scaled_KRC: Tensor = even_KRC * (sizes[0] / (sizes[1] + SMALLEST))
    return scaled_KRC
