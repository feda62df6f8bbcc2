"""Names, folders and files; one plain sentence for everything else."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from overnight.tokenizer.open_tokenizer import HuggingFaceTokenizer, build_tokenizer, load_tokenizer
from overnight.tokenizer.tokenizer import Tokenizer


def unread() -> Iterator[str]:
    raise AssertionError("the documents were read")
    yield ""


def test_loading_reads_no_documents(bpe: Tokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path)
    assert build_tokenizer(str(tmp_path), unread()).fingerprint == bpe.fingerprint
    shutil.move(tmp_path / "tokenizer.json", tmp_path / "bpe-mine.json")  # a file of any name
    assert build_tokenizer(str(tmp_path / "bpe-mine.json"), unread()).fingerprint == bpe.fingerprint


@pytest.mark.parametrize("name", ["bpe-0", "bpe-257", "bpe-65536", "bpe-99999999999999999999"])
def test_bpe_has_258_to_65535_ids(name: str) -> None:
    for make in (load_tokenizer, lambda name: build_tokenizer(name, unread())):
        with pytest.raises(ValueError, match=f"{name} .* bpe-258 .* bpe-65535"):
            make(name)


def test_unknown_name_suggests_the_nearest() -> None:
    for name, meant in (("gpt-2", "gpt2"), ("character", "characters"), ("bpe-4k", "bpe-4096")):
        with pytest.raises(ValueError, match=f"'{name}'; did you mean {meant}"):
            build_tokenizer(name, unread())
    for name in ("characters", "bpe-4096"):
        with pytest.raises(ValueError, match=f"--tokenizer {name}"):
            load_tokenizer(name)


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe",
        b"[]",
        b"[" * 100_000,
        b"{}",
        b'{"model": {"type": "BPE"}}',
        b'{"model": {"vocab": 3, "merges": [], "byte_fallback": true}}',
        b'{"model": {"vocab": {"a": 0}}, "added_tokens": [{}]}',
    ],
)
def test_damaged_file_is_named_in_one_sentence(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.json.*encoder\.json"):
        load_tokenizer(tmp_path)  # an empty folder
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=str(tmp_path / "tokenizer.json")) as refused:
        load_tokenizer(tmp_path)
    assert "\n" not in str(refused.value)


def test_no_damage_to_a_saved_file_goes_unnoticed(bpe: Tokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    whole = path.read_text(encoding="utf-8")
    for position in range(whole.index('"vocab"'), len(whole), 97):
        path.write_text(whole[:position] + "~" + whole[position + 1 :], encoding="utf-8")
        try:
            assert load_tokenizer(tmp_path).fingerprint != bpe.fingerprint
        except ValueError as refused:
            assert "\n" not in str(refused)  # noqa: PT017  # either way is right


def test_end_of_text_is_read_from_tokenizer_config(foreign: Tokenizer, tmp_path: Path) -> None:
    foreign.save(tmp_path)
    for token in ("<|user|>", {"content": "<|user|>"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": token}))
        assert load_tokenizer(tmp_path).end_of_text == 1


# A tokenizer.json of another program: its ids, and none of its special ones from text


def test_ids_are_those_of_the_file(
    foreign: Tokenizer, foreign_content: dict[str, Any], documents: list[str]
) -> None:
    reference = tokenizers.Tokenizer.from_str(json.dumps(foreign_content))
    for text in documents:
        plain = text.replace("    ", "")  # four blanks are one of its added tokens
        assert foreign.encode(plain) == reference.encode(plain).ids
    assert foreign.vocab_size == reference.get_vocab_size() == 502
    assert (foreign.name, foreign.end_of_text) == ("bpe-502", 0)
    assert [id for id, spelled in enumerate(foreign.token_bytes()) if not spelled] == [0, 1]
    assert foreign.token_bytes()[-2:] == [b"<tool>", b"    "]


def test_text_never_becomes_an_added_token(foreign: Tokenizer, foreign_content: dict[str, Any]) -> None:
    text = "a<|user|>b    c<|endoftext|><tool>"
    added = {token["id"] for token in foreign_content["added_tokens"]}
    assert len(added) == 4
    assert not added.intersection(foreign.encode(text))
    assert foreign.decode(foreign.encode(text)) == text
    trusting = tokenizers.Tokenizer.from_str(json.dumps(foreign_content))
    assert added.issubset(trusting.encode(text).ids)  # the control


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
        (["decoder"], None, "decoder ByteLevel"),
        (["normalizer"], {"type": "Lowercase"}, "two  blanks"),
        (["pre_tokenizer"], {"type": "Unheard"}, "damaged"),
        (["added_tokens", -1, "id"], -1, "ids"),
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
