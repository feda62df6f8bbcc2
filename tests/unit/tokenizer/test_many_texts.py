"""Many thousand hostile texts and streams: nothing is lost, nothing becomes special, all is UTF-8."""

from __future__ import annotations

import codecs
import random
import time
from collections.abc import Callable

import pytest

from overnight.generation.generate import TextWriter
from overnight.tokenizer.tokenizer import Tokenizer

SPECIAL = ("<|endoftext|>", "<|user|>", "<tool>", "<|assistant|>", "</s>", "[INST]", "<0x00>", "<|im_start|>")
PIECES = (
    *("<|endo", "ftext|>", "<|", "|>", "endoftext", "\u200b", "\0", "\x1c", "\x85", "\u2028", "\r\n", "  "),
    *(
        "'s",
        "'LL",
        "é",
        "e\u0301",
        "ß",
        "中",
        "🙂",
        "👩‍👩‍👧",
        "\ud83d",
        "\ude42",
        "\udfff",
        "\ufffd",
        "\uffff",
        "²",
        "Ġ",
    ),
)
many = pytest.mark.parametrize("count", [500, pytest.param(25_000, marks=pytest.mark.slow)])


def hostile_text(draw: random.Random) -> str:
    """Special tokens, whole, torn apart, doubled and in each other; anything else between them."""
    parts = []
    for _ in range(draw.randrange(12)):
        kind = draw.randrange(5)
        special = draw.choice(SPECIAL)
        cut = draw.randrange(len(special) + 1)
        parts += (
            [special],
            [special[:cut], draw.choice(("", special, "\u200b", " ")), special[cut:]],
            [draw.choice(PIECES) * draw.choice((1, 2, 30))],
            [chr(draw.randrange(0x110000)) for _ in range(5)],
            [special.swapcase(), special[::-1]],
        )[kind]
    return "".join(parts)


@many
def test_no_text_is_lost_or_special(tokenizer: Tokenizer, count: int) -> None:
    spelled = tokenizer.token_bytes()
    special = {id for id, each in enumerate(spelled) if not each}
    draw = random.Random(0)
    for _ in range(count):
        text = hostile_text(draw)
        ids = tokenizer.encode(text)
        units = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        assert b"".join(spelled[id] for id in ids) == units.encode()
        assert not special.intersection(ids), text


@pytest.mark.parametrize(
    "piece", ["a", "^", " ", "\n", "1", "'", "é", "<|endoftext|>", "中", "\u0301", "aA", "\udfff"]
)
def test_time_grows_as_the_text_does(tokenizer: Tokenizer, piece: str) -> None:
    """Four times the text takes at most eight times the time; what is quadratic would take sixteen times."""

    def seconds(length: int) -> float:
        text = piece * (length // len(piece))
        taken = []
        for _ in range(3):
            started_at = time.process_time()
            tokenizer.encode(text)
            taken.append(time.process_time() - started_at)
        return min(taken)

    assert seconds(200_000) < 8 * max(seconds(50_000), 0.005)


def streamed(writer: TextWriter, ids: list[int]) -> str:
    pieces = [*map(writer.write, ids), writer.finish()]
    for piece in pieces:
        piece.encode()  # each by itself can be sent
    return "".join(pieces)


def check_streams(tokenizer: Tokenizer, count: int, build: Callable[..., TextWriter] = TextWriter) -> None:
    draw = random.Random(0)
    cut = [id for id, each in enumerate(tokenizer.token_bytes()) if not _is_text(each)]
    for _ in range(count):
        ids = [
            draw.choice(cut) if draw.random() < 0.5 else draw.randrange(tokenizer.vocab_size)
            for _ in range(draw.randrange(30))
        ]
        assert streamed(build(tokenizer, []), ids) == tokenizer.decode(ids)


def _is_text(spelled: bytes) -> bool:
    try:
        spelled.decode()
    except UnicodeDecodeError:
        return False
    return True


@many
def test_a_stream_is_the_decoded_text(tokenizer: Tokenizer, count: int) -> None:
    check_streams(tokenizer, count)


class TokenByToken(TextWriter):
    """The mistake: each token is decoded by itself, though characters may lie across two."""

    def write(self, token: int) -> str:
        return self._bytes[token].decode(errors="replace")


def test_a_writer_that_decodes_token_by_token_is_caught(tokenizer: Tokenizer) -> None:
    with pytest.raises(AssertionError):
        check_streams(tokenizer, 200, TokenByToken)


def test_a_writer_that_lets_half_characters_out_is_caught(tokenizer: Tokenizer) -> None:
    def build(tokenizer: Tokenizer, stop: list[str]) -> TextWriter:
        writer = TextWriter(tokenizer, stop)
        writer._decoder = codecs.getincrementaldecoder("utf-8")(errors="surrogateescape")
        return writer

    with pytest.raises(UnicodeEncodeError):
        check_streams(tokenizer, 200, build)
