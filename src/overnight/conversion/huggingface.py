"""Folders in the format of Hugging Face Transformers, written and read without Transformers.

    config.json              sizes and architecture switches
    model.safetensors        the weights, under the names of one of the classes in `families`
    generation_config.json   the ids that begin and end a text
    tokenizer.json, tokenizer_config.json

Files that can run code when loaded (pytorch_model.bin) are never read.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from overnight.config import naming, require_readable
from overnight.conversion.families import choose_family, read_model_config
from overnight.files import apply_umask, flush_folder, flush_to_disk, write_atomically
from overnight.model.gpt import GPT, empty_model
from overnight.terminal import echo
from overnight.tokenizer.open_tokenizer import load_tokenizer, read_json_object
from overnight.tokenizer.tokenizer import Tokenizer

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
END_IDS = {"gpt2": 50256, "llama": 2, "nanochat": 1, "deepseek_v3": 1}
"""model_type -> the eos_token_id of its class, where config.json has none; the others have none."""

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


def write_huggingface(model: GPT, tokenizer: Tokenizer, folder: Path) -> str:
    """Write `folder` for Transformers, atomically, its weights in float32; returns the name of the class.

    Raises ValueError if no class computes the same as the model, and if the folder already exists.
    """
    family = choose_family(model.config)
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
        ours = {name: weight.float().cpu() for name, weight in model.weights().items()}
        fields, theirs = family.export(model.config, ours)
        weights = {name: weight.contiguous() for name, weight in theirs.items()}
        try:
            save_file(weights, staging / WEIGHTS, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{folder} can't be written: {error}") from None
        apply_umask(staging / WEIGHTS)
        with (staging / WEIGHTS).open("rb") as file:
            flush_to_disk(file.fileno())
        tokenizer.save(staging)
        write_atomically(staging / "generation_config.json", json.dumps(ends, indent=2) + "\n")
        write_atomically(staging / "config.json", json.dumps({**fields, **ends}, indent=2) + "\n")
        staging.rename(folder)
    flush_folder(folder.parent)
    return family.class_name


def read_huggingface(folder: Path) -> tuple[GPT, Tokenizer]:
    """A folder's model (float32, on the CPU, in evaluation mode) and tokenizer.

    Raises ValueError for an architecture that has no switches here, for weights that do not fit it, and for a
    folder without safetensors.
    """
    path = folder / "config.json"
    family, config = read_model_config(read_json_object(path), path)
    try:
        config, weights = family.import_weights(config, _read_weights(folder))
        model = empty_model(config)
        model.load_weights(weights)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    return model.eval(), load_tokenizer(folder)


def read_end_ids(folder: Path) -> frozenset[int]:
    """The ids that end a text, as Transformers decides: generation_config.json's, else config.json's.

    Empty if there are none. Prints the settings that change a greedy text and are not applied here. Raises
    ValueError for ids that are not numbers.
    """
    path = folder / "generation_config.json"
    content = read_json_object(path if path.is_file() else folder / "config.json")
    missing = None if path.is_file() else END_IDS.get(content.get("model_type", ""))
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
