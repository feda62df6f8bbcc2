"""One id per character of the training text; other characters become the ids of their UTF-8 bytes.

The ids: the characters in the order of their code points, then 256 bytes, then end-of-text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from overnight.tokenizer.tokenizer import END_OF_TEXT, Tokenizer, clean, tokenizer_json

CODE_POINTS = 0x110000


class Characters(Tokenizer):
    """A tokenizer whose ids are these characters, 256 bytes and end-of-text."""

    name = "characters"

    def __init__(self, characters: Iterable[str]) -> None:
        self._characters = "".join(sorted(set(characters)))
        self._first_byte = len(self._characters)
        self.end_of_text = self._first_byte + 256
        self.vocab_size = self.end_of_text + 1
        self.fingerprint = hashlib.sha256(b"characters\n" + self._characters.encode()).hexdigest()
        self._bytes = [*(c.encode() for c in self._characters), *(bytes([b]) for b in range(256)), b""]
        self._ids = np.full(CODE_POINTS, -1, dtype=np.int32)  # by code point; -1: no id of its own
        self._ids[_code_points(self._characters)] = np.arange(self._first_byte)

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """The ids of each text."""
        return [self._encode(clean(text)) for text in texts]

    def _encode(self, text: str) -> NDArray[np.uint32]:
        ids: NDArray[np.int32] = self._ids[_code_points(text)]
        if (ids >= 0).all():
            return ids.astype(np.uint32)
        content = np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32)
        begins: NDArray[np.bool_] = (content & 0xC0) != 0x80  # UTF-8's continuation bytes are 10xxxxxx
        ids = ids[np.cumsum(begins) - 1]  # for each byte, the id of the character it belongs to
        is_byte = ids < 0
        ids = np.where(is_byte, self._first_byte + content, ids)
        return ids[begins | is_byte].astype(np.uint32)

    def to_json(self) -> dict[str, Any]:
        """The content of tokenizer.json. A BPE without merges leaves the characters as they are."""
        return tokenizer_json(
            self.end_of_text,
            pre_tokenizer=None,
            post_processor=None,
            decoder={"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
            model={
                "type": "BPE",
                "byte_fallback": True,
                "vocab": _vocabulary(self._characters),
                "merges": [],
            },
        )


def train_characters(documents: Iterable[str]) -> Characters:
    """Build a tokenizer with one id for every character of the documents."""
    characters: set[str] = set()
    for document in documents:
        characters.update(clean(document))
    return Characters(characters)


def read_characters(content: Mapping[str, Any]) -> Characters | None:
    """The tokenizer of a tokenizer.json, or None if it is of another kind."""
    model = content["model"]
    if model.get("type", "BPE") != "BPE" or not model.get("byte_fallback") or model["merges"]:
        return None
    characters = sorted(token for token in model["vocab"] if len(token) == 1)
    return Characters(characters) if model["vocab"] == _vocabulary(characters) else None


def _vocabulary(characters: Iterable[str]) -> dict[str, int]:
    """Every token, as spelled in tokenizer.json, with its id."""
    tokens = [*characters, *(f"<0x{byte:02X}>" for byte in range(256)), END_OF_TEXT]
    return {token: id for id, token in enumerate(tokens)}


def _code_points(text: str) -> NDArray[np.uint32]:
    points: NDArray[np.uint32] = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    return points
