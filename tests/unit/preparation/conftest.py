"""Small corpora, and what prepared folders hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from overnight.data.shards import open_tokens, read_manifest
from overnight.preparation import prepare
from overnight.preparation.prepare_config import PrepareConfig
from overnight.tokenizer.open_tokenizer import load_tokenizer

WriteTexts = Callable[[Path, list[str]], Path]
Contents = Callable[[str | Path | None], dict[str, bytes]]
TextsIn = Callable[[PrepareConfig, str], list[str]]


@pytest.fixture(scope="session")
def write_texts() -> WriteTexts:
    """`write_texts(path, texts)` writes JSON lines."""

    def write(path: Path, texts: list[str]) -> Path:
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return path

    return write


@pytest.fixture(scope="session")
def contents() -> Contents:
    """`contents(folder)`: all files by their paths below the folder."""

    def read(folder: str | Path | None) -> dict[str, bytes]:
        root = Path(folder or "")
        return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}

    return read


@pytest.fixture(scope="session")
def texts_in() -> TextsIn:
    """`texts_in(config, split)`: the documents of a split, decoded from the shards."""

    def read(config: PrepareConfig, split: str) -> list[str]:
        folder = Path(config.out or "")
        manifest = read_manifest(folder)
        ids = np.concatenate([open_tokens(folder / shard.name) for shard in manifest.shards(split)])
        pieces = np.split(ids, np.flatnonzero(ids == manifest.end_of_text))
        assert pieces[0].size == 0  # the first id is a separator
        if manifest.tokenizer == "bytes":
            return [bytes(piece[1:].tolist()).decode() for piece in pieces[1:]]
        tokenizer = load_tokenizer(folder / "tokenizer")
        return [tokenizer.decode(piece[1:].tolist()) for piece in pieces[1:]]

    return read


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small corpus has many units."""
    monkeypatch.setattr(prepare, "UNIT_BYTES", 3000)
