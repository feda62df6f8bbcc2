"""The settings of a model that are sizes or switches, and short names of the switches. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from overnight.model.model_config import ModelConfig

SIZES = frozenset({"n_layer", "n_head", "n_embd", "context_length", "vocab_size", "dropout"})
"""Settings of ModelConfig that GPT-2's own sizes differ in."""
MODEL_SWITCHES = {field.name: field.default for field in fields(ModelConfig) if field.name not in SIZES}
"""All other settings of ModelConfig, and their defaults, which are GPT-2's."""
FIXED: dict[str, dict[Any, str]] = {
    "positions": {"rotary": "rotary"},
    "rotary_scaling": {"yarn": "yarn"},
    "normalization": {"rms": "rms"},
    "norm_gains": {False: "no gains"},
    "biases": {False: "no biases"},
    "qk_norm": {True: "qk norm"},
    "activation": {"relu2": "relu2", "swiglu": "swiglu"},
    "tied_head": {False: "untied head"},
    "embedding_norm": {True: "embedding norm"},
    "zero_projections": {True: "zero projections"},
    "embedding_shortcut": {True: "embedding shortcut"},
    "value_embeddings": {"alternate": "value embeddings", "all": "value embeddings in all blocks"},
    "optimizer": {"muon": "muon"},
}
"""What a value is called."""
COUNTED = {
    "logit_softcap": "soft cap {}",
    "n_kv_head": "{} key-value heads",
    "window_pattern": "windows {}",
    "latent_rank": "latent attention of rank {}",
    "n_expert": "{} experts",
    "feed_forward_width": "feed-forward width {}",
}


def describe_parts(settings: Mapping[str, Any]) -> list[str]:
    """Short words for the switches of a model and its optimizer that are not GPT-2's; [] for GPT-2.

    `settings` are the values by their names; a name that is missing has its default.
    """
    found = [
        word
        for name, words in FIXED.items()
        for value, word in words.items()
        if type(settings.get(name)) is type(value) and settings[name] == value
    ]
    defaults = vars(ModelConfig())
    for name, words in COUNTED.items():
        value = settings.get(name)
        if value is not None and value != defaults[name]:
            found.append(words.format(value))
    return found
