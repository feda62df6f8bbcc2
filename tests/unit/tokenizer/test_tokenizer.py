"""What all tokenizers have in common: no text is lost, none becomes special, equal ones are recognised."""

from __future__ import annotations

import codecs
import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from overnight.generation.generate import TextWriter
from overnight.tokenizer.bpe import BytePair
from overnight.tokenizer.open_tokenizer import build_tokenizer, load_tokenizer
from overnight.tokenizer.tokenizer import Tokenizer, clean

SPECIAL = ["<|endoftext|>", "<|user|>", "<tool>", "<|assistant|>", "</s>", "[INST]", "<0x00>", "<|im_start|>"]
PIECES = [
    *[
        "<|endo",
        "ftext|>",
        "<|",
        "|>",
        "endoftext",
        "<0x41>",
        "Ġ",
        "Ċ",
        " ",
        "  ",
        "\t",
        "\n",
        "\r\n",
        "\xa0",
    ],
    *[
        "\0",
        "\x1c",
        "\x85",
        "\u2028",
        "\u200b",
        "'s",
        "'LL",
        "it's",
        "a",
        "Z",
        "é",
        "e\u0301",
        "ß",
        "中",
        "🙂",
    ],
    *["👩‍👩‍👧", "\ud83d", "\ude42", "\udfff", "\ufffd", "\uffff", "7", "²", "!?"],
]
ANY_TEXT = st.one_of(
    st.text(st.characters(exclude_categories=()), max_size=60),  # lone surrogates, too
    st.lists(st.sampled_from(SPECIAL + PIECES), max_size=30).map("".join),
)
many = pytest.mark.parametrize("count", [500, pytest.param(25_000, marks=pytest.mark.slow)])


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


# Texts to ids and back


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_text_returns_and_never_becomes_special(data: st.DataObject, tokenizer: Tokenizer) -> None:
    text = data.draw(ANY_TEXT)
    check_nothing_is_lost(tokenizer, text)
    check_text_stays_text(tokenizer, text)


def hostile_text(draw: random.Random) -> str:
    """Special tokens, whole, torn apart, doubled and in each other; anything else between them."""
    parts = []
    for _ in range(draw.randrange(12)):
        special = draw.choice(SPECIAL)
        cut = draw.randrange(len(special) + 1)
        parts += draw.choice(
            (
                [special],
                [special[:cut], draw.choice(("", special, "\u200b", " ")), special[cut:]],
                [draw.choice(PIECES) * draw.choice((1, 2, 30))],
                [chr(draw.randrange(0x110000)) for _ in range(5)],
                [special.swapcase(), special[::-1]],
            )
        )
    return "".join(parts)


@many
def test_hostile_text_returns_and_never_becomes_special(tokenizer: Tokenizer, count: int) -> None:
    spelled = tokenizer.token_bytes()
    special = {id for id, each in enumerate(spelled) if not each}
    draw = random.Random(0)
    for _ in range(count):
        text = hostile_text(draw)
        ids = tokenizer.encode(text)
        assert b"".join(spelled[id] for id in ids) == as_utf8(text)
        assert not special.intersection(ids), text


class TrustsText(BytePair):
    """The mistake: special tokens in the text are encoded as such."""

    def _encode(self, text: str) -> NDArray[np.uint32]:
        return self._encoding.encode_to_numpy(text, allowed_special="all")


class DropsHalfPairs(BytePair):
    """The mistake: what is not a character is left out."""

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        return super().encode_batch([text.encode(errors="ignore").decode() for text in texts])


@pytest.mark.parametrize(
    "check, wrong, text",
    [
        (check_text_stays_text, TrustsText, "a<|endoftext|>b"),
        (check_nothing_is_lost, DropsHalfPairs, "a\ud800b"),
    ],
)
def test_wrong_tokenizers_are_caught(
    check: Callable[[Tokenizer, str], None], wrong: type[BytePair], text: str
) -> None:
    """The negative controls."""
    check(BytePair([]), text)
    with pytest.raises(AssertionError):
        check(wrong([]), text)


@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_batch_equals_its_texts_one_by_one(data: st.DataObject, tokenizer: Tokenizer) -> None:
    texts = data.draw(st.lists(ANY_TEXT, max_size=4))
    batch = tokenizer.encode_batch(texts)
    assert [ids.tolist() for ids in batch] == [tokenizer.encode(text) for text in texts]
    assert all(ids.dtype == np.uint32 and ids.flags.writeable for ids in batch)


@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_any_ids_decode_to_their_bytes(data: st.DataObject, tokenizer: Tokenizer) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    spelled = b"".join(tokenizer.token_bytes()[id] for id in ids)
    assert tokenizer.decode_bytes(ids) == spelled
    as_in_shards = np.array(ids, dtype=np.uint16)
    assert tokenizer.decode_bytes(as_in_shards) == spelled  # type: ignore[arg-type]
    assert tokenizer.decode(ids) == spelled.decode(errors="replace")


