"""Models written as Transformers' NanoChat, and read from there: nanochat's architecture of October 2025.

    model.embed_tokens.weight                        wte
    model.layers.0.self_attn.{q,k,v,o}_proj.weight   h.0.attn.c_attn (three parts), h.0.attn.c_proj
    model.layers.0.mlp.{fc1,fc2}.weight              h.0.mlp.{c_fc,c_proj}
    lm_head.weight                                   lm_head, or none where it is tied to wte

No norm has gains, so that none is stored.
"""

from __future__ import annotations

from overnight.conversion.block_layouts import Weights, export_heads, import_heads, swap_halves
from overnight.conversion.config_fields import ConfigReader
from overnight.conversion.model_layout import (
    Exported,
    check_head_channels,
    export_blocks,
    read_shared_fields,
    shared_fields,
)
from overnight.model.model_config import ModelConfig

NANOCHAT_ACTIVATIONS = {"relu2": "relu2", "gelu_pytorch_tanh": "gelu", "gelu_new": "gelu"}
"""hidden_act -> our activations."""


def to_nanochat(config: ModelConfig, weights: Weights) -> Exported:
    """Norms without gains, of the embedding too; QK-norm, rotary positions, logits bounded by a tanh.

    NanoChat rotates the other way: the halves of each head's rows of queries and keys change places. It
    normalizes after the rotation, ours before: equal, since a rotation keeps the norm (YaRN's does not).
    """
    fields = {
        **shared_fields(config, "NanoChatForCausalLM", "nanochat"),
        "hidden_act": next(
            theirs for theirs, ours in NANOCHAT_ACTIVATIONS.items() if ours == config.activation
        ),
        "tie_word_embeddings": config.tied_head,
        "final_logit_softcapping": config.logit_softcap,
    }
    ends = {"model.embed_tokens.weight": weights["wte.weight"]}
    if not config.tied_head:
        ends["lm_head.weight"] = weights["lm_head.weight"]
    return fields, {**ends, **export_blocks(config, weights, _nanochat_block)}


def describe_nanochat(reader: ConfigReader) -> ModelConfig:
    """The model of a NanoChat's config.json."""
    found = read_shared_fields(reader, kv_heads=None)
    act = reader.one_of("hidden_act", "relu2", tuple(NANOCHAT_ACTIVATIONS))
    reader.one_of("attention_bias", False, (False,))
    if found.get("rotary_scaling", "none") != "none":
        reader.problems.append("rope_type is 'yarn', whose magnitude NanoChat's norm removes")
    config = ModelConfig(
        **{**found, "activation": NANOCHAT_ACTIVATIONS[act]},
        norm_gains=False,
        biases=False,
        qk_norm=True,
        embedding_norm=True,
        logit_softcap=reader.number_or_none("final_logit_softcapping", 15.0),
    )
    check_head_channels(reader, config, None)
    return config


def _nanochat_block(config: ModelConfig, own: Weights) -> Weights:
    feed_forward = {"mlp.fc1.weight": own["mlp.c_fc.weight"], "mlp.fc2.weight": own["mlp.c_proj.weight"]}
    return {**export_heads(config, own, swap_halves), **feed_forward}


def import_nanochat_block(config: ModelConfig, theirs: Weights) -> Weights:
    """The inverse."""
    feed_forward = {
        "mlp.c_fc.weight": theirs["mlp.fc1.weight"],
        "mlp.c_proj.weight": theirs["mlp.fc2.weight"],
    }
    return {**import_heads(config, theirs, swap_halves), **feed_forward}
