"""Models written as Transformers' Llama, Qwen3, Qwen3Moe and DeepseekV3, and read from there.

    model.embed_tokens.weight                        wte
    model.layers.0.input_layernorm.weight            h.0.ln_1
    model.layers.0.self_attn.{q,k,v,o}_proj          h.0.attn.c_attn (three parts), h.0.attn.c_proj
    model.layers.0.post_attention_layernorm.weight   h.0.ln_2
    model.layers.0.mlp.{gate,up,down}_proj           h.0.mlp.c_fc (two parts), h.0.mlp.c_proj
    model.norm.weight                                ln_f
    lm_head.weight                                   lm_head, or none where it is tied to wte

Each `to_...` returns the fields of config.json and the tensors of a model with the same logits, each
`describe_...` reads a config.json, and each `import_..._block` is the way back of a block's tensors.
"""

from __future__ import annotations

import torch

from overnight.conversion.block_layouts import (
    Weights,
    export_experts,
    export_gated,
    export_heads,
    export_latent,
    export_norms,
    export_unit_gains,
    import_experts,
    import_gated,
    import_heads,
    import_latent,
    import_norms,
    import_unit_gains,
)
from overnight.conversion.config_fields import ConfigReader, Fields
from overnight.conversion.model_layout import (
    Exported,
    check_head_channels,
    export_blocks,
    read_shared_fields,
    shared_fields,
)
from overnight.model.fused import rms_norm
from overnight.model.model_config import ModelConfig

ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu", "relu": "relu2"}
"""hidden_act of a gated feed-forward part -> our activations; relu only where gate and up are equal."""


# ---------------------------------------------------------------- Llama


def to_llama(config: ModelConfig, weights: Weights) -> Exported:
    """RMSNorm with gains, rotary positions with or without YaRN, a gated feed-forward part, biases or none.

    A feed-forward part with relu2 has hidden_act=relu and gate = up, since relu(z) z = relu(z)^2. The norm of
    an embedding depends on its token only, so that the rows are stored normalized: wte / rms(wte). A tied
    head is stored by itself then.
    """
    fields = {**_gated_fields(config, "LlamaForCausalLM", "llama"), "mlp_bias": config.biases}
    return fields, {**_ends(config, weights), **export_blocks(config, weights, _llama_block)}


def describe_llama(reader: ConfigReader) -> ModelConfig:
    """The model of a Llama's config.json."""
    found = _read_gated_fields(reader, kv_heads=None)
    biases = reader.one_of("attention_bias", False, (False, True))
    reader.one_of("mlp_bias", False, (biases,))
    config = ModelConfig(**found, biases=biases)
    check_head_channels(reader, config, None)
    return config


def _llama_block(config: ModelConfig, own: Weights) -> Weights:
    return {**export_norms(config, own), **export_heads(config, own), **export_gated(config, own)}


def import_llama_block(config: ModelConfig, theirs: Weights) -> Weights:
    """The inverse."""
    return {**import_norms(config, theirs), **import_heads(config, theirs), **import_gated(config, theirs)}


# ---------------------------------------------------------------- Qwen3


def to_qwen3(config: ModelConfig, weights: Weights) -> Exported:
    """As Llama without biases; queries and keys are normalized before their rotation, with gains of 1.

    A short window of W positions is sliding_window=W: both reach from position i back to i - W + 1.
    """
    windows = [config.window(layer) for layer in range(config.n_layer)]
    short = next((window for window in windows if window is not None), None)
    fields = {
        **_gated_fields(config, "Qwen3ForCausalLM", "qwen3"),
        "use_sliding_window": short is not None,
        "sliding_window": short,
        "max_window_layers": config.n_layer,
        "layer_types": ["full_attention" if window is None else "sliding_attention" for window in windows],
    }
    return fields, {**_ends(config, weights), **export_blocks(config, weights, _qwen3_block)}


def describe_qwen3(reader: ConfigReader) -> ModelConfig:
    """The model of a Qwen3's config.json."""
    found = _read_gated_fields(reader, kv_heads=32)
    reader.one_of("attention_bias", False, (False,))
    config = ModelConfig(**found, **_read_windows(reader, found["n_layer"]), biases=False, qk_norm=True)
    check_head_channels(reader, config, 128)
    return config


