"""What all tokenizers promise alike: nothing is lost, nothing becomes special, equal ones are known."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from overnight.tokenizer.bpe import BytePair
from overnight.tokenizer.open_tokenizer import build_tokenizer, load_tokenizer
from overnight.tokenizer.tokenizer import Tokenizer, clean

SECONDS_PER_MEGABYTE = 5.0  # of processor time on a busy machine; anything quadratic takes many minutes


def as_utf8(text: str) -> bytes:
    """The text's bytes, computed character by character: the naive twin of `clean`."""
    units = text.encode("utf-16-le", "surrogatepass")
    return units.decode("utf-16-le", "replace").encode()


def check_nothing_is_lost(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode_bytes(ids) == as_utf8(text)
    assert tokenizer.decode(ids) == as_utf8(text).decode()
    assert b"".join(tokenizer.token_bytes()[id] for id in ids) == as_utf8(text)
    assert all(0 <= id < tokenizer.vocab_size for id in ids)


def check_text_stays_text(tokenizer: Tokenizer, text: str) -> None:
    special = {id for id, spelled in enumerate(tokenizer.token_bytes()) if not spelled}
    assert tokenizer.end_of_text in special
    assert not special.intersection(tokenizer.encode(text)), text


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_text_returns_and_stays_text(
    data: st.DataObject, tokenizer: Tokenizer, any_text: st.SearchStrategy[str]
) -> None:
    text = data.draw(any_text)
    check_nothing_is_lost(tokenizer, text)
    check_text_stays_text(tokenizer, text)


class TrustsText(BytePair):
    """The mistake: what the text spells is believed."""

    def _encode(self, text: str) -> NDArray[np.uint32]:
        return self._encoding.encode_to_numpy(text, allowed_special="all")


def test_a_tokenizer_that_believes_its_text_is_caught() -> None:
    check_text_stays_text(BytePair([]), "a<|endoftext|>b")
    with pytest.raises(AssertionError, match="endoftext"):
        check_text_stays_text(TrustsText([]), "a<|endoftext|>b")


class DropsHalfPairs(BytePair):
    """The mistake: what is no character is left out."""

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        return super().encode_batch([text.encode(errors="ignore").decode() for text in texts])


def test_a_tokenizer_that_drops_something_is_caught() -> None:
    check_nothing_is_lost(BytePair([]), "a\ud800b")
    with pytest.raises(AssertionError):
        check_nothing_is_lost(DropsHalfPairs([]), "a\ud800b")


@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_a_batch_is_its_texts_one_by_one(
    data: st.DataObject, tokenizer: Tokenizer, any_text: st.SearchStrategy[str]
) -> None:
    texts = data.draw(st.lists(any_text, max_size=4))
    batch = tokenizer.encode_batch(texts)
    assert [ids.tolist() for ids in batch] == [tokenizer.encode(text) for text in texts]
    assert all(ids.dtype == np.uint32 and ids.flags.writeable for ids in batch)


@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_any_ids_decode_to_their_bytes(data: st.DataObject, tokenizer: Tokenizer) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    spelled = b"".join(tokenizer.token_bytes()[id] for id in ids)
    assert tokenizer.decode_bytes(ids) == spelled
    assert tokenizer.decode_bytes(np.array(ids, dtype=np.uint16)) == spelled  # type: ignore[arg-type]  # as shards are read
    assert tokenizer.decode(ids) == spelled.decode(errors="replace")


def test_the_vocabulary_holds_every_byte_and_one_end_of_text(tokenizer: Tokenizer) -> None:
    spelled = tokenizer.token_bytes()
    assert len(spelled) == tokenizer.vocab_size
    assert {bytes([byte]) for byte in range(256)} <= set(spelled)
    assert spelled[tokenizer.end_of_text] == b""
    assert tokenizer.decode([tokenizer.end_of_text]) == ""


def test_half_a_character_shows_as_the_replacement_character(tokenizer: Tokenizer) -> None:
    by_byte = [tokenizer.token_bytes().index(bytes([byte])) for byte in "🙂".encode()]
    assert tokenizer.decode(by_byte) == "🙂"
    assert tokenizer.decode(by_byte[:2]) == "\ufffd"


@pytest.mark.parametrize("id", [-1, 10**6, 2**40])
def test_an_id_outside_the_vocabulary_is_refused(tokenizer: Tokenizer, id: int) -> None:
    with pytest.raises(ValueError, match=f"has the ids 0 to {tokenizer.vocab_size - 1}, not {id}"):
        tokenizer.decode([0, id])


def test_saved_and_loaded_is_the_same_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "a")
    again = load_tokenizer(tmp_path / "a")
    again.save(tmp_path / "b")
    from_file = load_tokenizer(tmp_path / "b/tokenizer.json")
    for other in (again, from_file):
        assert type(other) is type(tokenizer)
        assert (other.name, other.fingerprint) == (tokenizer.name, tokenizer.fingerprint)
        assert (other.vocab_size, other.end_of_text) == (tokenizer.vocab_size, tokenizer.end_of_text)
        assert other.token_bytes() == tokenizer.token_bytes()
        assert other.encode("it's 中 🙂  <|endoftext|>") == tokenizer.encode("it's 中 🙂  <|endoftext|>")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_different_tokenizers_have_different_fingerprints(documents: list[str]) -> None:
    names = ["characters", "bpe-300", "bpe-301"]
    made = [build_tokenizer(name, part) for name in names for part in (documents, [*documents, "ñ" * 10_000])]
    fingerprints = {tokenizer.fingerprint for tokenizer in made}
    assert len(fingerprints) == len(made)
    assert all(len(fingerprint) == 64 for fingerprint in fingerprints)


@pytest.mark.parametrize("name", ["characters", "bpe-500"])
def test_training_is_deterministic(documents: list[str], name: str) -> None:
    made = {build_tokenizer(name, list(documents)).fingerprint for _ in range(3)}
    made.add(build_tokenizer(name, iter(reversed(documents))).fingerprint)
    assert len(made) == 1


@pytest.mark.parametrize(
    "text",
    [
        "a" * 1_000_000,
        "^" * 1_000_000,
        " " * 1_000_000,
        " " * 1_000_000 + "x",
        "<|endoftext|>" * 77_000,
    ],
    ids=["letters", "signs", "blanks", "blanks then a word", "end of text"],
)
def test_a_megabyte_of_anything_takes_about_a_second(tokenizer: Tokenizer, text: str) -> None:
    started_at = time.process_time()
    ids = tokenizer.encode(text)
    assert time.process_time() - started_at < SECONDS_PER_MEGABYTE
    assert tokenizer.decode(ids) == text


def test_the_saved_configuration_names_all_three_special_tokens(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert {config[name] for name in ("bos_token", "eos_token", "unk_token")} == {"<|endoftext|>"}


def test_clean_joins_pairs_and_replaces_halves() -> None:
    assert clean("plain, é, 🙂") == "plain, é, 🙂"
    assert clean("\ud83d\ude42") == "🙂"
    assert clean("a\ud83db\ude42\ude42") == "a\ufffdb\ufffd\ufffd"
