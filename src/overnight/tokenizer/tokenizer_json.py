"""Any byte-level tokenizer.json, run by Hugging Face's `tokenizers`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from overnight.tokenizer.bpe import spelled_bytes
from overnight.tokenizer.tokenizer import END_OF_TEXT, Tokenizer, clean

PROBE = "two  blanks, a\ttab,\r\na line; Grüße, 你好, 🙂 and 1,024"
LARGEST_ID = 1 << 24  # far above every vocabulary; limits the memory for a damaged file
END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")


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
