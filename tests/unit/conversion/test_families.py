"""The choice of a class of Transformers, and folders whose config.json or weights are wrong."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from overnight.conversion.families import FAMILIES, choose_family
from overnight.conversion.huggingface import write_huggingface
from overnight.conversion.open_model import open_model
from overnight.model.gpt import GPT
from overnight.model.model_config import ModelConfig
from overnight.recipe import load_recipe
from overnight.tokenizer.open_tokenizer import build_tokenizer

TOKENIZER = build_tokenizer("characters", ["the quick brown fox"])
SIZES = ModelConfig(n_layer=2, n_head=2, n_embd=16, context_length=32, vocab_size=TOKENIZER.vocab_size)
ROTARY = {"positions": "rotary", "normalization": "rms", "biases": False}
NANOCHAT = {
    **ROTARY,
    **{"norm_gains": False, "qk_norm": True, "activation": "relu2", "embedding_norm": True},
    **{"tied_head": False, "logit_softcap": 15.0},
}
LLAMA = {**ROTARY, "activation": "swiglu"}
QWEN = {**LLAMA, "qk_norm": True}
MOE = {**QWEN, "n_expert": 4, "balance_rate": 0.0}
DEEPSEEK = {**LLAMA, "latent_rank": 8}
WRITTEN: dict[str, dict[str, Any]] = {
    **{"nanochat": NANOCHAT, "llama": LLAMA, "qwen3": QWEN, "qwen3_moe": MOE, "deepseek_v3": DEEPSEEK}
}


def build(switches: dict[str, Any]) -> GPT:
    """A model whose gains are not 1."""
    model = GPT(replace(SIZES, **switches), seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.1)
    model.zero_padding()
    return model.eval()


# ---------------------------------------------------------------- the choice


@pytest.mark.parametrize(
    ("kind", "switches"),
    [
        *(("gpt2", {}), ("gpt2", {"zero_projections": True, "dropout": 0.1, "n_kv_head": 2})),
        *((kind, switches) for kind, switches in WRITTEN.items()),
        ("nanochat", {**NANOCHAT, "logit_softcap": None}),
        ("qwen3", {**NANOCHAT, "logit_softcap": None, "embedding_norm": False}),
        ("qwen3", {**QWEN, "window_pattern": "SL"}),
        ("llama", {**LLAMA, "window_pattern": "LS"}),  # the last block always sees the whole context
        ("llama", {**LLAMA, "biases": True, "norm_gains": False, "embedding_norm": True}),
    ],
)
def test_class_is_chosen(kind: str, switches: dict[str, Any]) -> None:
    assert choose_family(replace(SIZES, **switches)) is FAMILIES[kind]


def test_recipe_can_be_written() -> None:
    config = replace(load_recipe("modern-export").model, vocab_size=50257)
    assert choose_family(config) is FAMILIES["nanochat"]


@pytest.mark.parametrize(
    ("switches", "nearest", "named"),
    [
        (
            {**NANOCHAT, "embedding_shortcut": True, "value_embeddings": "alternate"},
            "NanoChatForCausalLM",
            "embedding_shortcut=True, value_embeddings=alternate; a model trained with "
            "embedding_shortcut=False, value_embeddings=none can",
        ),
        (
            {"activation": "relu2", "tied_head": False},
            "GPT2LMHeadModel",
            "activation=relu2, tied_head=False;",
        ),
        (
            {"feed_forward_width": 20, "n_kv_head": 1},
            "GPT2LMHeadModel",
            "feed_forward_width=20, n_kv_head=1;",
        ),
        (
            {**NANOCHAT, "rotary_scaling": "yarn", "trained_context_length": 8},
            "NanoChat",
            "rotary_scaling=yarn;",
        ),
        (
            {**LLAMA, "logit_softcap": 30.0},
            "LlamaForCausalLM",
            "logit_softcap=30.0; .* logit_softcap=none can",
        ),
        ({**LLAMA, "window_pattern": "SL"}, "LlamaForCausalLM", "window_pattern=SL;"),
        (
            {**MOE, "balance_rate": None, "shared_experts": 1},
            "Qwen3Moe",
            "shared_experts=1, balance_rate=0.001;",
        ),
        ({**MOE, "qk_norm": False}, "Qwen3Moe", "qk_norm=False;"),
        ({**DEEPSEEK, "n_expert": 4, "balance_rate": 0.0}, "DeepseekV3", "n_expert=4;"),
        ({**DEEPSEEK, "activation": "gelu", "biases": True}, "DeepseekV3", "activation=gelu, biases=True;"),
    ],
)
def test_refusal_names_every_switch_in_the_way(
    switches: dict[str, Any], nearest: str, named: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=rf"nearest, {nearest}.* does not have {named}") as raised:
        write_huggingface(build(switches), TOKENIZER, tmp_path / "out")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- wrong folders


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    for kind, switches in WRITTEN.items():
        write_huggingface(build(switches), TOKENIZER, folder / kind)
    return folder


@pytest.fixture
def changed(originals: Path, tmp_path: Path) -> Callable[..., str]:
    """`changed(kind, weights, **fields)`: a folder with other fields (... removes one) or other weights."""

    def change(kind: str, weights: Callable[[dict[str, Tensor]], Any] | None = None, **fields: Any) -> str:
        folder = tmp_path / "model"
        folder.mkdir()
        for path in (originals / kind).iterdir():
            (folder / path.name).symlink_to(path)
        content = {**json.loads((folder / "config.json").read_text()), **fields}
        (folder / "config.json").unlink()
        kept = {name: value for name, value in content.items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(kept))
        if weights is not None:
            found = load_file(folder / "model.safetensors")
            weights(found)
            (folder / "model.safetensors").unlink()
            save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
        return str(folder)

    return change


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
SHARED_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"num_hidden_layers": "2"}, "num_hidden_layers is '2'"),
    ({"num_hidden_layers": True}, "num_hidden_layers is True"),
    ({"num_hidden_layers": ...}, "num_hidden_layers is None"),
    ({"num_hidden_layers": 10**9}, "2 blocks, not num_hidden_layers=1000000000"),
    ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    ({"hidden_size": [16]}, r"hidden_size is \[16\]"),
    ({"hidden_size": 10**400}, "10{13}|1000000|many|most"),
    ({"vocab_size": 10**9}, "embed_tokens|parameters"),
    ({"vocab_size": SIZES.vocabulary + 1}, "embed_tokens.weight has shape"),
    ({"max_position_embeddings": -1}, "max_position_embeddings is -1"),
    ({"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-05"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({"hidden_act": {"silu": 1}}, "hidden_act is {'silu': 1}"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
    ({"attention_bias": "no"}, "attention_bias is 'no'"),
    ({"attention_dropout": "0"}, "attention_dropout is '0'"),
    ({"attention_dropout": 1.5}, "dropout=1.5"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"rope_parameters": "default"}, "rope_parameters is 'default'"),
    ({"rope_parameters": {"rope_type": "llama3"}}, "rope_type of rope_parameters is 'llama3'"),
    ({"rope_parameters": {"rope_type": ["yarn"]}}, r"rope_type of rope_parameters is \['yarn'\]"),
    ({"rope_parameters": {"rope_theta": "1e4"}}, "rope_theta is '1e4'"),
    ({"rope_parameters": {"rope_theta": -1.0}}, "rotary_base=-1.0"),
    ({"rope_parameters": {"rope_theta": 10**400}}, "rope_theta is 1000"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor of rope_parameters is 0.5"),
    ({"rope_scaling": {**YARN, "factor": 2.0}}, "factor of rope_scaling is 2.0"),
    (
        {"rope_scaling": {**YARN, "original_max_position_embeddings": None}},
        "original_max_position_embeddings=None",
    ),
    ({"rope_scaling": {**YARN, "mscale_all_dim": 1.0}}, "mscale_all_dim of rope_scaling is 1.0"),
    ({"rope_scaling": {**YARN, "beta_fast": 16}}, "beta_fast of rope_scaling is 16"),
]
OWN_FIELDS: list[tuple[str, dict[str, Any], str]] = [
    ("nanochat", {"final_logit_softcapping": 0.0}, "logit_softcap=0.0"),
    ("nanochat", {"final_logit_softcapping": "15"}, "final_logit_softcapping is '15'"),
    ("nanochat", {"rope_parameters": {**YARN}}, "yarn"),
    ("nanochat", {"head_dim": 4}, "head_dim is 4"),
    ("llama", {"mlp_bias": True}, "mlp_bias is True, not False"),
    ("llama", {"attention_bias": True, "mlp_bias": True}, "q_proj.bias is missing"),
    ("llama", {"head_dim": "8"}, "head_dim is '8'"),
    ("llama", {"hidden_act": "relu"}, "model.layers.0: .* gate_proj differs from up_proj"),
    ("llama", {"num_key_value_heads": 3}, "n_kv_head=3"),
    ("qwen3", {"head_dim": ...}, "head_dim is 128"),
    ("qwen3", {"num_key_value_heads": ...}, "n_kv_head=32"),
    ("qwen3", {"layer_types": ["sliding_attention"]}, "layer_types is not 2 times"),
    ("qwen3", {"layer_types": 2}, "layer_types is not 2 times"),
    ("qwen3", {"layer_types": [[], {}]}, "layer_types is not 2 times"),
    ("qwen3", {"layer_types": ["sliding_attention", "full_attention"]}, "use_sliding_window is false"),
    (
        *("qwen3", {"layer_types": ["full_attention", "sliding_attention"], "use_sliding_window": True}),
        "sliding_attention in the last block",
    ),
    (
        *("qwen3", {"layer_types": None, "use_sliding_window": True, "max_window_layers": 1}),
        "the last block here has no window",
    ),
    ("qwen3_moe", {"num_experts": 10**9}, "4 experts, not num_experts=1000000000"),
    ("qwen3_moe", {"num_experts_per_tok": 5}, "experts_per_token=5"),
    ("qwen3_moe", {"norm_topk_prob": ...}, "norm_topk_prob is False"),
    ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers is \[0\]"),
    ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step is 2"),
    ("qwen3_moe", {"moe_intermediate_size": 10**6}, r"gate_proj.weight has shape .*1000000"),
    ("deepseek_v3", {"q_lora_rank": 4}, "q_lora_rank is 4"),
    ("deepseek_v3", {"first_k_dense_replace": 1}, "first_k_dense_replace"),
    ("deepseek_v3", {"v_head_dim": 9}, "v_head_dim"),
    ("deepseek_v3", {"num_key_value_heads": 1}, "num_key_value_heads is 1"),
    ("deepseek_v3", {"rope_interleave": False}, "rope_interleave is False"),
    ("deepseek_v3", {"kv_lora_rank": 10**9}, "kv_a_proj_with_mqa.weight has shape|parameters"),
    ("deepseek_v3", {"qk_rope_head_dim": 8, "qk_nope_head_dim": 0}, "qk_nope_head_dim is 0"),
]


def refuse(folder: str, named: str) -> None:
    """Fails unless the folder is refused in one sentence, and without much memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=named) as raised:
        open_model(folder)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 2000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


