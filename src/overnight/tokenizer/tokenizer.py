"""The interface of all tokenizers, and their common functions.

A tokenizer is a list of byte strings, one per id, and a rule that picks ids for a text. So decoding is the
same for all: join the bytes and decode them as UTF-8. On the disk each one is a folder with the two files
that Transformers opens: tokenizer.json and tokenizer_config.json.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from overnight.files import write_atomically

END_OF_TEXT = "<|endoftext|>"


class Tokenizer(ABC):
    """Text to ids and back without loss, for every text. Ids are 0 to vocab_size - 1.

    Text never becomes special ids: a document that spells "<|endoftext|>" becomes the ids of those 13
    characters. Only lone surrogates are lost, which are not characters: see `clean`.
    """

    name: str
    """gpt2, characters, bpe-4096."""
    vocab_size: int
    end_of_text: int
    """The id before each document; it decodes to no text."""
    fingerprint: str
    """sha256 of everything that decides the ids of a text: equal for equal tokenizers, from any source."""
    _bytes: list[bytes]
    _end_of_text_name = END_OF_TEXT

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """The ids of each text. Releases the GIL."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """The content of tokenizer.json."""

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which `load_tokenizer` and Transformers open."""
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            # Converters to other formats fail if one of the three is missing.
            **dict.fromkeys(("bos_token", "eos_token", "unk_token"), self._end_of_text_name),
            "clean_up_tokenization_spaces": False,  # it would change the text that ids decode to
        }
        write_atomically(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
        # Last: if it exists, the folder is complete.
        write_atomically(folder / "tokenizer.json", json.dumps(self.to_json(), ensure_ascii=False) + "\n")

    def token_bytes(self) -> list[bytes]:
        """The bytes each id stands for, b"" for special ids. Not a copy: do not change it."""
        return self._bytes

    def encode(self, text: str) -> list[int]:
        """The ids of one text."""
        ids: list[int] = self.encode_batch([text])[0].tolist()
        return ids

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes that the ids stand for. Raises ValueError for an id outside the vocabulary."""
        numbers = np.asarray(ids, dtype=np.int64)
        foreign = numbers[(numbers < 0) | (numbers >= self.vocab_size)]
        if foreign.size:
            raise ValueError(f"{self.name} has the ids 0 to {self.vocab_size - 1}, not {foreign[0]}")
        return b"".join(map(self._bytes.__getitem__, numbers.tolist()))

    def decode(self, ids: Sequence[int]) -> str:
        """The text that the ids stand for; U+FFFD where they begin or end inside a character."""
        return self.decode_bytes(ids).decode(errors="replace")


def clean(text: str) -> str:
    """The text with surrogate pairs joined to characters, and U+FFFD for each lone surrogate.

    A Python string can hold half of a UTF-16 pair, from broken JSON escapes; UTF-8 cannot.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def tokenizer_json(end_of_text: int, **parts: Any) -> dict[str, Any]:
    """A tokenizer.json with one special token. `parts`: pre_tokenizer, post_processor, decoder, model."""
    empty = {"truncation": None, "padding": None}
    special = added_token(END_OF_TEXT, end_of_text, special=True)
    return {"version": "1.0", **empty, "added_tokens": [special], "normalizer": None, **parts}


def added_token(name: str, id: int, *, special: bool) -> dict[str, Any]:
    """An entry of the added_tokens of a tokenizer.json."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": id, "content": name, **flags, "special": special}
