"""GPT-2's tokenizer from OpenAI's two files: in a folder, the cache or from a download."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest

from overnight.files import cache_path
from overnight.tokenizer import bpe
from overnight.tokenizer.bpe import BytePair, vocabulary
from overnight.tokenizer.open_tokenizer import load_tokenizer


@pytest.fixture
def files(shared_data: Path, tmp_path: Path) -> Path:
    """A writable copy of GPT-2's two files."""
    (tmp_path / "gpt2-bpe").mkdir()
    for name in bpe.FILES:
        shutil.copyfile(shared_data / "gpt2-bpe" / name, tmp_path / "gpt2-bpe" / name)
    return tmp_path / "gpt2-bpe"


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_path() / "gpt2"


@pytest.fixture
def download(files: Path, monkeypatch: pytest.MonkeyPatch) -> Mock:
    """Counts the downloads, which read `files` instead of the published address."""
    counted = Mock(wraps=bpe._download)
    monkeypatch.setattr(bpe, "ADDRESS", files.as_uri())
    monkeypatch.setattr(bpe, "_download", counted)
    return counted


def test_ids_of_encoder_json_follow_from_the_merges(gpt2: BytePair, shared_data: Path) -> None:
    published = json.loads((shared_data / "gpt2-bpe/encoder.json").read_text(encoding="utf-8"))
    assert vocabulary(gpt2._merges) == published
    assert (gpt2.name, gpt2.vocab_size, gpt2.end_of_text) == ("gpt2", 50257, 50256)
    assert gpt2.fingerprint == bpe.FILES["vocab.bpe"]


@pytest.mark.parametrize("name", ["encoder.json", "vocab.bpe"])
def test_damaged_or_missing_gpt2_file_is_named(files: Path, name: str) -> None:
    assert load_tokenizer(files).name == "gpt2"
    content = bytearray((files / name).read_bytes())
    content[len(content) // 2] ^= 1
    (files / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is damaged.* https://"):
        load_tokenizer(files)
    (files / name).unlink()
    with pytest.raises(ValueError, match=f"{name} is missing.* https://"):
        load_tokenizer(files)


def test_gpt2_is_downloaded_once_and_again_if_damaged(download: Mock, empty_cache: Path) -> None:
    for requests in (2, 2, 3):
        if requests == 3:
            (empty_cache / "vocab.bpe").write_bytes(b"#version: 0.2\n")
        assert load_tokenizer("gpt2").name == "gpt2"
        assert download.call_count == requests
    assert sorted(path.name for path in empty_cache.iterdir()) == ["encoder.json", "vocab.bpe"]


@pytest.mark.usefixtures("download")
@pytest.mark.parametrize("content", [None, b"", b"<html>please log in</html>"])
def test_failed_or_wrong_download_is_refused_and_not_cached(
    files: Path, empty_cache: Path, content: bytes | None
) -> None:
    sound = (files / "vocab.bpe").read_bytes()
    (files / "vocab.bpe").unlink() if content is None else (files / "vocab.bpe").write_bytes(content)
    with pytest.raises(ValueError, match=r"fetched \(.*vocab.bpe") as refused:
        load_tokenizer("gpt2")
    assert f"put encoder.json and vocab.bpe from {bpe.ADDRESS} into {empty_cache}" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert [path.name for path in empty_cache.iterdir()] == ["encoder.json"]
    (empty_cache / "vocab.bpe").write_bytes(sound)  # as the message says
    assert load_tokenizer("gpt2").name == "gpt2"
