"""Byte-level BPE by fastokens. tiktoken is the reference, and encodes where fastokens cannot.

fastokens is optional. It is used for `BytePair` alone, whose words are cut by GPT-2's pattern; a
tokenizer.json with another pattern is left to `tokenizers`. One object serves all threads: it releases the
GIL, and its cache is common to them and bounded (0.3 GB).
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from overnight.tokenizer.bpe import BytePair
from overnight.tokenizer.tokenizer import END_OF_TEXT, Tokenizer, clean

PACKAGE = "fastokens"
START_SECONDS = 60.0
LAST_POINT, POINTS_APART = 0x32400, 7  # no letter is assigned above; a script takes at least 16 points
# Reads a tokenizer and encodes a line with each, in a process of its own, since a processor that lacks an
# instruction kills the process.
ATTEMPT = """
import sys
from fastokens._native import Tokenizer
tokenizer, text = sys.stdin.buffer.read().decode().split("\\n", 1)
Tokenizer.from_json_str(tokenizer).encode_batch_flat([text])
"""


class FastBytePair(BytePair):
    """The same tokenizer as `reference`, with ids from fastokens. Raises ValueError if that can't load it."""

    def __init__(self, reference: BytePair) -> None:
        from fastokens._native import Tokenizer as Encoder

        vars(self).update(vars(reference))
        self.reference = reference
        self._encoder = Encoder.from_json_str(without_special_tokens(reference))

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """The ids of each text, computed in the calling thread; by the reference if fastokens fails on it."""
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> NDArray[np.uint32]:
        try:
            ids, _ = self._encoder.encode_batch_flat([text])
        except UnicodeEncodeError:  # a lone surrogate
            return self._encode(clean(text))
        except BaseException as error:  # a panic of Rust is no Exception
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            return self.reference.encode_batch([text])[0]
        return np.frombuffer(ids, dtype=np.uint32)

    def difference(self, texts: Sequence[str]) -> str | None:
        """A sentence if the reference gives other ids for one of the texts; None if it gives the same."""
        pairs = zip(texts, self.encode_batch(texts), self.reference.encode_batch(texts), strict=True)
        for text, ids, expected in pairs:
            if not np.array_equal(ids, expected):
                return (
                    f"{PACKAGE} and tiktoken disagree on the text {text[:40]!r}...: tiktoken encodes instead"
                )
        return None


def accelerate(tokenizer: Tokenizer) -> tuple[Tokenizer, str | None]:
    """(the tokenizer encoding by fastokens, None), or (the tokenizer as it is, a sentence that says why).

    No sentence, and no change, for a tokenizer that is not a `BytePair`.
    """
    if type(tokenizer) is not BytePair:
        return tokenizer, None
    if problem := missing_backend():
        return tokenizer, problem
    try:
        fast = FastBytePair(tokenizer)
    except BaseException as error:  # as above
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        return (
            tokenizer,
            f"{PACKAGE} can't load the tokenizer ({type(error).__name__}): tiktoken encodes instead",
        )
    problem = fast.difference(hostile_texts())
    return (tokenizer, problem) if problem else (fast, None)


def missing_backend() -> str | None:
    """A sentence if fastokens is not installed or does not run on this machine; takes 0.1 s."""
    if importlib.util.find_spec(PACKAGE) is None:
        return (
            f"{PACKAGE} is not installed, so tiktoken encodes, at a tenth of the speed: "
            "pip install 'overnight[fast]'"
        )
    smallest = without_special_tokens(BytePair([("t", "h"), ("th", "e")]))
    request = "\n".join([smallest, *hostile_texts()]).encode()
    command = [sys.executable, "-P", "-c", ATTEMPT]
    try:
        subprocess.run(command, input=request, capture_output=True, timeout=START_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        status = getattr(error, "returncode", "none")
        return f"{PACKAGE} does not run on this machine (exit status {status}): tiktoken encodes instead"
    return None


def without_special_tokens(tokenizer: BytePair) -> str:
    """The tokenizer.json in which a text that spells "<|endoftext|>" is text."""
    content: dict[str, Any] = {**tokenizer.to_json(), "added_tokens": [], "post_processor": None}
    words = dict(content["model"]["vocab"])
    del words[END_OF_TEXT]
    return json.dumps({**content, "model": {**content["model"], "vocab": words}})


def hostile_texts() -> list[str]:
    """Texts that have broken tokenizers, and characters of every script, next to letters and to blanks.

    Two encoders that know different versions of Unicode disagree on the characters of a new script.
    """
    points = (point for point in range(1, LAST_POINT, POINTS_APART) if not 0xD800 <= point < 0xE000)
    every_script = "".join(f"a{chr(point)} {chr(point)}1" for point in points)
    runs = [character * 3000 for character in ("a", " ", "\n", "!", "1", "好", "e\u0301", "\0")]
    spaced = [f"x{blank * 9}y{blank}  z \n {blank}" for blank in " \t\n\r\v\f\x1c\x85\xa0\u2028\u3000\u200b"]
    plain = (
        f"They'll say it's {END_OF_TEXT} he'D'LL '''s 12,345.67 Grüße, naïve ﬁ ² 🙂👩‍👩‍👧 你好\r\n\t\tend  "
    )
    return [every_script, plain, "", *runs, *spaced]
