"""A whole model under the names of Llama: blocks, embedding and head; what all descendants have in common."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from overnight.conversion.block_layouts import EXPERT, Weights
from overnight.conversion.config_fields import ConfigReader, Fields, rotary_fields
from overnight.model.fused import RMS_EPSILON
from overnight.model.model_config import ModelConfig, weight_shapes

Exported = tuple[Fields, Weights]
"""The fields of config.json, and the tensors."""
Export = Callable[[ModelConfig, Weights], Exported]
BlockLayout = Callable[[ModelConfig, Weights], Weights]

LAYER = "model.layers."
ENDS = {
    "model.embed_tokens.weight": "wte.weight",
    "model.norm.weight": "ln_f.weight",
    "lm_head.weight": "lm_head.weight",
}
"""Their names outside of the blocks -> ours."""
WRAPPED = re.compile(r"(?:(?:module|_orig_mod)\.)+")  # DistributedDataParallel, torch.compile
BUFFER = ".rotary_emb.inv_freq"  # which old versions saved too
MOST_NAMED = 5  # of the tensors that do not fit


# ---------------------------------------------------------------- config.json


def shared_fields(config: ModelConfig, class_name: str, model_type: str) -> Fields:
    """What the config.json of every descendant says, tied heads aside."""
    return {
        "architectures": [class_name],
        "model_type": model_type,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.kv_heads,
        "hidden_size": config.n_embd,
        "intermediate_size": config.hidden_width,
        "max_position_embeddings": config.context_length,
        "vocab_size": config.vocabulary,
        "rms_norm_eps": RMS_EPSILON,
        **rotary_fields(config),
        "attention_bias": config.biases,
        "attention_dropout": config.dropout,
        "initializer_range": 0.02,
        "pad_token_id": None,
        "torch_dtype": "float32",
    }


def read_shared_fields(reader: ConfigReader, kv_heads: int | None) -> Fields:
    """The settings of ModelConfig that `shared_fields` writes; `kv_heads` where the number is missing."""
    heads, context_length = reader.whole("num_attention_heads"), reader.whole("max_position_embeddings")
    shared = kv_heads if "num_key_value_heads" not in reader.content else None
    if reader.content.get("num_key_value_heads", kv_heads) is not None:
        shared = reader.whole("num_key_value_heads", kv_heads)
    reader.one_of("rms_norm_eps", RMS_EPSILON, (RMS_EPSILON,))
    reader.one_of("quantization_config", None, (None,))
    return {
        "positions": "rotary",
        "normalization": "rms",
        "n_layer": reader.whole("num_hidden_layers"),
        "n_head": heads,
        "n_kv_head": None if shared == heads else shared,
        "n_embd": reader.whole("hidden_size"),
        "feed_forward_width": reader.whole("intermediate_size"),
        "context_length": context_length,
        "vocab_size": reader.whole("vocab_size"),
        "dropout": reader.number("attention_dropout", 0.0),
        "tied_head": reader.one_of("tie_word_embeddings", False, (False, True)),
        **reader.rotation(context_length),
    }


def check_head_channels(reader: ConfigReader, config: ModelConfig, default: int | None) -> None:
    """A problem if head_dim is not hidden_size / num_attention_heads; `default` where it is missing."""
    found = reader.content.get("head_dim", default)
    if found is not None and (type(found) is not int or found * config.n_head != config.n_embd):
        reader.problems.append(
            f"head_dim is {found!r}, not hidden_size={config.n_embd} / num_attention_heads={config.n_head}"
        )


# ---------------------------------------------------------------- tensors


def export_blocks(config: ModelConfig, weights: Weights, export_block: BlockLayout) -> Weights:
    """The tensors of all blocks, under their names."""
    found: Weights = {}
    for layer in range(config.n_layer):
        block = export_block(config, _within(weights, f"h.{layer}."))
        found |= {f"{LAYER}{layer}.{name}": weight for name, weight in block.items()}
    return found


def import_model(
    config: ModelConfig, theirs: Mapping[str, Tensor], export: Export, import_block: BlockLayout
) -> tuple[ModelConfig, Weights]:
    """Our configuration and weights; `export` is the way back, which tells the expected shapes.

    Gains that are all 1 are no gains. Raises ValueError for tensors that are missing, unknown or of another
    shape, before anything of the size that `config` names is allocated, for heads that are not tied as
    `config` says, and for weights that are not floating-point.
    """
    found = _bare_names(theirs)
    if config.tied_head:
        embedding = found.get("model.embed_tokens.weight")
        head = found.pop("lm_head.weight", embedding)
        if embedding is not None and head is not None and not torch.equal(head, embedding):
            raise ValueError(
                "lm_head.weight differs from model.embed_tokens.weight, and tie_word_embeddings is set"
            )
    _check_counts(config, found)
    empty = {name: torch.empty(shape, device="meta") for name, shape in weight_shapes(config).items()}
    _check_shapes(found, export(config, empty)[1])
    ours = {name: found[theirs] for theirs, name in ENDS.items() if theirs in found}
    for layer in range(config.n_layer):
        try:
            block = import_block(config, _within(found, f"{LAYER}{layer}."))
        except ValueError as error:
            raise ValueError(f"{LAYER}{layer}: {error}") from None
        ours |= {f"h.{layer}.{name}": weight for name, weight in block.items()}
    gains = [name for name in ours if ".ln_" in f".{name}"]
    if all(bool((ours[name] == 1).all()) for name in gains):
        config = replace(config, norm_gains=False)
        ours = {name: weight for name, weight in ours.items() if name not in gains}
    return config, ours


def _within(weights: Mapping[str, Tensor], prefix: str) -> Weights:
    return {name[len(prefix) :]: weight for name, weight in weights.items() if name.startswith(prefix)}


def _bare_names(theirs: Mapping[str, Tensor]) -> Weights:
    found: Weights = {}
    for name, weight in theirs.items():
        wrapper = WRAPPED.match(name)
        bare = name[wrapper.end() :] if wrapper else name
        if bare.endswith(BUFFER):
            continue
        if bare in found:
            raise ValueError(f"{bare} occurs twice, once as {name}; remove one of them")
        if not weight.is_floating_point():
            raise ValueError(f"{name} is {weight.dtype}; quantised weights are not supported")
        found[bare] = weight
    return found


def _check_counts(config: ModelConfig, found: Weights) -> None:
    """Raise ValueError for another number of blocks or experts; 10^9 names would fill the memory."""
    blocks = _count_parts(found, LAYER)
    problems = (
        [] if blocks == config.n_layer else [f"{blocks} blocks, not num_hidden_layers={config.n_layer}"]
    )
    if config.n_expert:
        experts = _count_parts(found, f"{LAYER}0.{EXPERT}")
        problems += [f"{experts} experts, not num_experts={config.n_expert}"] * (experts != config.n_expert)
    if problems:
        raise ValueError(f"config.json and the weights differ: {'; '.join(problems)}")


def _count_parts(names: Iterable[str], prefix: str) -> int:
    return len({name[len(prefix) :].split(".")[0] for name in names if name.startswith(prefix)})


def _check_shapes(found: Weights, expected: Weights) -> None:
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is unknown" for name in found if name not in expected]
    problems += [
        f"{name} has shape {tuple(weight.shape)}, not {tuple(expected[name].shape)}"
        for name, weight in found.items()
        if name in expected and weight.shape != expected[name].shape
    ]
    if problems:
        more = f"; and {len(problems) - MOST_NAMED:,} more" if len(problems) > MOST_NAMED else ""
        raise ValueError(f"config.json and the weights differ: {'; '.join(problems[:MOST_NAMED])}{more}")
