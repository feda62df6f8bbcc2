"""Attention beyond GPT-2's against that of Transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DeepseekV3Config, LlamaConfig, Qwen3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention
from transformers.models.llama import modeling_llama as llama
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from overnight.generation.generate import KVCache
from overnight.model.attention import GroupedAttention, LatentAttention
from overnight.model.gpt import GPT
from overnight.model.inputs import BlockInputs
from overnight.model.model_config import ModelConfig
from overnight.model.positions import Rotation, rotate
from twins import (
    IDS_BT,
    MISTAKE,
    ROTARY,
    TOLERANCE,
    YARN,
    B,
    C,
    Case,
    Function,
    T,
    Weights,
    call,
    difference,
    draw,
    draw_for,
    llama_config,
    rms,
    rotate_neighbours,
    turn,
    twin_tests,
    wrong,
)


def attend_by(build: Callable[[], nn.Module], config: ModelConfig) -> Function:
    """Our attention; built at each call, since a planted mistake may change what it is built of."""
    return lambda w: call(build(), w, w["x"], BlockInputs(IDS_BT, rotation=turn(config)))


def causal_mask() -> Tensor:
    return torch.full((T, T), -torch.inf).triu(1)[None, None]


def normalize_all_heads(x: Tensor) -> Tensor:
    return rms(x.transpose(1, 2).flatten(2)).unflatten(2, (-1, 16)).transpose(1, 2)


def compare_heads(config: ModelConfig, kind: type) -> Case:
    ours = attend_by(lambda: GroupedAttention(config, 0), config)
    angles = llama.LlamaRotaryEmbedding(llama_config(config))
    kind_of_config = Qwen3Config if kind is Qwen3Attention else LlamaConfig
    theirs = kind(llama_config(config, kind_of_config), 0)

    def twin(w: Weights, scaling: float = config.head_channels**-0.5) -> Tensor:
        theirs.scaling = scaling
        kv = config.kv_heads * config.head_channels
        rows = zip("qkv", w["c_attn.weight"].split((C, kv, kv)), strict=True)
        own = {f"{name}_proj.weight": part for name, part in rows} | {"o_proj.weight": w["c_proj.weight"]}
        if kind is Qwen3Attention:
            own |= {"q_norm.weight": torch.ones(16), "k_norm.weight": torch.ones(16)}
        around = {
            "position_embeddings": angles(w["x"], torch.arange(T)[None]),
            "attention_mask": causal_mask(),
        }
        return call(theirs, own, w["x"], **around)

    mistakes = {
        "scale missing": lambda w: twin(w, 1.0),
        "neighbouring pairs": wrong("attention.rotate", rotate_neighbours, ours),
        "queries are not turned": wrong(
            "attention.rotate", lambda x, turned: rotate(x, turned) if x.shape[1] == 2 else x, ours
        ),
        "heads in turn instead of groups": wrong(
            "attention.share_heads", lambda x, heads: x.repeat(1, heads // x.shape[1], 1, 1), ours
        ),
        "sees the next one": wrong(
            "attention.attend", lambda q, k, v, *_: F.scaled_dot_product_attention(q, k, v), ours
        ),
    }
    if config.qk_norm:
        mistakes |= {
            "not normalized": wrong("attention.rms_norm", lambda x: x, ours),
            "normalized over all heads": wrong("attention.rms_norm", normalize_all_heads, ours),
            "normalized after YaRN's magnitude": wrong(
                "attention.rotate", lambda x, turned: rms(rotate(x, turned)), ours
            ),
        }
    return Case(draw_for(GroupedAttention(config, 0), x=draw(1, B, T, C)), ours, twin, mistakes)


def grouped() -> Case:
    return compare_heads(replace(ROTARY, n_kv_head=2), llama.LlamaAttention)


def qk_norm() -> Case:
    return compare_heads(replace(YARN, n_kv_head=2, qk_norm=True), Qwen3Attention)


class Gain(nn.Module):
    """A norm that has forgotten to normalize."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class GrowingCache:
    """The cache of the model, by concatenation: gradients pass through it."""

    def __init__(self) -> None:
        self.kept: tuple[Tensor, Tensor] | None = None

    def append(self, _layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, None]:
        old = self.kept
        self.kept = (
            (key, value) if old is None else (torch.cat([old[0], key], 2), torch.cat([old[1], value], 2))
        )
        return *self.kept, None


LATENT = replace(ROTARY, normalization="rms", latent_rank=24, latent_rotary_channels=6)


