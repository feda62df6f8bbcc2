"""Parts of a block: our weights under the names of Transformers' Llama and its descendants, and back.

Each pair of functions is inverse to the bit. Their names are those within `model.layers.0.`, ours those
within `h.0.`. All matrices are (out, in) on both sides.

D: channels of a head; P: rotated channels of a head with latent attention; R: channels of the latent vector.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from overnight.model.model_config import ModelConfig

Weights = dict[str, Tensor]
Reorder = Callable[[Tensor, int], Tensor]
EXPERT = "mlp.experts."


def same_order(rows: Tensor, _size: int) -> Tensor:
    """Rows as they are."""
    return rows


def swap_halves(rows: Tensor, D: int) -> Tensor:
    """The two halves of each head's D rows change places; its own inverse.

    Our rotation of a pair (a, b) by an angle t is (a cos t - b sin t, b cos t + a sin t), with a in the first
    half. NanoChat computes (a cos t + b sin t, b cos t - a sin t): the same for (b, a).
    """
    return rows.reshape(-1, 2, D // 2, *rows.shape[1:]).flip(1).reshape(rows.shape)


def halves_to_neighbours(rows: Tensor, P: int) -> Tensor:
    """Row i of the first half of each P rows becomes row 2 i, row i of the second half row 2 i + 1."""
    return rows.reshape(-1, 2, P // 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def neighbours_to_halves(rows: Tensor, P: int) -> Tensor:
    """The inverse of `halves_to_neighbours`."""
    return rows.reshape(-1, P // 2, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


# ---------------------------------------------------------------- norms


def export_norms(config: ModelConfig, own: Weights) -> Weights:
    """Gains of the two norms; ones for a model without gains."""
    ones = torch.ones(config.n_embd, device=_device(own))
    first, second = own.get("ln_1.weight", ones), own.get("ln_2.weight", ones.clone())
    return {"input_layernorm.weight": first, "post_attention_layernorm.weight": second}


def import_norms(_config: ModelConfig, theirs: Weights) -> Weights:
    """The inverse, gains of 1 included."""
    return {
        "ln_1.weight": theirs["input_layernorm.weight"],
        "ln_2.weight": theirs["post_attention_layernorm.weight"],
    }


def export_unit_gains(config: ModelConfig, own: Weights) -> Weights:
    """Qwen3 normalizes queries and keys with gains; ours has none."""
    ones = torch.ones(config.head_channels, device=_device(own))
    return {"self_attn.q_norm.weight": ones, "self_attn.k_norm.weight": ones.clone()}


def import_unit_gains(_config: ModelConfig, theirs: Weights) -> Weights:
    """Nothing. Raises ValueError if the norm of queries and keys has learned gains."""
    for name in ("self_attn.q_norm.weight", "self_attn.k_norm.weight"):
        if not bool((theirs[name] == 1).all()):
            raise ValueError(f"{name} is not 1 everywhere; the norm of queries and keys has no gains here")
    return {}


# ---------------------------------------------------------------- attention


def export_heads(config: ModelConfig, own: Weights, reorder: Reorder = same_order) -> Weights:
    """c_attn holds the rows of queries, keys and values one below the other; its bias likewise."""
    kv = config.kv_heads * config.head_channels
    found: Weights = {}
    for kind in ("weight", "bias") if config.biases else ("weight",):
        query, key, value = torch.split(own[f"attn.c_attn.{kind}"], [config.n_embd, kv, kv])
        found[f"self_attn.q_proj.{kind}"] = reorder(query, config.head_channels)
        found[f"self_attn.k_proj.{kind}"] = reorder(key, config.head_channels)
        found[f"self_attn.v_proj.{kind}"] = value
        found[f"self_attn.o_proj.{kind}"] = own[f"attn.c_proj.{kind}"]
    return found


def import_heads(config: ModelConfig, theirs: Weights, reorder: Reorder = same_order) -> Weights:
    """The inverse; `reorder` is the inverse, too."""
    found: Weights = {}
    for kind in ("weight", "bias") if config.biases else ("weight",):
        query, key, value, output = (theirs[f"self_attn.{name}_proj.{kind}"] for name in "qkvo")
        query, key = (reorder(rows, config.head_channels) for rows in (query, key))
        found |= {f"attn.c_attn.{kind}": torch.cat([query, key, value]), f"attn.c_proj.{kind}": output}
    return found


def export_latent(config: ModelConfig, own: Weights) -> Weights:
    """Latent attention: DeepSeek rotates neighbouring channels, ours the two halves.

    The rotated channels are the last P of each head of the query, and the last P rows of c_latent.
    """
    gains = own.get("attn.ln_latent.weight", torch.ones(config.latent_rank or 0, device=_device(own)))
    return {
        "self_attn.q_proj.weight": _reorder_ends(config, own["attn.c_query.weight"], halves_to_neighbours),
        "self_attn.kv_a_proj_with_mqa.weight": _reorder_shared(
            config, own["attn.c_latent.weight"], halves_to_neighbours
        ),
        "self_attn.kv_a_layernorm.weight": gains,
        "self_attn.kv_b_proj.weight": own["attn.c_expand"],
        "self_attn.o_proj.weight": own["attn.c_proj.weight"],
    }


def import_latent(config: ModelConfig, theirs: Weights) -> Weights:
    """The inverse, gains of 1 included."""
    shared = theirs["self_attn.kv_a_proj_with_mqa.weight"]
    return {
        "attn.c_query.weight": _reorder_ends(config, theirs["self_attn.q_proj.weight"], neighbours_to_halves),
        "attn.c_latent.weight": _reorder_shared(config, shared, neighbours_to_halves),
        "attn.ln_latent.weight": theirs["self_attn.kv_a_layernorm.weight"],
        "attn.c_expand": theirs["self_attn.kv_b_proj.weight"],
        "attn.c_proj.weight": theirs["self_attn.o_proj.weight"],
    }


def _reorder_ends(config: ModelConfig, rows: Tensor, reorder: Reorder) -> Tensor:
    """Reorder the last P rows of each head's D."""
    P, heads = config.rotary_channels, rows.reshape(config.n_head, config.head_channels, -1)
    ends = reorder(heads[:, -P:].flatten(0, 1), P).view(config.n_head, P, -1)
    return torch.cat([heads[:, :-P], ends], dim=1).flatten(0, 1)


