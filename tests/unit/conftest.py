"""A tokenizer of bytes, and prepared folders of any ids."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from overnight.data import shards
from overnight.data.shards import Manifest, ShardWriter, write_manifest
from overnight.preparation import prepare, prepare_state, tokenize


class ByteTokenizer:
    """A text's ids are its UTF-8 bytes; 256 is the separator. `learned` shows in the fingerprint."""

    name, vocab_size, end_of_text = "bytes", 257, 256

    def __init__(self, learned: str = "") -> None:
        self.learned = learned
        self.fingerprint = hashlib.sha256(learned.encode()).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32) for text in texts]

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

    monkeypatch.setattr(prepare, "NAMES", ("bytes", "learned"))
    monkeypatch.setattr(tokenize, "build_tokenizer", build)
    for module in (prepare, prepare_state, shards):
        monkeypatch.setattr(module, "load_tokenizer", load)
    return ByteTokenizer()


def write_prepared_folder(
    folder: Path, train: Sequence[int], validation: Sequence[int] = (0, 1), shard_tokens: int = 100
) -> Manifest:
    """A prepared folder of these ids, in a vocabulary of 50,257; each split is one document."""
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for split, ids in (("train", train), ("validation", validation)):
        writer = ShardWriter(folder, split, 50_257, shard_tokens)
        writer.add(np.array(ids, dtype=np.uint32), text_bytes=2 * len(ids))
        written[split] = writer.finish()
    manifest = Manifest(
        overnight_version="0",
        source="numbers",
        licence="none",
        request={},
        split_rule="by hand",
        tokenizer="gpt2",
        tokenizer_fingerprint="f" * 64,
        vocab_size=50_257,
        end_of_text=50_256,
        documents=2,
        duplicate_documents=0,
        empty_documents=0,
        skipped_documents=0,
        repaired_documents=0,
        train=written["train"],
        validation=written["validation"],
    )
    write_manifest(folder, manifest)
    return manifest


@pytest.fixture(scope="session")
def prepared() -> Callable[..., Manifest]:
    """`prepared(folder, train ids, validation ids, shard_tokens)` writes a folder that verifies."""
    return write_prepared_folder