def absorbed(w: Weights) -> Tensor:
    """Computed from the cached vectors, one position after the other."""
    cache, part, found = GrowingCache(), LatentAttention(LATENT, 0), []
    for i in range(T):
        turned = Rotation(*(table[i : i + 1] for table in turn(LATENT)))
        found.append(call(part, w, w["x"][:, i : i + 1], BlockInputs(IDS_BT, cache, None, turned)))
    return torch.cat(found, dim=1)


def compare_latent(ours: Function) -> Case:
    """DeepSeek's rotated channels are neighbouring pairs in the weights, and ours are halves.

    Row i of the first half is their row 2 i, row i of the second half their row 2 i + 1. This holds for the
    end of each head of the query, and for the key that the heads share. All else has the same order.
    """
    P, D, R = LATENT.rotary_channels, LATENT.head_channels, 24
    config = llama_config(
        LATENT,
        DeepseekV3Config,
        **{"q_lora_rank": None, "kv_lora_rank": R, "qk_rope_head_dim": P, "qk_nope_head_dim": D - P},
        **{"v_head_dim": D, "head_dim": P, "rope_interleave": True, "num_key_value_heads": 4},
    )
    theirs = DeepseekV3Attention(config, 0)
    angles = llama.LlamaRotaryEmbedding(config)

    def interleave(rows: Tensor) -> Tensor:
        """(..., P, C): halves to neighbouring pairs."""
        return rows.unflatten(-2, (2, P // 2)).transpose(-3, -2).flatten(-3, -2)

    def twin(
        w: Weights, reorder: Callable[[Tensor], Tensor] = interleave, scaling: float = D**-0.5
    ) -> Tensor:
        theirs.scaling = scaling
        query = w["c_query.weight"].unflatten(0, (4, D))
        query = torch.cat([query[:, : D - P], reorder(query[:, D - P :])], dim=1).flatten(0, 1)
        shared = torch.cat([w["c_latent.weight"][:R], reorder(w["c_latent.weight"][R:])])
        own = {
            "q_proj.weight": query,
            "kv_a_proj_with_mqa.weight": shared,
            "o_proj.weight": w["c_proj.weight"],
        }
        own |= {"kv_a_layernorm.weight": w["ln_latent.weight"], "kv_b_proj.weight": w["c_expand"]}
        around = {
            "position_embeddings": angles(w["x"], torch.arange(T)[None]),
            "attention_mask": causal_mask(),
        }
        return call(theirs, own, w["x"], **around)

    mistakes = {
        "order of rows": lambda w: twin(w, lambda rows: rows),
        "scale of the content alone": lambda w: twin(w, scaling=(D - P) ** -0.5),
        "neighbouring pairs": wrong("attention.rotate", rotate_neighbours, ours),
        "latent vector is not normalized": wrong("attention.build_norm", lambda *_: Gain(R), ours),
        "shared key is not turned": wrong(
            "attention.rotate", lambda x, turned: rotate(x, turned) if x.shape[1] == 4 else x, ours
        ),
    }
    return Case(draw_for(LatentAttention(LATENT, 0), x=draw(1, B, T, C)), ours, twin, mistakes)


def latent() -> Case:
    return compare_latent(attend_by(lambda: LatentAttention(LATENT, 0), LATENT))


def latent_absorbed() -> Case:
    return compare_latent(absorbed)


CASES: dict[str, Callable[[], Case]] = {
    "grouped": grouped,
    "QK-norm": qk_norm,
    "latent": latent,
    "latent, absorbed": latent_absorbed,
}


test_outputs_and_gradients_are_those_of_the_twin, test_comparison_finds_planted_mistakes = twin_tests(CASES)


@torch.no_grad()
def test_latent_attention_with_the_generators_cache():
    """A prompt is expanded, the tokens after it are absorbed."""
    model, case = GPT(LATENT), latent()
    cache, part, x_BTC = KVCache(model, [30] * B, T), model.h[0].attn, case.weights["x"]
    found = []
    for start, end in [(0, 30), *((i, i + 1) for i in range(30, T))]:
        cache.extend(end - start)
        rotation = model.wpe(x_BTC[:, start:end], cache.positions(end - start))[1]
        inputs = BlockInputs(IDS_BT[:, start:end], cache, None, rotation)
        found.append(call(part, case.weights, x_BTC[:, start:end], inputs))
    expected = case.twin(case.weights)
    assert difference({"output": torch.cat(found, dim=1)}, {"output": expected}) <= TOLERANCE
    assert difference({"output": torch.cat(found[:1] + found[:0:-1], dim=1)}, {"output": expected}) > MISTAKE