def test_vocabulary_has_every_byte_and_one_end_of_text(tokenizer: Tokenizer) -> None:
    spelled = tokenizer.token_bytes()
    assert len(spelled) == tokenizer.vocab_size
    assert {bytes([byte]) for byte in range(256)} <= set(spelled)
    assert spelled[tokenizer.end_of_text] == b""
    assert tokenizer.decode([tokenizer.end_of_text]) == ""
    by_byte = [spelled.index(bytes([byte])) for byte in "🙂".encode()]
    assert tokenizer.decode(by_byte) == "🙂"
    assert tokenizer.decode(by_byte[:2]) == "\ufffd"


@pytest.mark.parametrize("id", [-1, 10**6, 2**40])
def test_id_outside_the_vocabulary_is_refused(tokenizer: Tokenizer, id: int) -> None:
    with pytest.raises(ValueError, match=f"0 to {tokenizer.vocab_size - 1}, not {id}"):
        tokenizer.decode([0, id])


REPEATED = ["a", "^", " ", "\n", "1", "'", "é", "<|endoftext|>", "中", "\u0301", "aA", "\udfff"]


@pytest.mark.parametrize("piece", [*REPEATED, " " * 999_999 + "x"])
def test_megabyte_of_anything_returns(tokenizer: Tokenizer, piece: str) -> None:
    """Takes about a second; quadratic time would exceed the test's time limit."""
    text = piece * (1_000_000 // len(piece))
    assert tokenizer.decode(tokenizer.encode(text)) == clean(text)


@pytest.mark.slow
@pytest.mark.parametrize("piece", REPEATED)
def test_encoding_time_is_linear(tokenizer: Tokenizer, piece: str) -> None:
    """Four times the text takes at most eight times the time; quadratic time would be sixteen times."""

    def seconds(length: int) -> float:
        started_at = time.process_time()
        tokenizer.encode(piece * (length // len(piece)))
        return time.process_time() - started_at

    short, long = (min(seconds(length) for _ in range(3)) for length in (50_000, 200_000))
    assert long < 8 * max(short, 0.005)


def test_clean_joins_pairs_and_replaces_lone_surrogates() -> None:
    assert clean("plain, é, 🙂") == "plain, é, 🙂"
    assert clean("\ud83d\ude42") == "🙂"
    assert clean("a\ud83db\ude42\ude42") == "a\ufffdb\ufffd\ufffd"


# Fingerprints and files


def test_saved_and_loaded_tokenizer_is_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "a")
    again = load_tokenizer(tmp_path / "a")
    again.save(tmp_path / "b")
    for other in (again, load_tokenizer(tmp_path / "b/tokenizer.json")):
        assert type(other) is type(tokenizer)
        for name in ("name", "fingerprint", "vocab_size", "end_of_text"):
            assert getattr(other, name) == getattr(tokenizer, name)
        assert other.token_bytes() == tokenizer.token_bytes()
        assert other.encode("it's 中 🙂  <|endoftext|>") == tokenizer.encode("it's 中 🙂  <|endoftext|>")
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    config = json.loads((tmp_path / "a" / "tokenizer_config.json").read_text())
    assert {config[name] for name in ("bos_token", "eos_token", "unk_token")} == {"<|endoftext|>"}


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


# Streams of ids to text


def check_streams(tokenizer: Tokenizer, count: int, build: Callable[..., TextWriter] = TextWriter) -> None:
    """Random ids, many of them parts of characters, give the decoded text; each piece is valid UTF-8."""
    draw = random.Random(0)
    spelled = tokenizer.token_bytes()
    partial = [id for id, each in enumerate(spelled) if "\ufffd" in each.decode(errors="replace")]
    for _ in range(count):
        ids = [
            draw.choice(partial) if draw.random() < 0.5 else draw.randrange(tokenizer.vocab_size)
            for _ in range(draw.randrange(30))
        ]
        writer = build(tokenizer, [])
        pieces = [*map(writer.write, ids), writer.finish()]
        for piece in pieces:
            piece.encode()
        assert "".join(pieces) == tokenizer.decode(ids)


@many
def test_stream_equals_decoded_text(tokenizer: Tokenizer, count: int) -> None:
    check_streams(tokenizer, count)


class TokenByToken(TextWriter):
    """The mistake: each token is decoded by itself, though characters may span two."""

    def write(self, token: int) -> str:
        return self._bytes[token].decode(errors="replace")


def half_characters(tokenizer: Tokenizer, stop: list[str]) -> TextWriter:
    """The mistake: incomplete characters are passed on."""
    writer = TextWriter(tokenizer, stop)
    writer._decoder = codecs.getincrementaldecoder("utf-8")(errors="surrogateescape")
    return writer


@pytest.mark.parametrize(
    "build, error", [(TokenByToken, AssertionError), (half_characters, UnicodeEncodeError)]
)
def test_wrong_stream_writers_are_caught(
    tokenizer: Tokenizer, build: Callable[..., TextWriter], error: type[Exception]
) -> None:
    """The negative controls."""
    with pytest.raises(error):
        check_streams(tokenizer, 200, build)
