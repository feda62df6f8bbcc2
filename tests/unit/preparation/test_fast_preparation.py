"""Shards are tiktoken's, whether fastokens is there, is not, or is found wrong in the middle of the work."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from overnight.data.shards import verify
from overnight.preparation import prepare as prepare_module
from overnight.preparation import tokenize
from overnight.preparation.prepare import prepare_shards
from overnight.preparation.prepare_config import PrepareConfig
from overnight.tokenizer.fast_byte_pair import FastBytePair

pytest.importorskip("fastokens")

TEXTS = [f"Document {number} of them, it's {'word ' * (number % 37)}" for number in range(400)]
LATE = 300  # the first documents of the last units, which are checked, are among those from here on


@pytest.fixture
def config(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> PrepareConfig:
    """Texts in about 30 units, of each of which one document is checked."""
    monkeypatch.setattr(prepare_module, "UNIT_BYTES", 1000)
    monkeypatch.setattr(tokenize, "CHECKED_DOCUMENTS", 1)
    config: PrepareConfig = make_config(TEXTS, files=40, tokenizer="bpe-300", shard_tokens=5000)
    return config


@pytest.fixture
def expected(config: PrepareConfig, contents: Any) -> dict[str, bytes]:
    """What tiktoken makes of the texts."""
    alone = dataclasses.replace(config, out=f"{config.out}-alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "fastokens", None)
        prepare_shards(alone)
    found: dict[str, bytes] = contents(alone.out)
    return found


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that fastokens encodes."""
    texts: list[str] = []
    replace_encoder(monkeypatch, lambda text, ids: texts.append(text) or ids)  # type: ignore[func-returns-value]
    return texts


def replace_encoder(monkeypatch: pytest.MonkeyPatch, change: Callable[[str, Any], Any]) -> None:
    real = FastBytePair.encode_batch

    def encode_batch(self: FastBytePair, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        return [change(text, ids) for text, ids in zip(texts, real(self, texts), strict=True)]

    monkeypatch.setattr(FastBytePair, "encode_batch", encode_batch)


def wrong_in_the_end(text: str, ids: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """One id more, where nobody looks at first, and later where the reference does."""
    number = int(text.split()[1]) if text.startswith("Document") else 0
    return np.append(ids, ids[-1:]) if number % 10 == 7 or number > LATE else ids


def test_shards_are_tiktokens(
    config: PrepareConfig, expected: dict[str, bytes], encoded: list[str], contents: Any
) -> None:
    prepare_shards(config)
    assert contents(config.out) == expected
    assert {*TEXTS} <= {*encoded}


@pytest.mark.parametrize("early", [False, True], ids=["at-once", "in-waves"])
def test_disagreement_in_a_later_unit_undoes_the_earlier(
    config: PrepareConfig,
    expected: dict[str, bytes],
    contents: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    early: bool,
) -> None:
    replace_encoder(monkeypatch, wrong_in_the_end)
    monkeypatch.setattr(prepare_module, "EARLY_BYTES", 4000 if early else 1 << 40)
    capsys.readouterr()
    prepare_shards(config)
    assert contents(config.out) == expected
    verify(Path(config.out))
    assert capsys.readouterr().err.count("tiktoken encodes instead") == 1
    # Negative control: without the reference the shards are others.
    wrong = dataclasses.replace(config, out=f"{config.out}-wrong")
    monkeypatch.setattr(FastBytePair, "difference", lambda *_: None)
    prepare_shards(wrong)
    assert contents(wrong.out) != expected


def test_missing_backend_is_said_once(
    config: PrepareConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "fastokens", None)
    prepare_shards(config)
    assert capsys.readouterr().err.count("overnight[fast]") == 1


def test_text_of_one_unit_does_not_start_the_backend(
    config: PrepareConfig,
    encoded: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(prepare_module, "UNIT_BYTES", 1 << 30)
    prepare_shards(config)
    assert not encoded
    assert "fastokens" not in capsys.readouterr().err
