"""A tokenizer.json of another program: its ids, and none of its special ones from text."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import tokenizers

from overnight.tokenizer.tokenizer import Tokenizer
from overnight.tokenizer.tokenizer_json import HuggingFaceTokenizer


def test_ids_are_those_of_the_file(
    foreign: Tokenizer, foreign_content: dict[str, Any], documents: list[str]
) -> None:
    reference = tokenizers.Tokenizer.from_str(json.dumps(foreign_content))
    for text in [*documents, "a<tool>b    c"]:
        assert foreign.encode(text) == reference.encode(text).ids
    assert foreign.vocab_size == reference.get_vocab_size() == 502
    assert (foreign.name, foreign.end_of_text) == ("bpe-502", 0)
    assert [id for id, spelled in enumerate(foreign.token_bytes()) if not spelled] == [0, 1]
    assert foreign.token_bytes()[-2:] == [b"<tool>", b"    "]


def test_text_never_becomes_a_special_token(foreign: Tokenizer, foreign_content: dict[str, Any]) -> None:
    text = "a<|user|>b    c<|endoftext|><tool>"
    special = {token["id"] for token in foreign_content["added_tokens"] if token["special"]}
    assert len(special) == 2
    assert not special.intersection(foreign.encode(text))
    assert foreign.decode(foreign.encode(text)) == text
    trusting = tokenizers.Tokenizer.from_str(json.dumps(foreign_content))
    assert special.issubset(trusting.encode(text).ids)  # the control


def test_end_of_text_is_found_or_named(foreign_content: dict[str, Any]) -> None:
    assert HuggingFaceTokenizer(foreign_content, "<|user|>").end_of_text == 1
    with pytest.raises(ValueError, match=r"<\|end\|>.*eos_token"):
        HuggingFaceTokenizer(foreign_content, "<|end|>")
    unnamed = [token for token in foreign_content["added_tokens"] if token["content"] != "<|endoftext|>"]
    with pytest.raises(ValueError, match=r"eos_token.*tokenizer_config\.json"):
        HuggingFaceTokenizer({**foreign_content, "added_tokens": unnamed}, None)


@pytest.mark.parametrize(
    "keys, value, match",
    [
        (["decoder"], {"type": "WordPiece"}, "WordPiece"),
        (["decoder"], None, "ByteLevel"),
        *((["normalizer"], {"type": name}, name) for name in ("Lowercase", "NFC", "StripAccents")),
        (["normalizer"], {"type": "Sequence", "normalizers": [{"type": "NFD"}]}, "NFD"),
        (["pre_tokenizer"], {"type": "Whitespace"}, "Whitespace"),
        (["pre_tokenizer"], {"type": "Punctuation", "behavior": "Removed"}, "Punctuation"),
        (["pre_tokenizer"], {"type": "ByteLevel", "add_prefix_space": True}, "add_prefix_space"),
        (["model", "dropout"], 0.1, "random"),
        (["model", "continuing_subword_prefix"], "##", "damaged"),  # in which Rust panics
        (["added_tokens", -1, "lstrip"], True, "strips the whitespace"),
        (["added_tokens", -1, "id"], -1, "id"),
        (["added_tokens", -1, "id"], 2**31, "ids"),
    ],
)
def test_lossy_or_damaged_content_is_refused(
    foreign_content: dict[str, Any], keys: list[Any], value: Any, match: str
) -> None:
    content = part = copy.deepcopy(foreign_content)
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    with pytest.raises(ValueError, match=match) as refused:
        HuggingFaceTokenizer(content, None)
    assert "\n" not in str(refused.value)


def test_model_that_reads_special_tokens_in_text_is_refused(foreign_content: dict[str, Any]) -> None:
    # A text that is a token becomes it, and so does "<|user|>".
    model = {**foreign_content["model"], "ignore_merges": True}
    with pytest.raises(ValueError, match="special token"):
        HuggingFaceTokenizer({**foreign_content, "pre_tokenizer": None, "model": model}, None)


def test_truncation_is_ignored(foreign: Tokenizer, foreign_content: dict[str, Any]) -> None:
    cut = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    read = HuggingFaceTokenizer({**foreign_content, "truncation": cut}, None)
    assert read.encode("the water") == foreign.encode("the water")
    assert read.fingerprint == foreign.fingerprint
