"""One id per character that was seen, bytes for every other."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overnight.tokenizer.characters import Characters, read_characters, train_characters


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
    tokenizer = train_characters(["hello", "world"])
    assert tokenizer.name == "characters"
    assert tokenizer.token_bytes()[:7] == [b"d", b"e", b"h", b"l", b"o", b"r", b"w"]
    assert tokenizer.token_bytes()[7:] == [bytes([byte]) for byte in range(256)] + [b""]
    assert tokenizer.encode("hero") == [2, 1, 5, 4]
    assert tokenizer.encode("hé") == [2, 7 + 0xC3, 7 + 0xA9]
    assert (tokenizer.end_of_text, tokenizer.vocab_size) == (7 + 256, 7 + 257)


@given(alphabet=st.text(max_size=20), text=st.text(max_size=50))
def test_characters_equal_naive_twin(alphabet: str, text: str) -> None:
    tokenizer = Characters(alphabet)
    for mixed in (text, text + alphabet + text, "".join(map("".join, zip(text, alphabet, strict=False)))):
        assert tokenizer.encode(mixed) == naive_ids(alphabet, mixed)


def test_characters_of_no_text_and_of_lone_surrogates() -> None:
    assert train_characters([]).encode("aé") == [0x61, 0xC3, 0xA9]
    assert train_characters(["a\ud83d"]).token_bytes()[:2] == [b"a", "\ufffd".encode()]


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
    vocab = {
        token: id for id, token in enumerate(["a", *(f"<0x{b:02X}>" for b in range(256)), "<|endoftext|>"])
    }
    model = {"type": "BPE", "byte_fallback": True, "merges": [], "vocab": vocab}
    assert read_characters({"model": model}) is not None
    assert read_characters({"model": {**model, **change}}) is None