def _read_windows(reader: ConfigReader, layers: int) -> Fields:
    """window_pattern and short_window, from use_sliding_window, sliding_window and layer_types."""
    is_used = reader.one_of("use_sliding_window", False, (False, True))
    kinds = reader.content.get("layer_types")
    if kinds is None:
        if is_used and reader.whole("max_window_layers", 28) < layers:
            reader.problems.append("use_sliding_window is set, and the last block here has no window")
        return {}
    letters = {"full_attention": "L", "sliding_attention": "S"}
    if (
        not isinstance(kinds, list)
        or any(kind not in list(letters) for kind in kinds)
        or len(kinds) != layers
    ):
        reader.problems.append(f"layer_types is not {layers} times full_attention or sliding_attention")
        return {}
    pattern = "".join(letters[kind] for kind in kinds)
    if "S" not in pattern:
        return {}
    if not is_used or pattern[-1] == "S":
        reader.problems.append(
            "layer_types has sliding_attention in the last block"
            if is_used
            else "layer_types has sliding_attention, and use_sliding_window is false"
        )
    sizes = range(1, layers + 1)  # the last block is L whatever the pattern says
    size = next(n for n in sizes if all(pattern[i] == pattern[i % n] for i in range(layers - 1)))
    return {"window_pattern": pattern[:size], "short_window": reader.whole("sliding_window", 4096)}


def _qwen3_block(config: ModelConfig, own: Weights) -> Weights:
    return {**_llama_block(config, own), **export_unit_gains(config, own)}


def import_qwen3_block(config: ModelConfig, theirs: Weights) -> Weights:
    """The inverse. Raises ValueError for learned gains of queries and keys."""
    return {**import_unit_gains(config, theirs), **import_llama_block(config, theirs)}


# ---------------------------------------------------------------- Qwen3Moe


def to_qwen3_moe(config: ModelConfig, weights: Weights) -> Exported:
    """As Qwen3 without windows, with experts: shares of the softmax of all scores, divided by their sum.

    Ours are the softmax of the chosen scores, which is the same.
    """
    fields = {
        **_gated_fields(config, "Qwen3MoeForCausalLM", "qwen3_moe"),
        "use_sliding_window": False,
        "moe_intermediate_size": config.hidden_width,
        "num_experts": config.n_expert,
        "num_experts_per_tok": config.chosen_experts,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "output_router_logits": False,
    }
    return fields, {**_ends(config, weights), **export_blocks(config, weights, _qwen3_moe_block)}


def describe_qwen3_moe(reader: ConfigReader) -> ModelConfig:
    """The model of a Qwen3Moe's config.json; all its blocks have experts."""
    found = _read_gated_fields(reader, kv_heads=4)
    reader.one_of("attention_bias", False, (False,))
    reader.one_of("use_sliding_window", False, (False,))
    reader.one_of("norm_topk_prob", False, (True,))
    reader.one_of("decoder_sparse_step", 1, (1,))
    reader.one_of("mlp_only_layers", None, ([], None))
    count = "num_local_experts" if "num_local_experts" in reader.content else "num_experts"  # 5 and 4
    experts = {
        "feed_forward_width": reader.whole("moe_intermediate_size", 768),
        "n_expert": reader.whole(count, 128),
        "experts_per_token": reader.whole("num_experts_per_tok", 8),
        "balance_rate": 0.0,
    }
    config = ModelConfig(**{**found, **experts}, biases=False, qk_norm=True)
    check_head_channels(reader, config, None)
    return config


def _qwen3_moe_block(config: ModelConfig, own: Weights) -> Weights:
    attention = {**export_heads(config, own), **export_unit_gains(config, own)}
    return {**export_norms(config, own), **attention, **export_experts(config, own)}


def import_qwen3_moe_block(config: ModelConfig, theirs: Weights) -> Weights:
    """The inverse. Raises ValueError for learned gains of queries and keys."""
    attention = {**import_unit_gains(config, theirs), **import_heads(config, theirs)}
    return {**import_norms(config, theirs), **attention, **import_experts(config, theirs)}


