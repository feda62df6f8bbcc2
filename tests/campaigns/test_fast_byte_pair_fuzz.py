"""A million hostile strings have the same ids by fastokens and tiktoken: GPT-2's BPE, a trained BPE."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from overnight.tokenizer.bpe import BytePair
from overnight.tokenizer.fast_byte_pair import FastBytePair
from overnight.tokenizer.open_tokenizer import build_tokenizer, load_tokenizer

STRINGS, AT_ONCE = 1_000_000, 1000
pytest.importorskip("fastokens")
WORDS = (
    "'s 'll 'LL 're n't '' <|endoftext|> <|endof the 1,024.50 é 🙂 👩‍👩‍👧 🇩🇪 ﬁ ß İ ² ½ Ⅷ 中文 กำ हिन्दी عربي"
)
BLANKS = "\r\n|\n\n\t|   |\xa0\xa0|\u3000|\x1c|\x85|\u2028|\u200b|\u200d|\0|\ufeff|\x7f| the| of"
PIECES = [*WORDS.split(), *BLANKS.split("|"), "\ud83d", "\udc00", "\U0010ffff"]


def hostile_strings(draw: random.Random) -> Iterator[str]:
    """Strings of up to 12 pieces: the ones above, runs of one character, and characters of all of Unicode."""

    def any_character() -> str:
        return chr(draw.randrange(draw.choice((0x250, 0x32400, sys.maxunicode))))

    def draw_piece(kind: str) -> str:
        if kind == "p":
            return draw.choice(PIECES)
        if kind == "a":
            return chr(draw.randrange(32, 127))
        return any_character() * (draw.randint(2, 40) if kind == "r" else 1)

    while True:
        kinds = draw.choices("pcra", k=draw.randint(1, 12))
        yield "".join(map(draw_piece, kinds))


@pytest.mark.campaign
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["gpt2", "bpe-4096"])
def test_hostile_strings_have_tiktokens_ids(name: str, shared_data: Path) -> None:
    lines = (shared_data / "shakespeare/input.txt").read_text(encoding="utf-8").split("\n\n")
    reference = load_tokenizer(shared_data / "gpt2-bpe") if name == "gpt2" else build_tokenizer(name, lines)
    assert isinstance(reference, BytePair)
    fast, strings = FastBytePair(reference), hostile_strings(random.Random(name))
    for _ in range(STRINGS // AT_ONCE):
        texts = [next(strings) for _ in range(AT_ONCE)]
        assert fast.difference(texts) is None


def test_the_strings_find_an_encoder_that_reads_end_of_text(shared_data: Path) -> None:
    """Negative control: with end-of-text among its added tokens, fastokens gives other ids."""
    from fastokens._native import Tokenizer

    reference = load_tokenizer(shared_data / "gpt2-bpe")
    strings, wrong = (
        hostile_strings(random.Random(0)),
        Tokenizer.from_json_str(json.dumps(reference.to_json())),
    )
    texts = [next(strings).encode(errors="replace").decode() for _ in range(AT_ONCE)]
    found = [np.frombuffer(wrong.encode_batch_flat([text])[0], np.uint32) for text in texts]
    assert not all(map(np.array_equal, found, reference.encode_batch(texts)))
