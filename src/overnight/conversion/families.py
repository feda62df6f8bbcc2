"""The classes of Transformers that compute the same as a model of ours: a table of switches, and the choice.

Each class has its functions in `gpt2_format`, `nanochat_format` or `llama_format`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from overnight.conversion.block_layouts import Weights
from overnight.conversion.config_fields import ConfigReader, Fields, shorten
from overnight.conversion.gpt2_format import describe_gpt2, import_gpt2, to_gpt2
from overnight.conversion.llama_format import (
    describe_deepseek_v3,
    describe_llama,
    describe_qwen3,
    describe_qwen3_moe,
    import_deepseek_block,
    import_llama_block,
    import_qwen3_block,
    import_qwen3_moe_block,
    to_deepseek_v3,
    to_llama,
    to_qwen3,
    to_qwen3_moe,
)
from overnight.conversion.model_layout import Exported, import_model
from overnight.conversion.nanochat_format import describe_nanochat, import_nanochat_block, to_nanochat
from overnight.model.model_config import ModelConfig

Switches = Mapping[str, tuple[object, ...]]


class Family(NamedTuple):
    """A class of Transformers."""

    class_name: str
    computes: Switches
    """The values of our switches that it computes; all values of those that are not named."""
    export: Callable[[ModelConfig, Weights], Exported]
    describe: Callable[[ConfigReader], ModelConfig]
    import_weights: Callable[[ModelConfig, Mapping[str, Tensor]], tuple[ModelConfig, Weights]]


# A shortcut mixes the embedding into every block: its gain of the stream alone could be folded into the
# weights, since RMSNorm forgets the scale, but not its gain of the embedding.
NONE_HAS: Switches = {"embedding_shortcut": (False,), "value_embeddings": ("none",)}
ROTARY: Switches = {"positions": ("rotary",), "normalization": ("rms",), **NONE_HAS}
GATED: Switches = {
    **ROTARY,
    "activation": ("swiglu", "relu2"),
    "logit_softcap": (None,),
    "latent_rank": (None,),
    "n_expert": (0,),
    "shared_experts": (None,),
}
UNWINDOWED: Switches = {"window_pattern": ("L",)}

FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        "GPT2LMHeadModel",
        {
            **NONE_HAS,
            **UNWINDOWED,
            "positions": ("learned",),
            "normalization": ("layer",),
            "norm_gains": (True,),
            "biases": (True,),
            "qk_norm": (False,),
            "activation": ("gelu",),
            "feed_forward_width": ("4 n_embd",),
            "tied_head": (True,),
            "embedding_norm": (False,),
            "logit_softcap": (None,),
            "n_kv_head": ("n_head",),
            "latent_rank": (None,),
            "n_expert": (0,),
        },
        to_gpt2,
        describe_gpt2,
        import_gpt2,
    ),
    "nanochat": Family(
        "NanoChatForCausalLM",
        {
            **ROTARY,
            **UNWINDOWED,
            "rotary_scaling": ("none",),
            "norm_gains": (False,),
            "biases": (False,),
            "qk_norm": (True,),
            "activation": ("relu2", "gelu"),
            "embedding_norm": (True,),
            "latent_rank": (None,),
            "n_expert": (0,),
        },
        to_nanochat,
        describe_nanochat,
        partial(import_model, export=to_nanochat, import_block=import_nanochat_block),
    ),
    "llama": Family(
        "LlamaForCausalLM",
        {**GATED, **UNWINDOWED, "qk_norm": (False,)},
        to_llama,
        describe_llama,
        partial(import_model, export=to_llama, import_block=import_llama_block),
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        {**GATED, "biases": (False,), "qk_norm": (True,)},
        to_qwen3,
        describe_qwen3,
        partial(import_model, export=to_qwen3, import_block=import_qwen3_block),
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        {
            **{name: allowed for name, allowed in GATED.items() if name != "n_expert"},
            **UNWINDOWED,
            "biases": (False,),
            "qk_norm": (True,),
            "balance_rate": (0.0,),
        },
        to_qwen3_moe,
        describe_qwen3_moe,
        partial(import_model, export=to_qwen3_moe, import_block=import_qwen3_moe_block),
    ),
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM",
        {
            **{name: allowed for name, allowed in GATED.items() if name != "latent_rank"},
            **UNWINDOWED,
            "biases": (False,),
        },
        to_deepseek_v3,
        describe_deepseek_v3,
        partial(import_model, export=to_deepseek_v3, import_block=import_deepseek_block),
    ),
}
"""model_type in config.json -> its class, the first choice first.

Without experts Qwen3Moe is Qwen3, and without latent attention DeepseekV3 is Llama, which come before them.
"""

LEFT_OUT = {
    "experts_per_token": "chosen_experts",
    "latent_rotary_channels": "rotary_channels",
    "feed_forward_width": "hidden_width",
}
"""Settings that are left out where the value follows from others anyway, and what they decide."""

STRUCTURE = ("positions", "normalization", "latent_rank", "n_expert")
"""The switches by which a class is said to be near."""


def choose_family(config: ModelConfig) -> Family:
    """The class that computes the same. Raises ValueError, naming all switches that are in the way."""
    switches = effective_switches(config)
    obstacles = {
        kind: [name for name, allowed in family.computes.items() if switches[name] not in allowed]
        for kind, family in FAMILIES.items()
    }
    kind = min(obstacles, key=lambda kind: (len({*obstacles[kind]} & {*STRUCTURE}), len(obstacles[kind])))
    nearest = FAMILIES[kind]
    if names := obstacles[kind]:
        present = ", ".join(_setting(name, switches[name]) for name in names)
        needed = ", ".join(_setting(name, nearest.computes[name][0]) for name in names)
        raise ValueError(
            f"no class of Transformers computes this model: the nearest, {nearest.class_name}, does not have "
            f"{present}; a model trained with {needed} can be written"
        )
    return nearest


def effective_switches(config: ModelConfig) -> dict[str, object]:
    """The switches that change what a trained model computes; those that change nothing at their default."""
    is_windowed = any(config.window(layer) is not None for layer in range(config.n_layer))
    named = {name for family in FAMILIES.values() for name in family.computes}
    return {
        **{name: getattr(config, name) for name in named},
        "feed_forward_width": "4 n_embd" if config.hidden_width == 4 * config.n_embd else config.hidden_width,
        "n_kv_head": "n_head" if config.kv_heads == config.n_head else config.kv_heads,
        "window_pattern": config.window_pattern if is_windowed else "L",
        "shared_experts": config.shared_experts or None,
        "balance_rate": config.load_balance_rate if config.n_expert else 0.0,
    }


def _setting(name: str, value: object) -> str:
    return f"{name}={'none' if value is None else value}"


def read_model_config(content: Fields, origin: Path) -> tuple[Family, ModelConfig]:
    """Class and configuration of a config.json. Raises ValueError, naming the fields that do not fit."""
    kind = content.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(f"{origin}: model_type is {shorten(kind)}, not {' or '.join(map(repr, FAMILIES))}")
    family, reader = FAMILIES[kind], ConfigReader(content)
    config = family.describe(reader)
    if problems := reader.problems or config.problems():
        raise ValueError(f"{origin} does not describe a {family.class_name} of ours: {'; '.join(problems)}")
    for name, value in LEFT_OUT.items():
        left_out: Fields = {name: None}
        shorter = replace(config, **left_out)
        if getattr(shorter, value) == getattr(config, value):
            config = shorter
    return family, config
