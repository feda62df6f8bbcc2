"""One id per character that was seen, bytes for every other."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overnight.tokenizer.characters import Characters, read_characters, train_characters
from overnight.tokenizer.tokenizer import END_OF_TEXT


def naive_ids(alphabet: str, text: str) -> list[int]:
    """Character by character: the naive twin."""
    ids: list[int] = []
    for character in text:
        if character in alphabet:
            ids.append(sorted(set(alphabet)).index(character))
        else:
            ids.extend(len(set(alphabet)) + byte for byte in character.encode())
    return ids


def test_character_ids_are_characters_bytes_end_of_text() -> None:
    tokenizer = train_characters(["hello", "world\ud83d"])
    every_byte = [bytes([byte]) for byte in range(256)]
    assert tokenizer.token_bytes() == [*map(str.encode, "dehlorw\ufffd"), *every_byte, b""]
    assert (tokenizer.end_of_text, tokenizer.vocab_size) == (8 + 256, 8 + 257)


@given(alphabet=st.text(max_size=20), text=st.text(max_size=50))
def test_characters_equal_naive_twin(alphabet: str, text: str) -> None:
    tokenizer = Characters(alphabet)
    for mixed in (text, text + alphabet + text, "".join(map("".join, zip(text, alphabet, strict=False)))):
        assert tokenizer.encode(mixed) == naive_ids(alphabet, mixed)


@pytest.mark.parametrize(
    "change",
    [
        {"type": "Unigram"},
        {"byte_fallback": False},
        {"merges": ["a b"]},
        {"vocab": {"a": 0, "<0x00>": 1}},
    ],
)
def test_other_tokenizer_json_is_not_read_as_characters(change: dict[str, object]) -> None:
    tokens = ["a", *(f"<0x{byte:02X}>" for byte in range(256)), END_OF_TEXT]
    vocab = {token: id for id, token in enumerate(tokens)}
    model = {"type": "BPE", "byte_fallback": True, "merges": [], "vocab": vocab}
    assert read_characters({"model": model}) is not None
    assert read_characters({"model": {**model, **change}}) is None
