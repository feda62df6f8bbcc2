"""What all tokenizers have in common: no text is lost, none becomes special, equal ones are recognised."""

from __future__ import annotations

import codecs
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from overnight.generation.generate import TextWriter
from overnight.tokenizer.bpe import BytePair
from overnight.tokenizer.open_tokenizer import build_tokenizer, load_tokenizer
from overnight.tokenizer.tokenizer import Tokenizer

SPECIAL = ["<|endoftext|>", "<|user|>", "<tool>", "<|assistant|>", "</s>", "[INST]", "<0x00>", "<|im_start|>"]
PIECES = [
    *"\t\n\0\x1c\x85\xa0\u2028\u200b aZéß中🙂7²\ud83d\ude42\udfff\ufffd\uffffĠĊ",
    *("<|endo", "ftext|>", "<|", "|>", "endoftext", "<0x41>", "  ", "\r\n", "e\u0301", "👩‍👩‍👧"),
    *("'s", "'LL", "it's", "!?"),
]
many = pytest.mark.parametrize("count", [500, pytest.param(25_000, marks=pytest.mark.slow)])


def as_utf8(text: str) -> bytes:
    """The text's bytes, computed character by character: the naive twin of `clean`."""
    units = text.encode("utf-16-le", "surrogatepass")
    return units.decode("utf-16-le", "replace").encode()


# Texts to ids and back


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


def check_texts(tokenizer: Tokenizer, count: int) -> None:
    spelled = tokenizer.token_bytes()
    special = {id for id, each in enumerate(spelled) if not each}
    draw = random.Random(0)
    texts = [hostile_text(draw) for _ in range(count)]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert not special.intersection(ids.tolist()), "became special"
        assert tokenizer.decode_bytes(ids.tolist()) == as_utf8(text), "lost"


@many
def test_hostile_text_returns_and_never_becomes_special(tokenizer: Tokenizer, count: int) -> None:
    check_texts(tokenizer, count)
    (ids,) = tokenizer.encode_batch(["it's 中 🙂  <|endoftext|>"])
    assert ids.tolist() == tokenizer.encode("it's 中 🙂  <|endoftext|>")
    assert ids.dtype == np.uint32
    assert ids.flags.writeable


class TrustsText(BytePair):
    """The mistake: special tokens in the text are encoded as such."""

    def _encode(self, text: str) -> NDArray[np.uint32]:
        return self._encoding.encode_to_numpy(text, allowed_special="all")


class DropsHalfPairs(BytePair):
    """The mistake: what is not a character is left out."""

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        return super().encode_batch([text.encode(errors="ignore").decode() for text in texts])


@pytest.mark.parametrize("wrong, match", [(TrustsText, "became special"), (DropsHalfPairs, "lost")])
def test_wrong_tokenizers_are_caught(wrong: type[BytePair], match: str) -> None:
    """The negative controls."""
    check_texts(BytePair([]), 200)
    with pytest.raises(AssertionError, match=match):
        check_texts(wrong([]), 200)


def test_any_ids_decode_to_their_bytes(tokenizer: Tokenizer) -> None:
    spelled = tokenizer.token_bytes()
    assert len(spelled) == tokenizer.vocab_size
    assert {bytes([byte]) for byte in range(256)} <= set(spelled)
    assert tokenizer.decode([tokenizer.end_of_text]) == ""
    ids = np.random.default_rng(0).integers(0, tokenizer.vocab_size, 5000).astype(np.uint16)  # as in shards
    joined = b"".join(spelled[id] for id in ids)
    assert tokenizer.decode_bytes(ids) == tokenizer.decode_bytes(ids.tolist()) == joined  # type: ignore[arg-type]
    assert tokenizer.decode(ids.tolist()) == joined.decode(errors="replace")
    for outside in (-1, 10**6, 2**40):
        with pytest.raises(ValueError, match=f"0 to {tokenizer.vocab_size - 1}, not {outside}"):
            tokenizer.decode([0, outside])


REPEATED = ["a", "^", " ", "\n", "1", "'", "é", "<|endoftext|>", "中", "\u0301", "aA", "\udfff"]


@pytest.mark.parametrize("piece", [*REPEATED, " " * 999_999 + "x"])
def test_megabyte_of_anything_returns(tokenizer: Tokenizer, piece: str) -> None:
    """Takes about a second; quadratic time would exceed the test's time limit."""
    text = piece * (1_000_000 // len(piece))
    assert tokenizer.decode_bytes(tokenizer.encode(text)) == as_utf8(text)


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


def test_equal_trainings_have_equal_fingerprints_and_others_do_not(documents: list[str]) -> None:
    corpora = [documents, [*documents, "ñ" * 10_000]]
    made = [build_tokenizer(name, part) for name in ("characters", "bpe-300", "bpe-301") for part in corpora]
    assert [tokenizer.name for tokenizer in made[::2]] == ["characters", "bpe-300", "bpe-301"]
    assert len({tokenizer.fingerprint for tokenizer in made}) == 6
    for tokenizer in made[::2]:
        again = build_tokenizer(tokenizer.name, iter(reversed(documents)))
        assert again.fingerprint == tokenizer.fingerprint


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
