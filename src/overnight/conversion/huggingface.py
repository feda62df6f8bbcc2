"""Hugging Face's GPT-2 format, written and read without Transformers.

    config.json              sizes and architecture switches
    model.safetensors        transformer.h.0.attn.c_attn.weight ..., no lm_head: it is tied to wte
    generation_config.json   the ids that begin and end a text
    tokenizer.json, tokenizer_config.json

Transformers stores the four matrices of a block as Conv1D, (in, out); here they are nn.Linear's, (out, in).
Files that can run code when loaded (pytorch_model.bin) are never read.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, equal

from overnight.config import naming, require_readable
from overnight.files import apply_umask, flush_folder, flush_to_disk, write_atomically
from overnight.model.gpt import GPT, empty_model, gpt2_sizes
from overnight.model.model_config import ModelConfig
from overnight.terminal import echo
from overnight.tokenizer.open_tokenizer import load_tokenizer, read_json_object
from overnight.tokenizer.tokenizer import Tokenizer

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PREFIX = "transformer."
WRAPPERS = re.compile(r"(?:(?:module|_orig_mod|transformer)\.)+")
"""What DistributedDataParallel, torch.compile and GPT2LMHeadModel put in front of GPT-2's names."""
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
BUFFERS = (".attn.bias", ".attn.masked_bias")  # the causal mask, which old versions saved too

SIZES = {
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "n_positions": "context_length",
    "vocab_size": "vocab_size",
}
"""Names of sizes in config.json -> names in ModelConfig."""

SWITCHES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "model_type": (None, ("gpt2",)),
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

GPT2_END_ID = 50256  # GPT2Config's eos_token_id where config.json has none
GENERATION: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (None, 1.0),
    "encoder_repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "num_beams": (None, 1),
    "penalty_alpha": (None, 0),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "stop_strings": (None, []),
    **dict.fromkeys(
        ("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias"), (None, [])
    ),
    **dict.fromkeys(
        ("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty"), (None,)
    ),
}
"""Settings of generation_config.json that change even a greedy text, and their values that do not."""


def write_huggingface(model: GPT, tokenizer: Tokenizer, folder: Path) -> None:
    """Write `folder` for Transformers, atomically, its weights in float32.

    Raises ValueError if the folder already exists.
    """
    if switched := changed_fields(model.config, gpt2_sizes(model.config)):
        raise ValueError(f"Hugging Face's GPT-2 does not have {', '.join(switched)}")
    if folder.exists():
        raise ValueError(f"{folder} already exists; remove it, or choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        naming(folder),
        tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary,
    ):
        staging = Path(temporary) / folder.name
        staging.mkdir()  # the temporary folder itself is private
        ends = {"bos_token_id": tokenizer.end_of_text, "eos_token_id": tokenizer.end_of_text}
        weights = {
            PREFIX + name: (weight.T if name.endswith(CONV1D) else weight).float().cpu().contiguous()
            for name, weight in model.weights().items()
        }
        try:
            save_file(weights, staging / WEIGHTS, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{folder} can't be written: {error}") from None
        apply_umask(staging / WEIGHTS)
        with (staging / WEIGHTS).open("rb") as file:
            flush_to_disk(file.fileno())
        tokenizer.save(staging)
        write_atomically(staging / "generation_config.json", json.dumps(ends, indent=2) + "\n")
        config = {**_huggingface_config(model.config), **ends}
        write_atomically(staging / "config.json", json.dumps(config, indent=2) + "\n")
        staging.rename(folder)
    flush_folder(folder.parent)


def changed_fields(config: ModelConfig, other: ModelConfig) -> list[str]:
    """The fields in which a configuration differs from another one, as name=value."""
    before = vars(other)
    return [f"{name}={value}" for name, value in vars(config).items() if value != before[name]]


def _huggingface_config(config: ModelConfig) -> dict[str, Any]:
    switches = {name: allowed[0] for name, (_, allowed) in SWITCHES.items() if allowed[0] is not None}
    return {
        "architectures": ["GPT2LMHeadModel"],
        **switches,
        **{theirs: getattr(config, ours) for theirs, ours in SIZES.items()},
        "n_ctx": config.context_length,  # older name of n_positions, which some converters read
        "n_inner": None,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config.dropout),
        "initializer_range": 0.02,
        "torch_dtype": "float32",
    }


