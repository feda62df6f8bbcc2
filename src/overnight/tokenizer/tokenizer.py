"""What every tokenizer of this package is, and what all of them do the same way.

A tokenizer is a list of byte strings, one per id, and a rule that picks ids for a text. So decoding
is the same everywhere: join the bytes, read them as UTF-8. On the disk each one is a folder with the
two files that Transformers opens: tokenizer.json and tokenizer_config.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from overnight.run_directory import write_atomically

END_OF_TEXT = "<|endoftext|>"


class Tokenizer(Protocol):
    """Text to ids and back without loss, for every text; ids are 0 to vocab_size - 1.

    Text is never read for special ids: a document that spells "<|endoftext|>" becomes the ids of those
    13 characters. The one thing not kept is a lone surrogate, which is no character: see `clean`.
    """

    name: str
    """gpt2, characters, bpe-4096."""
    vocab_size: int
    end_of_text: int
    """The id that goes before each document; it stands for no text."""
    fingerprint: str
    """sha256 of what decides which ids a text becomes: equal for equal tokenizers, wherever loaded from."""

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """The ids of each text. Other Python threads can work meanwhile."""
        ...

    def token_bytes(self) -> list[bytes]:
        """The bytes each id stands for, b"" for special ids. The tokenizer's own list: do not change it."""
        ...

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, for `load_tokenizer` and Transformers to open."""
        ...

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
        return b"".join(map(self.token_bytes().__getitem__, numbers.tolist()))

    def decode(self, ids: Sequence[int]) -> str:
        """The text that the ids stand for; U+FFFD where they end, or begin, inside a character."""
        return self.decode_bytes(ids).decode(errors="replace")


def clean(text: str) -> str:
    """The text with U+FFFD for each lone surrogate, and a pair of surrogates as the character it spells.

    A Python string can hold half of a UTF-16 pair (broken JSON escapes leave them); UTF-8 cannot.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def write_tokenizer(folder: Path, content: Mapping[str, Any], end_of_text: str = END_OF_TEXT) -> None:
    """Write the folder; tokenizer.json comes last, so where it is, all is."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        # Converters to other formats fail where one of the three is missing.
        "bos_token": end_of_text,
        "eos_token": end_of_text,
        "unk_token": end_of_text,
        "clean_up_tokenization_spaces": False,  # it would change the text that ids decode to
    }
    write_atomically(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
    write_atomically(folder / "tokenizer.json", json.dumps(content, ensure_ascii=False) + "\n")


def special_token(text: str, id: int) -> dict[str, Any]:
    """An entry of tokenizer.json's `added_tokens` for an id that stands for no text."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": id, "content": text, **flags, "special": True}
