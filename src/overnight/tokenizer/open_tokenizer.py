"""Opens a tokenizer by name, from a folder or file, or trains one on documents."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from overnight.config import nearest
from overnight.tokenizer.bpe import FILES as GPT2_FILES
from overnight.tokenizer.bpe import load_gpt2, read_byte_pair, read_gpt2, train_byte_pair
from overnight.tokenizer.characters import read_characters, train_characters
from overnight.tokenizer.tokenizer import END_OF_TEXT, Tokenizer, added_token
from overnight.tokenizer.tokenizer_json import HuggingFaceTokenizer

TRANSFORMERS_FILES = ("vocab.json", "merges.txt")
LARGEST_BPE = 65_535  # ids of 16 bits
NAMES = ("gpt2", "characters", "bpe-4096")


def build_tokenizer(name: str, documents: Iterable[str]) -> Tokenizer:
    """Train "characters" or "bpe-N" on the documents; load any other name without reading them."""
    if name == "characters":
        return train_characters(documents)
    if (vocab_size := _bpe_size(name)) is not None:
        return train_byte_pair(documents, vocab_size)
    return load_tokenizer(name)


def load_tokenizer(name: str | Path) -> Tokenizer:
    """The tokenizer "gpt2", or the one in a folder or file.

    A folder holds tokenizer.json, or GPT-2's encoder.json and vocab.bpe; a file is a tokenizer.json.
    Write ./gpt2 for a folder called gpt2. Raises ValueError with the remedy.
    """
    if name == "gpt2":
        return load_gpt2()
    path = Path(name)
    if path.is_file():
        return _read_file(path)
    if (path / "tokenizer.json").is_file():
        return _read_file(path / "tokenizer.json")
    if all((path / file).is_file() for file in TRANSFORMERS_FILES):
        return _from_content(_vocabulary_and_merges(path), path / "vocab.json")
    if any((path / file).is_file() for file in GPT2_FILES):
        return read_gpt2(path)
    if path.is_dir():
        raise ValueError(f"{path} holds no tokenizer: neither tokenizer.json nor {' and '.join(GPT2_FILES)}")
    if name == "characters" or _bpe_size(str(name)) is not None:
        raise ValueError(
            f"{name} is trained on text: prepare data with --tokenizer {name}, "
            "then name the folder tokenizer/ inside it"
        )
    raise ValueError(f"there is no tokenizer, folder or file {str(name)!r}{nearest(str(name), NAMES)}")


def _bpe_size(name: str) -> int | None:
    """The N of "bpe-N", None for other names. Raises ValueError if a BPE can't have N ids."""
    number = re.fullmatch(r"bpe-([0-9]+)", name)
    if number is None:
        return None
    if not 257 < int(number[1]) <= LARGEST_BPE:
        raise ValueError(
            f"{name} is not possible: choose from bpe-258 (256 bytes, one merge, end-of-text) to "
            f"bpe-{LARGEST_BPE}"
        )
    return int(number[1])


def _vocabulary_and_merges(folder: Path) -> dict[str, Any]:
    """The tokenizer.json of a folder with the files of the first tokenizers of Transformers."""
    vocabulary = read_json_object(folder / "vocab.json")
    try:
        lines = (folder / "merges.txt").read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{folder / 'merges.txt'} is not UTF-8 at byte {error.start}") from None
    added = {END_OF_TEXT: vocabulary.get(END_OF_TEXT, len(vocabulary))}
    if (folder / "added_tokens.json").is_file():
        added |= read_json_object(folder / "added_tokens.json")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    merges = [line for line in lines if line and not line.startswith("#version")]
    return {
        "added_tokens": [added_token(name, id, special=name == END_OF_TEXT) for name, id in added.items()],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges},
    }


def _read_file(path: Path) -> Tokenizer:
    return _from_content(read_json_object(path), path)


def _from_content(content: dict[str, Any], path: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json, and of the tokenizer_config.json beside `path`."""
    config_path = path.with_name("tokenizer_config.json")
    config = read_json_object(config_path) if config_path.is_file() else {}
    end_of_text = config.get("eos_token")  # a string, or an object with its content
    if isinstance(end_of_text, dict):
        end_of_text = end_of_text.get("content")
    try:
        listed = list(content.get("added_tokens") or [])
        named = {token["content"] for token in listed}
        for id, token in (config.get("added_tokens_decoder") or {}).items():
            if token["content"] not in named:
                listed.append({"id": int(id), **token})
        content = {**content, "added_tokens": listed}
        return (
            read_byte_pair(content) or read_characters(content) or HuggingFaceTokenizer(content, end_of_text)
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} can't be used as a tokenizer: {error}") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """The content of a JSON file. Raises ValueError, naming it, if it cannot be read or is not an object.

    Raises PermissionError without permission: the file is not damaged then.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except PermissionError:
        raise
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged or not JSON: byte {error.start:,} is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return content
