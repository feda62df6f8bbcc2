"""Hugging Face's GPT-2: a folder that Transformers opens, written and read without Transformers.

    config.json              sizes and the architecture's switches
    model.safetensors        transformer.h.0.attn.c_attn.weight ..., no lm_head: it is tied to wte
    generation_config.json   the ids that begin and end a text
    tokenizer.json, tokenizer_config.json

Transformers keeps the four matrices of a block as Conv1D, (in, out); ours are nn.Linear's, (out, in).
Files that can run code when opened (pytorch_model.bin) are never opened.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, equal

from overnight.model.gpt import GPT, empty_model
from overnight.model.model_config import ModelConfig
from overnight.run_directory import flush_folder, flush_to_disk, write_atomically
from overnight.tokenizer.open_tokenizer import load_tokenizer
from overnight.tokenizer.tokenizer import Tokenizer

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PREFIX = "transformer."
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
BUFFERS = (".attn.bias", ".attn.masked_bias")  # the causal mask, which old versions saved as well

SIZES = {
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "n_positions": "context_length",
    "vocab_size": "vocab_size",
}
# The switches that change what a GPT2LMHeadModel computes: the default that a missing key means, and
# all values that are the GPT-2 of this package. The first is the one that is written.
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


def write_huggingface(model: GPT, tokenizer: Tokenizer, folder: Path) -> None:
    """Write `folder` for Transformers to open; it appears whole or not at all. Weights are float32.

    Raises ValueError if the folder is already there.
    """
    if folder.exists():
        raise ValueError(f"{folder} is already there; remove it, or choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        building.chmod(0o755)  # mkdtemp's folders are private; a model is not
        ends = {"bos_token_id": tokenizer.end_of_text, "eos_token_id": tokenizer.end_of_text}
        save_file(_outward(model.weights()), building / WEIGHTS, metadata={"format": "pt"})
        with (building / WEIGHTS).open("rb") as file:
            flush_to_disk(file.fileno())
        tokenizer.save(building)
        write_atomically(building / "generation_config.json", json.dumps(ends, indent=2) + "\n")
        config = {**_config(model.config), **ends}
        write_atomically(building / "config.json", json.dumps(config, indent=2) + "\n")
        building.rename(folder)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    flush_folder(folder.parent)


def _outward(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights by Transformers' names and in its layout, as independent float32 tensors on the CPU."""
    return {
        PREFIX + name: (weight.T if name.endswith(CONV1D) else weight).float().cpu().contiguous()
        for name, weight in weights.items()
    }


def _config(config: ModelConfig) -> dict[str, Any]:
    switches = {name: allowed[0] for name, (_, allowed) in SWITCHES.items() if allowed[0] is not None}
    return {
        "architectures": ["GPT2LMHeadModel"],
        **switches,
        **{theirs: getattr(config, ours) for theirs, ours in SIZES.items()},
        "n_ctx": config.context_length,  # the older name of n_positions, which some converters read
        "n_inner": None,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config.dropout),
        "initializer_range": 0.02,
        "torch_dtype": "float32",
    }


def read_huggingface(folder: Path) -> tuple[GPT, Tokenizer]:
    """The model of a folder, float32, on the CPU, in evaluation mode, and its tokenizer.

    Raises ValueError for an architecture that is not GPT-2's, for weights that do not fit it, and
    for a folder without safetensors. Dropout, which is no part of what the model computes, is
    resid_pdrop's.
    """
    content = _read_json(folder / "config.json")
    config = _model_config(content, folder / "config.json")
    weights = _inward(_read_weights(folder), folder)
    problems = _size_problems(config, weights)  # before a size that is wrong could fill the memory
    if problems:
        raise ValueError(f"{folder}: config.json and the weights differ: {'; '.join(problems)}")
    model = empty_model(config)
    try:
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
        raise ValueError(f"{origin} describes another architecture than GPT-2's: {'; '.join(problems)}")
    return config


def _size_problems(config: ModelConfig, weights: Mapping[str, Tensor]) -> list[str]:
    layers = len({name.split(".")[1] for name in weights if name.startswith("h.")})
    shapes = {name: tuple(weights[name].shape) for name in ("wte.weight", "wpe.weight") if name in weights}
    wanted = {
        "wte.weight": (config.vocab_size, config.n_embd),
        "wpe.weight": (config.context_length, config.n_embd),
    }
    problems = [] if layers == config.n_layer else [f"{layers} blocks, not n_layer={config.n_layer}"]
    return problems + [
        f"{name} has the shape {shapes.get(name)}, not {shape}"
        for name, shape in wanted.items()
        if shapes.get(name) != shape
    ]


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of model.safetensors, or of the several files that its index names."""
    if (folder / INDEX).is_file():
        places = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(places, dict) or not all(_is_file_name(name) for name in places.values()):
            raise ValueError(f"{folder / INDEX} is damaged: its weight_map must name files of this folder")
        files = sorted(set(places.values()))
    elif (folder / WEIGHTS).is_file():
        files = [WEIGHTS]
    else:
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        only = f", only {pickles[0]}, which can run code when opened and is not read here" if pickles else ""
        raise ValueError(f"{folder} holds no {WEIGHTS}{only}; download or convert it to that format first")
    weights: dict[str, Tensor] = {}
    for name in files:
        try:
            weights |= load_file(folder / name)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{folder / name} cannot be read, download it again: {error}") from None
    return weights


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and Path(name).name == name


def _inward(theirs: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """The weights by our names and in our layout. Raises ValueError if the head is not tied."""
    ours = {
        name.removeprefix(PREFIX): (weight.T if name.endswith(CONV1D) and weight.dim() == 2 else weight)
        for name, weight in theirs.items()
        if not name.endswith(BUFFERS)
    }
    head = ours.pop("lm_head.weight", None)
    if head is not None and not equal(head, ours.get("wte.weight", head)):
        raise ValueError(f"{folder}: lm_head.weight differs from wte.weight; GPT-2's head is its embedding")
    coarse = [f"{name} is {weight.dtype}" for name, weight in ours.items() if not weight.is_floating_point()]
    if coarse:
        raise ValueError(f"{folder}: {coarse[0]}: quantised weights are not read here")
    return ours


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, or not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not what its name says: it holds no table")
    return content
