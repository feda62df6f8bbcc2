"""tiktoken does exactly what the merges say, however long the blanks."""

from __future__ import annotations

import json
import re
import sys
import time
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
from overnight.tokenizer.bpe import BytePair, read_byte_pair, run_alike, spelled_bytes, train_byte_pair
from overnight.tokenizer.tokenizer import END_OF_TEXT, Tokenizer

EVERY_CHARACTER = "".join(chr(point) for point in range(sys.maxunicode + 1) if not 0xD800 <= point < 0xE000)
BLANK_TEXTS = st.text(st.sampled_from("ab1!'é \n\t\xa0\x1c\x85\u2028\u3000"), max_size=60)


def by_merges(merges: list[tuple[str, str]], text: str) -> list[int]:
    """The ids by Hugging Face's `tokenizers`, which applies the merges themselves."""
    reference = tokenizers.Tokenizer(models.BPE(vocab=bpe_module.vocabulary(merges), merges=merges))
    reference.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    ids: list[int] = reference.encode(text).ids
    return ids


def test_bytes_are_spelled_as_in_gpt2() -> None:
    spelling = bpe_module.byte_characters()
    assert sorted(spelling) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert (spelling[ord("a")], spelling[ord(" ")], spelling[ord("\n")], spelling[0]) == ("a", "Ġ", "Ċ", "Ā")
    assert spelled_bytes(["Ġthe", "Ã©", "a b", "中"]) == [b" the", "é".encode(), b"a b", "中".encode()]


def test_the_layout_is_gpt2s() -> None:
    tokenizer = BytePair([("Ġ", "t"), ("h", "e")])
    assert tokenizer.vocab_size == 259
    assert tokenizer.encode("! the") == [0, 256, 257]
    assert tokenizer.end_of_text == 258
    assert tokenizer.name == "bpe-259"


def test_training_learns_what_is_most_frequent() -> None:
    tokenizer = train_byte_pair(["low low low low lower lower newest"], 260)
    assert tokenizer.token_bytes()[256:] == [b"lo", b"low", b" low", b""]


def test_training_takes_the_documents_as_they_come(documents: list[str]) -> None:
    with pytest.raises(ValueError, match="line 7 is no text"):
        train_byte_pair(failing(documents), 300)
    assert train_byte_pair([*documents, "half \ud83d"], 300).vocab_size == 300


def failing(documents: list[str]) -> Iterator[str]:
    yield documents[0]
    raise ValueError("line 7 is no text")


def test_too_little_text_is_said() -> None:
    with pytest.raises(ValueError, match="too little text to learn bpe-4096 from: it gives out at bpe-259"):
        train_byte_pair(["abc"], 4096)


def test_training_and_encoding_are_fast(documents: list[str]) -> None:
    text = "".join(documents * 20)  # 2 MB
    started_at = time.process_time()
    tokenizer = train_byte_pair(documents * 20, 3000)
    trained_at = time.process_time()
    tokenizer.encode_batch([text])
    assert trained_at - started_at < 10
    assert time.process_time() - trained_at < 2


@given(text=st.text(max_size=80))
@settings(max_examples=300, deadline=None)
def test_tiktoken_does_what_the_merges_say(bpe: BytePair, text: str) -> None:
    assert bpe.encode(text) == by_merges(bpe._merges, text)


def test_merges_that_tiktoken_would_read_otherwise_are_refused(bpe: BytePair) -> None:
    # "abc" alone: b and c join first, and no merge joins a with bc. tiktoken would, since "abc" is a token.
    shadowed = [("b", "c"), ("a", "b"), ("ab", "c")]
    assert BytePair(shadowed).encode("abc") != by_merges(shadowed, "abc")
    assert not run_alike(shadowed)
    assert not run_alike([("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")])  # learned twice
    assert not run_alike([("ab", "c"), ("a", "b")])  # before its parts
    assert not run_alike([("a", "nothing")])
    assert run_alike([("a", "b"), ("b", "c"), ("ab", "c")])
    assert run_alike(bpe._merges)


