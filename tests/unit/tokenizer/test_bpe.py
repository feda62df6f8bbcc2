"""tiktoken gives the ids that the merges give, however long the blanks."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import regex
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from overnight.tokenizer import bpe as bpe_module
from overnight.tokenizer.bpe import BytePair, read_byte_pair, spelled_bytes, tiktoken_agrees, train_byte_pair
from overnight.tokenizer.tokenizer import END_OF_TEXT, Tokenizer

EVERY_CHARACTER = "".join(chr(point) for point in range(sys.maxunicode + 1) if not 0xD800 <= point < 0xE000)
BLANK_TEXTS = st.text(st.sampled_from("ab1!'é \n\t\xa0\x1c\x85\u2028\u3000"), max_size=60)


def by_merges(merges: list[tuple[str, str]], text: str) -> list[int]:
    """The ids by Hugging Face's `tokenizers`, which applies the merges themselves."""
    reference = tokenizers.Tokenizer(models.BPE(vocab=bpe_module.vocabulary(merges), merges=merges))
    reference.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    ids: list[int] = reference.encode(text).ids
    return ids


def test_byte_spelling_is_gpt2s() -> None:
    spelling = bpe_module.byte_characters()
    assert sorted(spelling) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert (spelling[ord("a")], spelling[ord(" ")], spelling[ord("\n")], spelling[0]) == ("a", "Ġ", "Ċ", "Ā")
    assert spelled_bytes(["Ġthe", "Ã©", "a b", "中"]) == [b" the", "é".encode(), b"a b", "中".encode()]


def test_bpe_learns_the_most_frequent_pairs_in_gpt2s_layout() -> None:
    tokenizer = train_byte_pair(["low low low low lower lower newest"], 260)
    assert tokenizer.token_bytes()[256:] == [b"lo", b"low", b" low", b""]
    assert tokenizer.encode("! low") == [0, 258]
    assert (tokenizer.name, tokenizer.end_of_text) == ("bpe-260", 259)


def test_training_passes_on_errors_of_documents(documents: list[str]) -> None:
    def failing() -> Iterator[str]:
        yield documents[0]
        raise ValueError("line 7 is damaged")

    with pytest.raises(ValueError, match="line 7"):
        train_byte_pair(failing(), 300)
    assert train_byte_pair([*documents, "half \ud83d"], 300).vocab_size == 300
    with pytest.raises(ValueError, match=r"bpe-4096, .* bpe-259"):
        train_byte_pair(["abc"], 4096)


@given(text=st.text(max_size=80))
@settings(max_examples=300, deadline=None)
def test_tiktoken_equals_the_merges(bpe: BytePair, text: str) -> None:
    assert bpe.encode(text) == by_merges(bpe._merges, text)


def test_merges_that_tiktoken_reads_otherwise_are_refused(bpe: BytePair) -> None:
    # "abc" alone: b and c join first, and no merge joins a with bc. tiktoken would, since "abc" is a token.
    shadowed = [("b", "c"), ("a", "b"), ("ab", "c")]
    assert BytePair(shadowed).encode("abc") != by_merges(shadowed, "abc")
    assert not tiktoken_agrees(shadowed)
    assert not tiktoken_agrees([("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")])  # learned twice
    assert not tiktoken_agrees([("ab", "c"), ("a", "b")])  # before its parts
    assert not tiktoken_agrees([("a", "nothing")])
    assert tiktoken_agrees([("a", "b"), ("b", "c"), ("ab", "c")])
    assert tiktoken_agrees(bpe._merges)


# Long runs of blanks


def test_blanks_are_those_of_tiktoken() -> None:
    ranks = {bytes([byte]): byte for byte in range(256)}
    alone = tiktoken.Encoding("blanks", pat_str=r"\s", mergeable_ranks=ranks, special_tokens={})
    blanks = alone.decode(alone.encode_ordinary(EVERY_CHARACTER))
    assert set(blanks) == set(regex.findall(r"\p{White_Space}", EVERY_CHARACTER))
    assert set(blanks) == {found for run in bpe_module.BLANKS.findall(EVERY_CHARACTER) for found in run}


def check_blanks(tokenizer: BytePair, text: str, stride: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bpe_module, "STRIDE", stride)
        assert tokenizer.encode(text) == tokenizer._encoding.encode_ordinary(text)


@given(text=BLANK_TEXTS, stride=st.integers(1, 20))
@settings(max_examples=300, deadline=None)
def test_cutting_long_blanks_changes_no_id(bpe: BytePair, text: str, stride: int) -> None:
    check_blanks(bpe, text, stride)


@pytest.mark.parametrize("mutant", [r"\s*", r"[^\S\x1c-\x1f]*."])
def test_cut_at_another_place_is_caught(bpe: BytePair, mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_blanks(bpe, "a     \x1cb      b", 4)
    monkeypatch.setattr(bpe_module, "BLANKS", re.compile(mutant))
    with pytest.raises(AssertionError):
        check_blanks(bpe, "a     \x1cb      b", 4)


def test_long_blanks_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bpe_module, "STRIDE", 10)
    parts = list(bpe_module._parts("a" + " " * 50 + "b" + " " * 50))
    assert parts == ["a" + " " * 49, " b" + " " * 50]


# tokenizer.json


@pytest.fixture
def content(bpe: Tokenizer, tmp_path: Path) -> dict[str, Any]:
    bpe.save(tmp_path)
    found: dict[str, Any] = json.loads((tmp_path / "tokenizer.json").read_text())
    return found


def test_both_spellings_of_tokenizer_json_are_read(bpe: Tokenizer, content: dict[str, Any]) -> None:
    content["model"]["merges"] = [merge.split(" ") for merge in content["model"]["merges"]]
    del content["model"]["vocab"][END_OF_TEXT]  # it may be an added token only
    read = read_byte_pair(content)
    assert read
    assert read.fingerprint == bpe.fingerprint


@pytest.mark.parametrize(
    "key, value",
    [
        ("normalizer", {"type": "NFC"}),
        ("pre_tokenizer", None),
        ("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": True}),
        ("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}),
        ("added_tokens", []),
        ("added_tokens", [{"content": END_OF_TEXT, "id": 0}]),
        ("type", "WordPiece"),
        ("dropout", 0.1),
        ("continuing_subword_prefix", "##"),
        ("end_of_word_suffix", "##"),
        ("vocab", {"a": 0}),
        ("merges", []),
    ],
)
def test_other_tokenizer_json_is_not_read_as_bpe(content: dict[str, Any], key: str, value: Any) -> None:
    assert read_byte_pair(content) is not None
    part = content if key in content else content["model"]
    part[key] = value
    assert read_byte_pair(content) is None


def test_bpe_that_tiktoken_cannot_run_is_not_read_as_bpe(content: dict[str, Any]) -> None:
    merges = [("b", "c"), ("a", "b"), ("ab", "c")]
    content["model"] = {"type": "BPE", "vocab": bpe_module.vocabulary(merges), "merges": merges}
    content["added_tokens"][0]["id"] = 259
    assert read_byte_pair(content) is None
