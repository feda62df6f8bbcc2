"""The tokenizers under test, each made once, and pieces of text that have broken tokenizers."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from overnight.tokenizer.open_tokenizer import build_tokenizer, load_tokenizer
from overnight.tokenizer.tokenizer import Tokenizer

SYLLABLES = [*"  é1\n中🙂.", "the", "wa", "ter", "ing", "lo", "99", "'s", "Ro", "meo"]


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """About 100 kB of words that repeat, the same in every process."""
    draw = random.Random(0)
    return ["".join(draw.choices(SYLLABLES, k=300)) for _ in range(150)]


@pytest.fixture(scope="session")
def gpt2(shared_data: Path) -> Tokenizer:
    return load_tokenizer(shared_data / "gpt2-bpe")


@pytest.fixture(scope="session")
def bpe(documents: list[str]) -> Tokenizer:
    return build_tokenizer("bpe-600", documents)


@pytest.fixture(scope="session")
def characters(documents: list[str]) -> Tokenizer:
    return build_tokenizer("characters", documents)


@pytest.fixture(scope="session")
def foreign_content(documents: list[str]) -> dict[str, Any]:
    """A byte-level tokenizer.json in another layout: special ids first, other added tokens last."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>", "<|user|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(documents, trainer)
    made.add_tokens(["<tool>", "    "])
    content: dict[str, Any] = json.loads(made.to_str())
    return content


@pytest.fixture(scope="session")
def foreign(foreign_content: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("foreign") / "tokenizer.json"
    path.write_text(json.dumps(foreign_content), encoding="utf-8")
    return load_tokenizer(path)


@pytest.fixture(scope="session", params=["gpt2", "bpe", "characters", "foreign"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """Each tokenizer in turn."""
    made: Tokenizer = request.getfixturevalue(request.param)
    return made