def _reorder_shared(config: ModelConfig, rows: Tensor, reorder: Reorder) -> Tensor:
    """Reorder the last P of R + P rows."""
    P = config.rotary_channels
    return torch.cat([rows[:-P], reorder(rows[-P:], P)])


# ---------------------------------------------------------------- feed-forward


def export_gated(config: ModelConfig, own: Weights) -> Weights:
    """A gated part computes down(act(gate x) * up x).

    With swiglu c_fc holds gate, then up. With relu2 both are c_fc and act is ReLU: relu(z) z = relu(z)^2.
    """
    found: Weights = {}
    for kind in ("weight", "bias") if config.biases else ("weight",):
        gate, up = _gate_and_up(config, own[f"mlp.c_fc.{kind}"])
        found |= {f"mlp.gate_proj.{kind}": gate, f"mlp.up_proj.{kind}": up}
        found[f"mlp.down_proj.{kind}"] = own[f"mlp.c_proj.{kind}"]
    return found


def import_gated(config: ModelConfig, theirs: Weights) -> Weights:
    """The inverse. Raises ValueError for relu with a gate that differs from up."""
    found: Weights = {}
    for kind in ("weight", "bias") if config.biases else ("weight",):
        gate, up = theirs[f"mlp.gate_proj.{kind}"], theirs[f"mlp.up_proj.{kind}"]
        found[f"mlp.c_fc.{kind}"] = _join_gate_and_up(config, gate, up)
        found[f"mlp.c_proj.{kind}"] = theirs[f"mlp.down_proj.{kind}"]
    return found


def export_experts(config: ModelConfig, own: Weights) -> Weights:
    """Each expert is a gated part of its own; the router is their gate."""
    found = {"mlp.gate.weight": own["mlp.router"]}
    for expert, (wide, narrow) in enumerate(zip(own["mlp.c_fc"], own["mlp.c_proj"], strict=True)):
        gate, up = _gate_and_up(config, wide)
        found |= {f"{EXPERT}{expert}.gate_proj.weight": gate, f"{EXPERT}{expert}.up_proj.weight": up}
        found[f"{EXPERT}{expert}.down_proj.weight"] = narrow
    return found


def import_experts(config: ModelConfig, theirs: Weights) -> Weights:
    """The inverse. Raises ValueError for relu with a gate that differs from up."""
    names = [f"{EXPERT}{expert}." for expert in range(config.n_expert)]
    wide = [
        _join_gate_and_up(config, theirs[f"{name}gate_proj.weight"], theirs[f"{name}up_proj.weight"])
        for name in names
    ]
    narrow = [theirs[f"{name}down_proj.weight"] for name in names]
    router = theirs["mlp.gate.weight"]
    return {"mlp.c_fc": torch.stack(wide), "mlp.c_proj": torch.stack(narrow), "mlp.router": router}


def _gate_and_up(config: ModelConfig, wide: Tensor) -> tuple[Tensor, Tensor]:
    if config.activation == "relu2":
        return wide, wide.clone()  # safetensors writes no memory twice
    gate, up = wide.chunk(2)
    return gate, up


def _join_gate_and_up(config: ModelConfig, gate: Tensor, up: Tensor) -> Tensor:
    if config.activation == "swiglu":
        return torch.cat([gate, up])
    if not torch.equal(gate, up):
        raise ValueError("hidden_act is 'relu' and gate_proj differs from up_proj, which is not supported")
    return gate


def _device(own: Weights) -> torch.device:
    return next(iter(own.values())).device
