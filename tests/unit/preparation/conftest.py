"""Small corpora, and what prepared folders hold."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from overnight.data.shards import SPLITS, open_tokens, read_manifest
from overnight.preparation import prepare
from overnight.preparation.prepare_config import PrepareConfig
from overnight.preparation.prepare_state import open_tokenizer

Contents = Callable[[str | Path], dict[str, bytes]]
TextsIn = Callable[[PrepareConfig], dict[str, list[str]]]


def json_lines(texts: Sequence[object]) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., PrepareConfig]:
    """`make_config(texts, files, **options)`: texts, divided among files of JSON lines, to be prepared."""

    def make(texts: Sequence[str], files: int, **options: Any) -> PrepareConfig:
        (tmp_path / "texts").mkdir(exist_ok=True)
        size = -(-len(texts) // files)
        for number in range(files):
            part = texts[number * size :][:size]
            (tmp_path / "texts" / f"{number}.jsonl").write_text(json_lines(part))
        usual = {"tokenizer": "characters", "validation_fraction": 0.2, "workers": 1}
        return PrepareConfig(source=str(tmp_path / "texts"), out=str(tmp_path / "out"), **(usual | options))

    return make


@pytest.fixture(scope="session")
def write_texts() -> Callable[[Path, Sequence[str]], Path]:
    """`write_texts(path, texts)` writes JSON lines."""

    def write(path: Path, texts: Sequence[str]) -> Path:
        path.write_text(json_lines(texts))
        return path

    return write


@pytest.fixture(scope="session")
def contents() -> Contents:
    """`contents(folder)`: all files by their paths below the folder."""

    def read(folder: str | Path) -> dict[str, bytes]:
        files = (path for path in Path(folder).rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}

    return read


@pytest.fixture(scope="session")
def texts_in() -> TextsIn:
    """`texts_in(config)`: the documents of each split, decoded from the shards."""

    def read(config: PrepareConfig) -> dict[str, list[str]]:
        folder = Path(config.out)
        manifest = read_manifest(folder)
        tokenizer = open_tokenizer(folder)
        texts = {}
        for split in SPLITS:
            ids = np.concatenate([open_tokens(folder / shard.name) for shard in manifest.shards(split)])
            first, *pieces = np.split(ids, np.flatnonzero(ids == manifest.end_of_text))
            assert first.size == 0  # the first id is a separator
            texts[split] = [tokenizer.decode(piece[1:].tolist()) for piece in pieces]
        return texts

    return read


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small corpus has many units."""
    monkeypatch.setattr(prepare, "UNIT_BYTES", 3000)