# ---------------------------------------------------------------- long runs of blanks


def test_blanks_are_what_tiktoken_takes_for_blanks() -> None:
    ranks = {bytes([byte]): byte for byte in range(256)}
    alone = tiktoken.Encoding("blanks", pat_str=r"\s", mergeable_ranks=ranks, special_tokens={})
    blanks = alone.decode(alone.encode_ordinary(EVERY_CHARACTER))
    assert set(blanks) == set(regex.findall(r"\p{White_Space}", EVERY_CHARACTER))
    assert set(blanks) == {found for run in bpe_module.BLANKS.findall(EVERY_CHARACTER) for found in run}


def cut_and_whole(tokenizer: BytePair, text: str) -> tuple[list[int], list[int]]:
    return tokenizer.encode(text), tokenizer._encoding.encode_ordinary(text)


@given(text=BLANK_TEXTS, stride=st.integers(1, 20))
@settings(max_examples=300, deadline=None)
def test_cutting_long_blanks_changes_no_id(bpe: BytePair, text: str, stride: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bpe_module, "STRIDE", stride)
        cut, whole = cut_and_whole(bpe, text)
    assert cut == whole


@pytest.mark.parametrize("mutant", [r"\s*", r"[^\S\x1c-\x1f]*."])
def test_a_cut_at_another_place_is_caught(
    bpe: BytePair, mutant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bpe_module, "STRIDE", 4)
    text = "a     \x1cb      b"
    assert len(set(map(tuple, cut_and_whole(bpe, text)))) == 1
    monkeypatch.setattr(bpe_module, "BLANKS", re.compile(mutant))
    assert len(set(map(tuple, cut_and_whole(bpe, text)))) == 2


def test_long_blanks_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bpe_module, "STRIDE", 10)
    parts = list(bpe_module._parts("a" + " " * 50 + "b" + " " * 50))
    assert parts == ["a" + " " * 49, " b" + " " * 50]


# ---------------------------------------------------------------- tokenizer.json


@pytest.fixture
def content(bpe: Tokenizer, tmp_path: Path) -> dict[str, Any]:
    bpe.save(tmp_path)
    found: dict[str, Any] = json.loads((tmp_path / "tokenizer.json").read_text())
    return found


def test_merges_may_be_written_in_both_styles(bpe: Tokenizer, content: dict[str, Any]) -> None:
    content["model"]["merges"] = [merge.split(" ") for merge in content["model"]["merges"]]
    read = read_byte_pair(content)
    assert read is not None
    assert read.fingerprint == bpe.fingerprint


def test_end_of_text_may_stand_outside_the_vocabulary(bpe: Tokenizer, content: dict[str, Any]) -> None:
    del content["model"]["vocab"][END_OF_TEXT]
    read = read_byte_pair(content)
    assert read is not None
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
        ("model", {"type": "WordPiece", "vocab": {}}),
        ("model", {"type": "BPE", "vocab": {"a": 0}, "merges": []}),
    ],
)
def test_another_kind_is_not_taken_for_ours(content: dict[str, Any], key: str, value: Any) -> None:
    assert read_byte_pair(content) is not None
    assert read_byte_pair({**content, key: value}) is None


@pytest.mark.parametrize("key", ["dropout", "continuing_subword_prefix", "end_of_word_suffix"])
def test_a_bpe_with_a_peculiarity_is_not_taken_for_ours(content: dict[str, Any], key: str) -> None:
    content["model"][key] = 0.1 if key == "dropout" else "##"
    assert read_byte_pair(content) is None


def test_merges_of_another_order_are_not_taken_for_ours(content: dict[str, Any]) -> None:
    merges = [("b", "c"), ("a", "b"), ("ab", "c")]
    content["model"] = {"type": "BPE", "vocab": bpe_module.vocabulary(merges), "merges": merges}
    content["added_tokens"][0]["id"] = 259
    assert read_byte_pair(content) is None
