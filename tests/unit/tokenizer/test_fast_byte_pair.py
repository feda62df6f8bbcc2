"""fastokens gives tiktoken's ids or is not used; stand-ins for it fail in every way."""

from __future__ import annotations

import random
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overnight.tokenizer import fast_byte_pair
from overnight.tokenizer.bpe import BytePair
from overnight.tokenizer.fast_byte_pair import FastBytePair, accelerate, hostile_texts
from overnight.tokenizer.tokenizer import END_OF_TEXT, Tokenizer

native = pytest.importorskip("fastokens._native")
LONG_RUNS = [
    character * 300_000 for character in ("a", " ", "\n", "\0", "1", "!", "好", "e\u0301", "🙂", "\xa0")
]


class Panic(BaseException):
    """As pyo3's PanicException, which is no Exception."""


def stand_in(change: Any) -> type:
    """The class of fastokens, except that `change` makes the result from the real one."""

    class Encoder:
        def __init__(self, content: str) -> None:
            self.real = native.Tokenizer.from_json_str(content)

        from_json_str = classmethod(lambda cls, content: cls(content))

        def encode_batch_flat(self, texts: list[str]) -> tuple[bytes, bytes]:
            return change(texts[0], self.real.encode_batch_flat(texts))  # type: ignore[no-any-return]

    return Encoder


@pytest.fixture(scope="module")
def fast_bpe(bpe: BytePair) -> FastBytePair:
    return FastBytePair(bpe)


def replace_backend(monkeypatch: pytest.MonkeyPatch, encoder: object) -> None:
    module = types.ModuleType("fastokens._native")
    vars(module)["Tokenizer"] = encoder
    monkeypatch.setitem(sys.modules, "fastokens._native", module)


def swap_script(text: str, result: tuple[bytes, bytes]) -> tuple[bytes, bytes]:
    """An encoder that knows an older Unicode: the letters of its latest block fall out of their words."""
    return (result[0][4:], result[1]) if max(text, default="") >= "\U00031350" else result


def panic(text: str, result: object) -> tuple[bytes, bytes]:
    raise Panic("index out of bounds")


@pytest.mark.parametrize("which", ["gpt2", "bpe"])
def test_hostile_texts_have_tiktokens_ids(which: str, request: pytest.FixtureRequest) -> None:
    reference: BytePair = request.getfixturevalue(which)
    fast, problem = accelerate(reference)
    assert isinstance(fast, FastBytePair)
    assert problem is None
    surrogates = ["half \ud83d", "\udc00", "\ud83d\ude42 a pair"]
    whole = [END_OF_TEXT, f"x{END_OF_TEXT}y", *surrogates, *LONG_RUNS, *hostile_texts()]
    assert fast.difference(whole) is None
    assert fast.end_of_text not in fast.encode(END_OF_TEXT)
    assert (fast.fingerprint, fast.to_json()) == (reference.fingerprint, reference.to_json())


@given(text=st.text(max_size=200))
@settings(max_examples=300, deadline=None)
def test_any_text_has_tiktokens_ids(fast_bpe: FastBytePair, text: str) -> None:
    assert fast_bpe.difference([text]) is None


def test_threads_share_one_encoder(gpt2: BytePair) -> None:
    fast, draw = FastBytePair(gpt2), random.Random(1)
    texts = ["".join(draw.choices("abcdefg  'ß好1!\n", k=2000)) for _ in range(400)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda text: fast.encode_batch([text])[0], texts))
    assert all(map(np.array_equal, found, gpt2.encode_batch(texts)))


@pytest.mark.parametrize(
    "change", [swap_script, lambda text, result: (result[0] * 2, result[1])], ids=["unicode", "all"]
)
def test_backend_that_disagrees_is_not_used(
    monkeypatch: pytest.MonkeyPatch, bpe: BytePair, change: Any
) -> None:
    replace_backend(monkeypatch, stand_in(lambda text, result: result))
    assert isinstance(accelerate(bpe)[0], FastBytePair)  # the negative control
    replace_backend(monkeypatch, stand_in(change))
    tokenizer, problem = accelerate(bpe)
    assert tokenizer is bpe
    assert problem is not None
    assert "disagree" in problem


def test_text_of_a_panic_is_encoded_by_the_reference(monkeypatch: pytest.MonkeyPatch, bpe: BytePair) -> None:
    replace_backend(monkeypatch, stand_in(panic))
    assert FastBytePair(bpe).encode("some text") == bpe.encode("some text")
    replace_backend(monkeypatch, stand_in(lambda text, result: result and sys.exit(3)))
    with pytest.raises(SystemExit):
        FastBytePair(bpe).encode("some text")


def test_missing_backend_is_one_sentence(monkeypatch: pytest.MonkeyPatch, bpe: BytePair) -> None:
    monkeypatch.setitem(sys.modules, "fastokens", None)
    tokenizer, problem = accelerate(bpe)
    assert tokenizer is bpe
    assert problem is not None
    assert "overnight[fast]" in problem


@pytest.mark.parametrize(
    "attempt",
    ["import os, signal; os.kill(os.getpid(), signal.SIGILL)", "import no_such_module", "while 1: 0"],
)
def test_backend_that_cannot_start_is_not_loaded_here(
    monkeypatch: pytest.MonkeyPatch, bpe: BytePair, attempt: str
) -> None:
    replace_backend(monkeypatch, None)  # loading it here would fail
    monkeypatch.setattr(fast_byte_pair, "ATTEMPT", attempt)
    monkeypatch.setattr(fast_byte_pair, "START_SECONDS", 3.0)
    tokenizer, problem = accelerate(bpe)
    assert tokenizer is bpe
    assert problem is not None
    assert "does not run" in problem


def test_backend_that_cannot_load_the_tokenizer(monkeypatch: pytest.MonkeyPatch, bpe: BytePair) -> None:
    replace_backend(monkeypatch, types.SimpleNamespace(from_json_str=lambda content: panic("", None)))
    tokenizer, problem = accelerate(bpe)
    assert tokenizer is bpe
    assert problem is not None
    assert "can't load" in problem


@pytest.mark.parametrize("which", ["characters", "foreign"])
def test_other_tokenizers_are_left_as_they_are(which: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(which)
    assert accelerate(tokenizer) == (tokenizer, None)
