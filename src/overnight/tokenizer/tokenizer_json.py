"""Any byte-level tokenizer.json, run by Hugging Face's `tokenizers`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from overnight.tokenizer.bpe import byte_characters, spelled_bytes
from overnight.tokenizer.tokenizer import END_OF_TEXT, Tokenizer, clean

PROBE = " two  blanks, a\ttab,\r\na line; Grüße, cafe\u0301, ﬁ ², \u3000\u200b, 你好, 🙂 and “1,024” `` '' \n"
PRE_TOKENIZERS = {"ByteLevel", "Split", "Digits", "Punctuation", "UnicodeScripts", "FixedLength"}
"""Ways to cut a text that keep every character, unless their behavior is Removed."""
LARGEST_ID = 1 << 24  # far above every vocabulary; limits the memory for a damaged file
END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json, except that text never becomes one of its special tokens.

    Ordinary added tokens are found in text, as by `tokenizers`. Raises ValueError if ids do not stand for
    bytes, if a text does not survive encoding and decoding, or if no added token marks the end of a text.
    """

    def __init__(self, content: Mapping[str, Any], end_of_text: str | None) -> None:
        added = {token["content"]: dict(token) for token in content.get("added_tokens", [])}
        self._end_of_text_name = _end_of_text(end_of_text, added)
        added[self._end_of_text_name]["special"] = True
        tokens = list(added.values())
        self._content = {**content, "added_tokens": tokens, "truncation": None, "padding": None}
        self._encoder = _build_encoder(self._content)
        ids = self._encoder.get_vocab(with_added_tokens=True)
        if not all(0 <= id <= LARGEST_ID for id in ids.values()):
            raise ValueError(f"its ids are not numbers from 0 to {LARGEST_ID}")
        if shifted := [name for name, token in added.items() if ids[name] != token["id"]]:
            raise ValueError(
                f"the ids of its added tokens ({shifted[0]}, ...) do not follow those of its model"
            )
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
            self._bytes[id] = b"" if name in special else name.encode() if name in added else spelled
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
    """The tokenizer, to which the names of special tokens are ordinary text, and which inserts none.

    Raises ValueError if it changes or drops a part of some text, whatever the text is.
    """
    if change := _changing_step(content):
        raise ValueError(
            f"{change}, which does not decode every text to itself; choose a byte-level tokenizer without it"
        )
    try:
        encoder = tokenizers.Tokenizer.from_str(json.dumps({**content, "post_processor": None}))
    except BaseException as error:  # tokenizers raises no narrower class, and a panic of Rust is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise ValueError(f"it is damaged or not a tokenizer.json: {error}") from None
    encoder.encode_special_tokens = True
    missing = set(byte_characters()) - encoder.get_vocab().keys()
    if missing:
        raise ValueError(
            f"{len(missing)} of the 256 bytes have no token; choose a complete byte-level tokenizer"
        )
    return encoder


def _changing_step(content: Mapping[str, Any]) -> str | None:
    """The step, in words, that changes or drops text or is random; None if there is none."""
    decoder = (content.get("decoder") or {}).get("type")
    if decoder != "ByteLevel":
        return f"its decoder is {decoder or 'missing'} and not ByteLevel"
    for step in _steps(content.get("normalizer"), "normalizers"):
        return f"its normalizer {step['type']} changes text"
    for step in _steps(content.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] not in PRE_TOKENIZERS or step.get("behavior") == "Removed":
            return f"its pre-tokenizer {step['type']} may drop characters"
        if step.get("add_prefix_space"):
            return "its pre-tokenizer prepends a space to each text (add_prefix_space)"
    for token in content["added_tokens"]:
        if not token.get("special") and (token.get("lstrip") or token.get("rstrip")):
            return f"its added token {token['content']} strips the whitespace next to it"
    return "it encodes at random (dropout)" if content["model"].get("dropout") else None


def _steps(step: Mapping[str, Any] | None, members: str) -> Iterator[Mapping[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, those of sequences one by one."""
    if step is None:
        return
    if step["type"] == "Sequence":
        for member in step[members]:
            yield from _steps(member, members)
    else:
        yield step


def _end_of_text(given: str | None, added: Mapping[str, Any]) -> str:
    names = [given] if given else END_OF_TEXT_NAMES
    for name in names:
        if name in added:
            return name
    raise ValueError(
        f"it has no added token {' or '.join(names)} to end a text; name the one that does as eos_token in a "
        "tokenizer_config.json in the same folder"
    )
