"""Every switch of a model has a word."""

from __future__ import annotations

import dataclasses

from overnight.model.model_config import ModelConfig
from overnight.model.parts import COUNTED, FIXED, describe_parts
from overnight.training import OptimizerConfig

SIZES = {"n_layer", "n_head", "n_embd", "context_length", "vocab_size", "dropout"}
DETAILS = {  # of a switch that has a word
    *("rotary_base", "trained_context_length", "short_window", "latent_rotary_channels"),
    *("experts_per_token", "shared_experts", "balance_rate"),
}


def test_every_switch_has_a_word_and_gpt2_none():
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    assert fields - SIZES - DETAILS == {*FIXED, *COUNTED} - {"optimizer"}
    assert describe_parts(dataclasses.asdict(ModelConfig()) | dataclasses.asdict(OptimizerConfig())) == []


def test_parts_are_in_order_and_strange_values_are_left_out():
    found = describe_parts({"qk_norm": True, "positions": "rotary", "logit_softcap": 15.0, "n_kv_head": 2})
    assert found == ["rotary", "qk norm", "soft cap 15.0", "2 key-value heads"]
    assert describe_parts({"qk_norm": 1, "positions": ["rotary"], "biases": None, "optimizer": {}}) == []
