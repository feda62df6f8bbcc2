"""Names, folders and files; one plain sentence for everything else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from overnight.tokenizer.open_tokenizer import build_tokenizer, load_tokenizer
from overnight.tokenizer.tokenizer import Tokenizer


def unread() -> Iterator[str]:
    raise AssertionError("the documents were read")
    yield ""


def test_loading_reads_no_documents(bpe: Tokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path)
    assert build_tokenizer(str(tmp_path), unread()).fingerprint == bpe.fingerprint
    mine = tmp_path / "bpe-mine.json"  # a file of any name, here with a byte order mark
    shutil.move(tmp_path / "tokenizer.json", mine)
    mine.write_bytes(b"\xef\xbb\xbf" + mine.read_bytes())
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
    assert not any(word in str(refused.value) for word in ("\n", "codec"))


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_damaged_vocabulary_or_merges_are_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / name).write_bytes(b"\xff")
    with pytest.raises(ValueError, match=name):
        load_tokenizer(tmp_path)


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