def read_huggingface(folder: Path) -> tuple[GPT, Tokenizer]:
    """A folder's model (float32, on the CPU, in evaluation mode) and tokenizer.

    Dropout is read from resid_pdrop. Raises ValueError for another architecture than GPT-2's, for weights
    that do not fit it, and for a folder without safetensors.
    """
    config = _model_config(read_json_object(folder / "config.json"), folder / "config.json")
    try:
        weights = import_weights(_read_weights(folder), is_conv1d=True)
        _check_sizes(config, weights)
        model = empty_model(config)
        model.load_weights(weights)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    return model.eval(), load_tokenizer(folder)


def _model_config(content: Mapping[str, Any], origin: Path) -> ModelConfig:
    problems = [
        f"{name} is {found!r}, not {allowed[0]!r}"
        for name, (default, allowed) in SWITCHES.items()
        if (found := content.get(name, default)) not in allowed
    ]
    sizes: dict[str, Any] = {ours: content.get(theirs) for theirs, ours in SIZES.items()}
    problems += [
        f"{theirs} is {sizes[ours]!r}, not a whole number"
        for theirs, ours in SIZES.items()
        if type(sizes[ours]) is not int
    ]
    if not problems and content.get("n_inner") not in (None, 4 * content["n_embd"]):
        problems.append(f"n_inner is {content['n_inner']!r}, not four times n_embd")
    dropout = content.get("resid_pdrop", 0.1)
    if type(dropout) not in {int, float}:
        problems.append(f"resid_pdrop is {dropout!r}, not a number")
    if not problems:
        config = ModelConfig(dropout=dropout, **sizes)
        problems = config.problems()
    if problems:
        raise ValueError(f"{origin} does not describe a GPT-2: {'; '.join(problems)}")
    return config


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


def read_end_ids(folder: Path) -> frozenset[int]:
    """The ids that end a text, as Transformers decides: generation_config.json's, else config.json's.

    Empty if there are none. Prints the settings that change a greedy text and are not applied here. Raises
    ValueError for ids that are not numbers.
    """
    path = folder / "generation_config.json"
    content = read_json_object(path) if path.is_file() else read_json_object(folder / "config.json")
    missing = None if path.is_file() else GPT2_END_ID
    ends = content.get("eos_token_id", missing)
    ids = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(type(id) is int for id in ids):
        raise ValueError(f"{folder}: eos_token_id is {ends!r}, neither an id nor a list of ids")
    ignored = [
        f"{name}={content[name]}" for name, neutral in GENERATION.items() if content.get(name) not in neutral
    ]
    if ignored:
        echo(f"{path.name} of {folder} sets {', '.join(ignored)}, which is ignored")
    return frozenset(ids)


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of model.safetensors, else of the files that its index names, as Transformers chooses."""
    if (folder / WEIGHTS).is_file():
        files = [WEIGHTS]
        if (folder / INDEX).is_file():
            echo(f"{folder}: reading {WEIGHTS} and ignoring {INDEX}, as Transformers does")
    elif (folder / INDEX).is_file():
        weight_map = read_json_object(folder / INDEX).get("weight_map")
        names: list[Any] = list(weight_map.values()) if isinstance(weight_map, dict) else [None]
        if not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise ValueError(f"{INDEX} is damaged: its weight_map must name files of this folder")
        files = sorted(set(names))
    else:
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        only = f", only {pickles[0]}, which can run code when loaded and is not read" if pickles else ""
        raise ValueError(f"there is no {WEIGHTS}{only}; download or convert the model to that format")
    weights: dict[str, Tensor] = {}
    for name in files:
        try:
            require_readable(folder / name)
            weights |= load_file(folder / name)
        except PermissionError:
            raise
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{name} cannot be read, download it again: {error}") from None
    return weights


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
