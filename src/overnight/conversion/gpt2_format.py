"""GPT-2 as Transformers' GPT2LMHeadModel, and read from there.

    transformer.h.0.attn.c_attn.weight ...   the same names as ours, behind a prefix
    no lm_head                               it is tied to wte

Transformers stores the four matrices of a block as Conv1D, (in, out); here they are nn.Linear's, (out, in).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, equal

from overnight.conversion.block_layouts import Weights
from overnight.conversion.config_fields import ConfigReader, Fields
from overnight.conversion.model_layout import Exported
from overnight.model.model_config import ModelConfig

PREFIX = "transformer."
WRAPPERS = re.compile(r"(?:(?:module|_orig_mod|transformer)\.)+")
"""What DistributedDataParallel, torch.compile and GPT2LMHeadModel put in front of GPT-2's names."""
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
BUFFERS = (".attn.bias", ".attn.masked_bias")  # the causal mask, which old versions saved too

SIZE_NAMES = {
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "n_positions": "context_length",
    "vocab_size": "vocab_size",
}
"""Names of sizes in config.json -> names in ModelConfig."""

SUPPORTED_VALUES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "activation_function": ("gelu_new", ("gelu_new", "gelu_pytorch_tanh")),
    "layer_norm_epsilon": (1e-5, (1e-5,)),
    "scale_attn_weights": (True, (True,)),
    "scale_attn_by_inverse_layer_idx": (False, (False,)),
    "add_cross_attention": (False, (False,)),
    "tie_word_embeddings": (True, (True,)),
    "quantization_config": (None, (None,)),
}
"""The switches that change what a GPT2LMHeadModel computes: the default of a missing key, then all values
that this package's GPT-2 implements, the written one first."""


def to_gpt2(config: ModelConfig, weights: Weights) -> Exported:
    """The same weights, the four matrices of a block transposed."""
    switches = {name: allowed[0] for name, (_, allowed) in SUPPORTED_VALUES.items() if allowed[0] is not None}
    fields = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **switches,
        **{theirs: getattr(config, ours) for theirs, ours in SIZE_NAMES.items()},
        "n_ctx": config.context_length,  # older name of n_positions, which some converters read
        "n_inner": None,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config.dropout),
        "initializer_range": 0.02,
        "torch_dtype": "float32",
    }
    return fields, {PREFIX + name: w.T if name.endswith(CONV1D) else w for name, w in weights.items()}


def describe_gpt2(reader: ConfigReader) -> ModelConfig:
    """The model of a GPT-2's config.json. Dropout is read from resid_pdrop."""
    for name, (default, allowed) in SUPPORTED_VALUES.items():
        reader.one_of(name, default, allowed)
    sizes: Fields = {ours: reader.whole(theirs) for theirs, ours in SIZE_NAMES.items()}
    reader.one_of("n_inner", None, (None, 4 * sizes["n_embd"]))
    return ModelConfig(dropout=reader.number("resid_pdrop", 0.1), **sizes)


def import_gpt2(config: ModelConfig, theirs: Mapping[str, Tensor]) -> tuple[ModelConfig, Weights]:
    """The same configuration, and our weights. Raises ValueError if they differ in size."""
    weights = import_weights(theirs, is_conv1d=True)
    _check_sizes(config, weights)
    return config, weights


def _check_sizes(config: ModelConfig, weights: Mapping[str, Tensor]) -> None:
    """Raise ValueError if config.json and the weights differ, before a wrong size could fill the memory."""
    layers = len({name.split(".")[1] for name in weights if name.startswith("h.")})
    problems = [] if layers == config.n_layer else [f"{layers} blocks, not n_layer={config.n_layer}"]
    for name, rows in (("wte.weight", config.vocab_size), ("wpe.weight", config.context_length)):
        shape = tuple(weights[name].shape) if name in weights else None
        if shape != (rows, config.n_embd):
            problems.append(f"{name} has shape {shape}, not {(rows, config.n_embd)}")
    if problems:
        raise ValueError(f"config.json and the weights differ: {'; '.join(problems)}")


def import_weights(theirs: Mapping[str, Tensor], *, is_conv1d: bool) -> dict[str, Tensor]:
    """Weights with Hugging Face's names, under our names and in our layout.

    `is_conv1d`: the four matrices of a block are (in, out). Raises ValueError if the head is not tied to the
    embedding, if two names become one, and for weights that are not floating-point.
    """
    ours: dict[str, Tensor] = {}
    for name, weight in theirs.items():
        if name.endswith(BUFFERS):
            continue
        wrapper = WRAPPERS.match(name)
        bare = name[wrapper.end() :] if wrapper else name
        if bare in ours:
            raise ValueError(f"{bare} occurs twice, once as {name}; remove one of them")
        is_transposed = is_conv1d and name.endswith(CONV1D) and weight.dim() == 2
        ours[bare] = weight.T if is_transposed else weight
    head = ours.pop("lm_head.weight", None)
    if head is not None and not equal(head, ours.get("wte.weight", head)):
        raise ValueError("lm_head.weight differs from wte.weight; GPT-2's head is its embedding")
    for name, weight in ours.items():
        if not weight.is_floating_point():
            raise ValueError(f"{name} is {weight.dtype}; quantised weights are not supported")
    return ours
