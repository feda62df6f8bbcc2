"""Opens a tokenizer by name, from a folder or any byte-level tokenizer.json, or trains one on documents."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from overnight.config import nearest
from overnight.tokenizer.bpe import FILES as GPT2_FILES
from overnight.tokenizer.bpe import load_gpt2, read_byte_pair, read_gpt2, spelled_bytes, train_byte_pair
from overnight.tokenizer.characters import read_characters, train_characters
from overnight.tokenizer.tokenizer import END_OF_TEXT, Tokenizer, clean

LARGEST_BPE = 65_535  # ids of 16 bits
NAMES = ("gpt2", "characters", "bpe-4096")

PROBE = "two  blanks, a\ttab,\r\na line; Grüße, 你好, 🙂 and 1,024"
LARGEST_ID = 1 << 24  # far above every vocabulary; limits the memory for a damaged file
END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")


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


def _read_file(path: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json. A tokenizer_config.json next to it may name its end-of-text."""
    content, config = read_json_object(path), path.with_name("tokenizer_config.json")
    token = read_json_object(config).get("eos_token") if config.is_file() else None
    end_of_text = token.get("content") if isinstance(token, dict) else token
    try:
        return (
            read_byte_pair(content) or read_characters(content) or HuggingFaceTokenizer(content, end_of_text)
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} can't be used as a tokenizer: {error}") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """The content of a JSON file. Raises ValueError, naming it, if it cannot be read or is not an object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, or not JSON
        raise ValueError(f"{path} is damaged or not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return content


# The tokenizers of other programs, run by Hugging Face's `tokenizers`


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json, except that text never becomes one of its added tokens.

    The tokenizer that encodes text is built without them. Raises ValueError if ids do not stand for bytes, if
    a text does not survive encoding and decoding, or if no added token marks the end of a text.
    """

    def __init__(self, content: Mapping[str, Any], end_of_text: str | None) -> None:
        self._content = {**content, "truncation": None, "padding": None}
        added = {token["content"]: token for token in content.get("added_tokens", [])}
        self._end_of_text_name = _end_of_text(end_of_text, added)
        self._encoder = _build_encoder(content)
        ids = {**self._encoder.get_vocab(), **{name: token["id"] for name, token in added.items()}}
        if not all(0 <= id <= LARGEST_ID for id in ids.values()):
            raise ValueError(f"its ids are not numbers from 0 to {LARGEST_ID}")
        special = {name for name, token in added.items() if token.get("special")} | {self._end_of_text_name}
        for name in special:
            if ids[name] in self._encoder.encode(name, add_special_tokens=False).ids:
                raise ValueError(
                    f"it encodes the text {name} as that special token; choose another tokenizer"
                )
        self.end_of_text = ids[self._end_of_text_name]
        self.vocab_size = max(ids.values()) + 1
        self.name = f"{content['model'].get('type', 'bpe').lower()}-{self.vocab_size}"
        canonical = json.dumps([self._content, self._end_of_text_name], sort_keys=True)
        self.fingerprint = hashlib.sha256(canonical.encode()).hexdigest()
        self._bytes = [b""] * self.vocab_size
        for (name, id), spelled in zip(ids.items(), spelled_bytes(ids), strict=True):
            self._bytes[id] = b"" if name in special else spelled
        if (returned := self.decode(self.encode(PROBE))) != PROBE:
            raise ValueError(f"it does not decode every text to itself: {PROBE!r} becomes {returned!r}")

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """The ids of each text."""
        encoded = self._encoder.encode_batch_fast([clean(text) for text in texts], add_special_tokens=False)
        return [np.array(one.ids, dtype=np.uint32) for one in encoded]

    def to_json(self) -> dict[str, Any]:
        """The content of tokenizer.json: the file's own."""
        return self._content


def _build_encoder(content: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer without added tokens, and without the steps that would insert them."""
    decoder = (content.get("decoder") or {}).get("type")
    if decoder != "ByteLevel":
        raise ValueError(
            f"it decodes by {decoder or 'joining its tokens'}, which does not decode every text to itself; "
            "choose a byte-level tokenizer (decoder ByteLevel)"
        )
    bare = {**content, "added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(bare))
    except Exception as error:  # tokenizers raises no narrower class
        raise ValueError(f"it is damaged or not a tokenizer.json: {error}") from None


def _end_of_text(given: str | None, added: Mapping[str, Any]) -> str:
    names = [given] if given else END_OF_TEXT_NAMES
    for name in names:
        if name in added:
            return name
    raise ValueError(
        f"it has no added token {' or '.join(names)} to end a text; name the one that does as eos_token in a "
        "tokenizer_config.json in the same folder"
    )
