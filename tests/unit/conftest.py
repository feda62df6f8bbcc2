"""A tokenizer of bytes, and prepared folders of any ids."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from overnight.data import shards
from overnight.data.shards import SPLITS, Manifest, write_manifest, write_split
from overnight.preparation import identity, prepare_state, tokenize


class ByteTokenizer:
    """A text's ids are its UTF-8 bytes; 256 is the separator. `learned` shows in the fingerprint."""

    name, vocab_size, end_of_text = "bytes", 257, 256

    def __init__(self, learned: str = "") -> None:
        self.learned = learned
        self.fingerprint = hashlib.sha256(learned.encode()).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode()

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "learned.txt").write_text(self.learned)


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of small folders are written here; none has to outlive a power cut."""
    if request.path.parent.name in {"data", "preparation", "inspection"}:
        monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def byte_tokenizer(monkeypatch: pytest.MonkeyPatch) -> ByteTokenizer:
    """Preparation knows two tokenizers: "bytes", and "learned", which records every training document."""

    def build(name: str, documents: Iterable[str]) -> ByteTokenizer:
        return ByteTokenizer("\n".join(documents)) if name == "learned" else load(name)

    def load(name: str | Path) -> ByteTokenizer:
        return ByteTokenizer((Path(name) / "learned.txt").read_text() if Path(name).is_dir() else "")

    monkeypatch.setattr(identity, "NAMES", ("bytes", "learned"))
    monkeypatch.setattr(tokenize, "build_tokenizer", build)
    for module in (identity, prepare_state, shards):
        monkeypatch.setattr(module, "load_tokenizer", load)
    return ByteTokenizer()


Documents = dict[str, list[tuple[NDArray[np.uint32], int]]]
COUNTS = ("duplicate_documents", "empty_documents", "skipped_documents", "repaired_documents")
FIELDS = {
    **{"overnight_version": "0", "source": "numbers", "licence": "none", "request": {}},
    **{"split_rule": "by hand", "tokenizer": "gpt2", "tokenizer_fingerprint": "f" * 64},
    **{"vocab_size": 50_257, "end_of_text": 50_256, **dict.fromkeys(COUNTS, 0)},
}


@pytest.fixture(scope="session")
def prepared_documents() -> Callable[..., Manifest]:
    """`prepared_documents(folder, documents, shard_tokens, **fields of the manifest)` writes a folder.

    `documents` are, for each split, pairs of ids and bytes of text.
    """

    def write(folder: Path, documents: Documents, shard_tokens: int, **changes: Any) -> Manifest:
        folder.mkdir(parents=True, exist_ok=True)
        fields: dict[str, Any] = {**FIELDS, "documents": sum(map(len, documents.values())), **changes}
        for split in SPLITS:
            fields[split] = write_split(folder, split, documents[split], fields["vocab_size"], shard_tokens)
        write_manifest(folder, manifest := Manifest(**fields))
        return manifest

    return write


@pytest.fixture(scope="session")
def prepared(prepared_documents: Callable[..., Manifest]) -> Callable[..., Manifest]:
    """`prepared(folder, train ids, validation ids, shard_tokens)`: each split is one document."""

    def write(
        folder: Path, train: Sequence[int], validation: Sequence[int] = (0, 1), shard_tokens: int = 100
    ) -> Manifest:
        splits = {"train": train, "validation": validation}
        documents = {name: [(np.array(ids, np.uint32), 2 * len(ids))] for name, ids in splits.items()}
        return prepared_documents(folder, documents, shard_tokens)

    return write
