"""Whole models with switches against Transformers, and written out: logits, gradients, mistakes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from transformers import LlamaForCausalLM, NanoChatForCausalLM, Qwen3ForCausalLM

from overnight.conversion.llama_format import to_llama, to_qwen3
from overnight.conversion.model_layout import Export
from overnight.conversion.nanochat_format import to_nanochat
from overnight.model.gpt import GPT
from overnight.model.model_config import ModelConfig
from overnight.model.positions import rotate
from twins import (
    IDS_BT,
    ROTARY,
    B,
    Case,
    Function,
    T,
    V,
    Weights,
    call,
    draw_for,
    llama_config,
    rms,
    turn,
    twin_tests,
)


def naive_gpt(w: Weights, config: ModelConfig, wrongly: str = "") -> Tensor:
    """The modern stack written out: rotary positions, ReLU2, norms without gains.

    The rotation is ours; test_parts.py compares it.
    """
    D, turned = config.head_channels, turn(config)
    x = F.one_hot(IDS_BT, V).float() @ w["wte.weight"]
    unnormalized, x = x, rms(x) if config.embedding_norm else x
    embedding = unnormalized if wrongly == "embedding is mixed in before its norm" else x
    distance = torch.arange(T)[:, None] - torch.arange(T)
    for layer in range(config.n_layer):
        own = {name.removeprefix(f"h.{layer}."): w[name] for name in w if name.startswith(f"h.{layer}.")}
        if config.embedding_shortcut:
            gains = own["shortcut.stream_gain"], own["shortcut.embedding_gain"]
            gains = gains[::-1] if wrongly == "gains swapped" else gains
            x = gains[0] * x + gains[1] * embedding
        y = rms(x)
        q, k, v = (
            (y @ rows.T).view(B, T, 4, D).transpose(1, 2) for rows in own["attn.c_attn.weight"].chunk(3)
        )
        if config.has_value_embedding(layer):
            read = (x if wrongly == "gate reads the stream" else y)[..., :12]
            gate = (read @ own["attn.value_embedding.gate.weight"].T).sigmoid()
            gate = gate if wrongly == "gate begins at 1/2" else 2 * gate
            added = own["attn.value_embedding.table.weight"][IDS_BT].view(B, T, 4, D)
            v = v + (gate[..., None] * added).transpose(1, 2)
        scale = 1.0 if wrongly == "scale missing" else D**-0.5
        scores = scale * rotate(rms(q), turned) @ rotate(rms(k), turned).transpose(2, 3)
        reach = config.window(layer) or T
        mixed = scores.masked_fill((distance < 0) | (distance >= reach), -torch.inf).softmax(3) @ v
        x = x + mixed.transpose(1, 2).flatten(2) @ own["attn.c_proj.weight"].T
        x = x + (rms(x) @ own["mlp.c_fc.weight"].T).clamp(min=0) ** 2 @ own["mlp.c_proj.weight"].T
    logits, cap = rms(x) @ w["lm_head.weight"].T, config.logit_softcap
    return logits if cap is None else cap * torch.tanh(logits / cap)


PLAIN = replace(
    ROTARY,
    normalization="rms",
    norm_gains=False,
    qk_norm=True,
    activation="relu2",
    tied_head=False,
    n_layer=3,
)


def whole(config: ModelConfig, twin: Function, mistakes: dict[str, Function]) -> Case:
    """Our model against `twin`, by the logits; the vocabulary is not padded."""
    model = GPT(config, vocabulary_multiple=1)
    weights = draw_for(model)
    weights["lm_head.weight"] *= 5.0  # logits reach the soft cap
    return Case(weights, lambda w: call(model, w, IDS_BT), twin, mistakes)


def written_out(mistakes: list[object], **switches: object) -> Callable[[], Case]:
    """A mistake is a sentence that `naive_gpt` knows, or another configuration of it."""
    config = replace(PLAIN, **switches)

    def twin_of(mistake: object) -> Function:
        if isinstance(mistake, dict):
            return lambda w: naive_gpt(w, replace(config, **mistake))
        return lambda w: naive_gpt(w, config, str(mistake))

    return lambda: whole(config, twin_of(""), {str(m): twin_of(m) for m in mistakes})


def by_transformers(
    kind: type,
    to_theirs: Export,
    config: ModelConfig,
    mistakes: dict[str, Callable[[Weights], Weights]],
    **others: object,
) -> Case:
    """A whole model of Transformers with our weights, renamed as `convert` does; a mistake changes them."""
    theirs = kind(llama_config(config, kind.config_class, **others)).eval()

    def rename(w: Weights) -> Weights:
        return to_theirs(config, w)[1]

    def twin(w: Weights, change: Callable[[Weights], Weights] = lambda own: own) -> Tensor:
        own = change(rename(w))
        assert own.keys() == dict(theirs.named_parameters()).keys()
        return functional_call(theirs, own, (IDS_BT,)).logits

    return whole(config, twin, {name: lambda w, c=change: twin(w, c) for name, change in mistakes.items()})


def with_one(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Weights], Weights]:
    return lambda own: {**own, name: change(own[name])}


GATED = replace(
    ROTARY, normalization="rms", activation="swiglu", feed_forward_width=96, tied_head=False, n_kv_head=2
)
FIRST = "model.layers.0."
HEADS = with_one(
    FIRST + "self_attn.q_proj.weight", lambda rows: rows.unflatten(0, (4, 16)).flip(0).flatten(0, 1)
)
UNTURNED = with_one(
    FIRST + "self_attn.k_proj.weight", lambda rows: rows.unflatten(0, (4, 2, 8)).flip(1).flatten(0, 2)
)


CASES: dict[str, Callable[[], Case]] = {
    "plain": written_out([{"rotary_base": 5000.0}, "scale missing"]),
    "soft cap": written_out([{"logit_softcap": None}, {"logit_softcap": 9.0}], logit_softcap=8.0),
    "embedding norm": written_out([{"embedding_norm": False}], embedding_norm=True),
    "shortcut": written_out(
        ["gains swapped", "embedding is mixed in before its norm", {"embedding_shortcut": False}],
        **{"embedding_shortcut": True, "embedding_norm": True, "n_layer": 2},
    ),
    "value embeddings": written_out(
        ["gate reads the stream", "gate begins at 1/2", {"value_embeddings": "none"}],
        value_embeddings="alternate",
    ),
    "windows": written_out(
        [{"short_window": 6}, {"window_pattern": "LS"}, {"window_pattern": "S"}],
        **{"window_pattern": "SL", "short_window": 5},
    ),
    "Llama": lambda: by_transformers(LlamaForCausalLM, to_llama, GATED, {"heads in another order": HEADS}),
    "Qwen3": lambda: by_transformers(
        Qwen3ForCausalLM, to_qwen3, replace(GATED, qk_norm=True), {"heads in another order": HEADS}
    ),
    "NanoChat": lambda: by_transformers(
        NanoChatForCausalLM,
        to_nanochat,
        replace(PLAIN, embedding_norm=True, logit_softcap=8.0),
        {"heads in another order": HEADS, "keys turn the other way": UNTURNED},
        final_logit_softcapping=8.0,
    ),
}


test_outputs_and_gradients_are_those_of_the_twin, test_comparison_finds_planted_mistakes = twin_tests(CASES)