@pytest.mark.parametrize(("fields", "named"), SHARED_FIELDS)
def test_wrong_field_is_refused(changed: Callable[..., str], fields: dict[str, Any], named: str) -> None:
    refuse(changed("llama", **fields), named)


@pytest.mark.parametrize(("kind", "fields", "named"), OWN_FIELDS)
def test_wrong_field_of_one_class_is_refused(
    changed: Callable[..., str], kind: str, fields: dict[str, Any], named: str
) -> None:
    refuse(changed(kind, **fields), named)


def test_all_wrong_fields_are_named_at_once(changed: Callable[..., str]) -> None:
    folder = changed("qwen3", rms_norm_eps=1e-5, attention_bias=True, hidden_act="gelu", vocab_size=None)
    refuse(folder, "vocab_size.*rms_norm_eps|rms_norm_eps.*vocab_size")
    with pytest.raises(ValueError, match=r"attention_bias") as raised:
        open_model(folder)
    assert "hidden_act" in str(raised.value)


FIRST = "model.layers.0."


def put(name: str, value: Tensor, weights: dict[str, Tensor]) -> None:
    weights[name] = value


@pytest.mark.parametrize("kind", WRITTEN)
@pytest.mark.parametrize("damage", ["missing", "shape", "dimensions", "integers", "unknown", "layers"])
def test_wrong_weights_are_refused(changed: Callable[..., str], kind: str, damage: str) -> None:
    name = f"{FIRST}self_attn.o_proj.weight"
    damages: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
        "missing": (lambda weights: weights.pop(name), f"{name} is missing"),
        "shape": (partial(put, name, torch.zeros(16, 15)), rf"{name} has shape \(16, 15\), not \(16, 16\)"),
        "dimensions": (partial(put, name, torch.zeros(256)), rf"{name} has shape \(256,\)"),
        "integers": (partial(put, name, torch.zeros(16, 16, dtype=torch.int8)), f"{name} is torch.int8"),
        "unknown": (partial(put, f"{FIRST}surprise", torch.zeros(1)), "surprise is unknown"),
        "layers": (partial(put, "model.layers.7.x", torch.zeros(1)), "3 blocks, not num_hidden_layers=2"),
    }
    change, named = damages[damage]
    refuse(changed(kind, change), named)


@pytest.mark.parametrize(
    ("kind", "name", "value", "named"),
    [
        ("llama", "lm_head.weight", torch.zeros(SIZES.vocabulary, 16), "lm_head.weight differs"),
        ("llama", "module.model.norm.weight", torch.ones(16), "model.norm.weight occurs twice"),
        ("qwen3", f"{FIRST}self_attn.q_norm.weight", torch.full((8,), 1.2), "q_norm.weight is not 1"),
        ("nanochat", f"{FIRST}input_layernorm.weight", torch.ones(16), "input_layernorm.weight is unknown"),
    ],
)
def test_weights_that_ours_has_not_are_refused(
    changed: Callable[..., str], kind: str, name: str, value: Tensor, named: str
) -> None:
    refuse(changed(kind, partial(put, name, value)), named)


@pytest.mark.parametrize("kind", WRITTEN)
def test_unchanged_folder_is_read(changed: Callable[..., str], kind: str) -> None:
    """Negative control of the refusals. Fields that change nothing are no problem."""
    model = open_model(changed(kind, use_cache=False, transformers_version="5.0.0", pretraining_tp=1)).model
    wanted = build(WRITTEN[kind]).weights()
    assert all(torch.equal(weight, wanted[name]) for name, weight in model.weights().items())