# ---------------------------------------------------------------- DeepseekV3


def to_deepseek_v3(config: ModelConfig, weights: Weights) -> Exported:
    """Latent attention with a dense feed-forward part in each block, and no low rank of the queries.

    Its experts are chosen by a sigmoid, ours by a softmax, so that models with experts have no twin here.
    """
    content = config.head_channels - config.rotary_channels
    fields = {
        **_gated_fields(config, "DeepseekV3ForCausalLM", "deepseek_v3"),
        "q_lora_rank": None,
        "kv_lora_rank": config.latent_rank,
        "qk_rope_head_dim": config.rotary_channels,
        "qk_nope_head_dim": content,
        "v_head_dim": config.head_channels,
        "rope_interleave": True,
        "first_k_dense_replace": config.n_layer,
        "num_nextn_predict_layers": 0,
    }
    del fields["head_dim"]  # it is qk_rope_head_dim there
    return fields, {**_ends(config, weights), **export_blocks(config, weights, _deepseek_block)}


def describe_deepseek_v3(reader: ConfigReader) -> ModelConfig:
    """The model of a DeepseekV3's config.json; all its blocks are dense."""
    found = _read_gated_fields(reader, kv_heads=128)
    reader.one_of("attention_bias", False, (False,))
    reader.one_of("q_lora_rank", 1536, (None,))
    reader.one_of("rope_interleave", True, (True,))
    if reader.whole("first_k_dense_replace", 3) < found["n_layer"]:
        reader.problems.append(
            "first_k_dense_replace is less than num_hidden_layers: some blocks have experts"
        )
    rotated, content = reader.whole("qk_rope_head_dim", 64), reader.whole("qk_nope_head_dim", 128)
    channels = found["n_embd"] // found["n_head"]
    if found["n_kv_head"] is not None:
        reader.problems.append(f"num_key_value_heads is {found['n_kv_head']}, not num_attention_heads")
    if rotated + content != channels or reader.whole("v_head_dim", 128) != channels:
        reader.problems.append(
            f"qk_nope_head_dim + qk_rope_head_dim and v_head_dim are not both hidden_size={found['n_embd']} "
            f"/ num_attention_heads={found['n_head']}"
        )
    latent = {"latent_rank": reader.whole("kv_lora_rank", 512), "latent_rotary_channels": rotated}
    return ModelConfig(**{**found, **latent, "n_kv_head": None}, biases=False)


def _deepseek_block(config: ModelConfig, own: Weights) -> Weights:
    return {**export_norms(config, own), **export_latent(config, own), **export_gated(config, own)}


def import_deepseek_block(config: ModelConfig, theirs: Weights) -> Weights:
    """The inverse."""
    return {**import_norms(config, theirs), **import_latent(config, theirs), **import_gated(config, theirs)}


# ---------------------------------------------------------------- what the four have in common


def _gated_fields(config: ModelConfig, class_name: str, model_type: str) -> Fields:
    act = next(theirs for theirs, ours in ACTIVATIONS.items() if ours == config.activation)
    is_tied = config.tied_head and not config.embedding_norm
    fields = {"hidden_act": act, "tie_word_embeddings": is_tied, "head_dim": config.head_channels}
    return {**shared_fields(config, class_name, model_type), **fields}


def _read_gated_fields(reader: ConfigReader, kv_heads: int | None) -> Fields:
    activation = ACTIVATIONS[reader.one_of("hidden_act", "silu", tuple(ACTIVATIONS))]
    return {**read_shared_fields(reader, kv_heads), "activation": activation}


def _ends(config: ModelConfig, weights: Weights) -> Weights:
    """Embedding, last norm and head."""
    embedding = weights["wte.weight"]
    gain = weights.get("ln_f.weight", torch.ones(config.n_embd, device=embedding.device))
    rows = rms_norm(embedding) if config.embedding_norm else embedding
    ends = {"model.embed_tokens.weight": rows, "model.norm.weight": gain}
    if config.tied_head and not config.embedding_norm:
        return ends
    return {**ends, "lm_head.weight": embedding if config.tied_head else weights["lm_head.weight"]}
