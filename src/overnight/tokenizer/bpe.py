"""Byte-level BPE as in GPT-2: a text's UTF-8 bytes, joined pair by pair in the order of the merges.

The list of merges determines the tokenizer. The ids are: 256 bytes, one id per merge, end-of-text
last. Encoding is done by tiktoken, about five times as fast as `tokenizers`, which does the training.

Merges and vocabularies are written in GPT-2's spelling, in which each byte is one visible character.
"""

from __future__ import annotations

import functools
import hashlib
import http.client
import itertools
import json
import re
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
from numpy.typing import NDArray
from tokenizers import Tokenizer as Trainable
from tokenizers import models, pre_tokenizers, trainers

from overnight.files import cache_path, write_atomically
from overnight.terminal import echo
from overnight.tokenizer.tokenizer import END_OF_TEXT, Tokenizer, clean, tokenizer_json

GPT2_FINGERPRINT = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
"""sha256 of GPT-2's vocab.bpe as OpenAI publishes it, and so the fingerprint of GPT-2's merges."""

# GPT-2's pattern for words (encoder.py) with possessive quantifiers: same words, less backtracking.
WORDS = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
BLANKS = re.compile(r"[^\S\x1c-\x1f]*")  # Unicode's White_Space; Python's \s has four more
STRIDE = 100_000

Merge = tuple[str, str]


def byte_characters() -> list[str]:
    """GPT-2's spelling of each byte: the character itself if printable, else the next one from U+0100 on."""
    substitutes = itertools.count(256)
    return [
        chr(byte) if chr(byte).isprintable() and byte != ord(" ") else chr(next(substitutes))
        for byte in range(256)
    ]


def spelled_bytes(tokens: Iterable[str]) -> list[bytes]:
    """The bytes of tokens in GPT-2's spelling; a token in another spelling is encoded as UTF-8."""
    spelling = {character: byte for byte, character in enumerate(byte_characters())}
    return [
        bytes(map(spelling.__getitem__, token)) if spelling.keys() >= {*token} else token.encode()
        for token in tokens
    ]


def vocabulary(merges: Iterable[Merge]) -> dict[str, int]:
    """Every token, in GPT-2's spelling, with its id."""
    tokens = [*sorted(byte_characters()), *(first + second for first, second in merges), END_OF_TEXT]
    return {token: id for id, token in enumerate(tokens)}


def fingerprint(merges: Iterable[Merge]) -> str:
    """sha256 of the merges in the format of vocab.bpe."""
    lines = ["#version: 0.2", *(f"{first} {second}" for first, second in merges), ""]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


class BytePair(Tokenizer):
    """A byte-level BPE with GPT-2's layout of ids. `merges` must satisfy `tiktoken_agrees`."""

    def __init__(self, merges: Sequence[Merge]) -> None:
        self._merges = list(merges)
        self._vocabulary = vocabulary(merges)
        self.fingerprint = fingerprint(merges)
        self.vocab_size = len(self._vocabulary)
        self.end_of_text = self._vocabulary[END_OF_TEXT]
        self.name = "gpt2" if self.fingerprint == GPT2_FINGERPRINT else f"bpe-{self.vocab_size}"
        self._bytes = [*spelled_bytes(list(self._vocabulary)[:-1]), b""]
        self._encoding = tiktoken.Encoding(
            self.name,
            pat_str=WORDS,
            mergeable_ranks={token: id for id, token in enumerate(self._bytes[:-1])},
            special_tokens={END_OF_TEXT: self.end_of_text},
            explicit_n_vocab=self.vocab_size,
        )

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """The ids of each text, computed in the calling thread."""
        return [np.concatenate([self._encode(part) for part in _parts(clean(text))]) for text in texts]

    def _encode(self, text: str) -> NDArray[np.uint32]:
        return self._encoding.encode_to_numpy(text, allowed_special=frozenset(), disallowed_special=())

    def to_json(self) -> dict[str, Any]:
        """The content of tokenizer.json."""
        merges = [f"{first} {second}" for first, second in self._merges]
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        steps = dict.fromkeys(("pre_tokenizer", "post_processor", "decoder"), byte_level)
        model = {"type": "BPE", "vocab": self._vocabulary, "merges": merges}
        return tokenizer_json(self.end_of_text, **steps, model=model)


def _parts(text: str) -> Iterator[str]:
    """The text, cut inside very long runs of blanks where the cut changes no id.

    tiktoken's regular expression engine panics on a million blanks before a word. In GPT-2's pattern the last
    blank of a run belongs to the next word, so a word ends before it in any case.
    """
    start = 0
    for position in range(STRIDE, len(text), STRIDE):
        if position < start:
            continue
        run = next(BLANKS.finditer(text, position))  # at `position`, since the pattern also matches ""
        if len(run[0]) >= 2 and run.end() < len(text):
            yield text[start : run.end() - 1]
            start = run.end() - 1
    yield text[start:]


def train_byte_pair(documents: Iterable[str], vocab_size: int) -> BytePair:
    """Learn `vocab_size` - 257 merges; the same documents give the same merges.

    No token spans two words or a letter and a digit, as in GPT-2. Raises ValueError if the documents have too
    little text.
    """
    trainable = Trainable(models.BPE())
    trainable.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,  # without end-of-text
        initial_alphabet=byte_characters(),
        show_progress=False,
    )
    trainable.train_from_iterator(map(clean, documents), trainer)
    merges = merges_in(json.loads(trainable.to_str())["model"])
    assert tiktoken_agrees(merges), "tiktoken would give other ids than these merges"
    tokenizer = BytePair(merges)
    if tokenizer.vocab_size < vocab_size:
        raise ValueError(
            f"the text is too short for bpe-{vocab_size}, but long enough for {tokenizer.name}; "
            "choose a smaller number, or characters"
        )
    return tokenizer


def read_byte_pair(content: Mapping[str, Any]) -> BytePair | None:
    """The tokenizer of a tokenizer.json, or None unless it is a byte-level BPE with GPT-2's layout."""
    model, words = content["model"], content.get("pre_tokenizer") or {}
    if (
        content.get("normalizer") is not None
        or (words.get("type"), words.get("add_prefix_space"), words.get("use_regex", True))
        != ("ByteLevel", False, True)
        or model.get("type", "BPE") != "BPE"
        or any(model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
    ):
        return None
    added = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    if set(added) != {END_OF_TEXT}:
        return None
    tokenizer = byte_pair(tuple(merges_in(model)))
    return tokenizer if tokenizer and {**model["vocab"], **added} == tokenizer._vocabulary else None


@functools.lru_cache(maxsize=2)  # a preparation asks three times, and GPT-2's merges take 0.3 s
def byte_pair(merges: tuple[Merge, ...]) -> BytePair | None:
    """The tokenizer with these merges; None unless `tiktoken_agrees`."""
    is_gpt2 = fingerprint(merges) == GPT2_FINGERPRINT  # the check of GPT-2's merges takes 0.25 s
    return BytePair(merges) if is_gpt2 or tiktoken_agrees(merges) else None


def merges_in(model: Mapping[str, Any]) -> list[Merge]:
    """The merges of tokenizer.json's `model`, each written as "a b" or ["a", "b"]."""
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges", []))
    return [(first, second) for first, second in pairs]


def tiktoken_agrees(merges: Sequence[Merge]) -> bool:
    """True if tiktoken gives the ids that applying the merges in their order gives.

    A merge joins two given neighbours; tiktoken joins any two that together spell a token. The results agree
    for every text if no token is learned twice or before its parts, and if the text of each token is encoded
    as that token. Merges that were learned from counts satisfy this.
    """
    ids = vocabulary(merges)
    if len(ids) != 257 + len(merges):
        return False
    if any(not max(ids.get(a, id), ids.get(b, id)) < id for id, (a, b) in enumerate(merges, start=256)):
        return False
    model = models.BPE(vocab=ids, merges=list(merges))
    return all(len(model.tokenize(first + second)) == 1 for first, second in merges)


# GPT-2's own tokenizer


# Address and sha256 from tiktoken's source (tiktoken_ext/openai_public.py).
ADDRESS = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"
FILES = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": GPT2_FINGERPRINT,
}
TIMEOUT_SECONDS = 30.0


def load_gpt2() -> BytePair:
    """GPT-2's tokenizer from the cache; the first time, from a download of 1.5 MB.

    Raises ValueError, naming the files and their folder, if they cannot be fetched.
    """
    folder = cache_path("gpt2", "vocab.bpe").parent
    missing = [name for name in FILES if not is_genuine(folder / name)]
    if missing:
        echo(f"fetching GPT-2's vocabulary into {folder}, once")
    try:
        for name in missing:
            write_atomically(folder / name, _download(name))
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(
            f"GPT-2's vocabulary is not on this machine and can't be fetched ({error}): "
            f"put {' and '.join(FILES)} from {ADDRESS} into {folder}, "
            "or name as the tokenizer a folder that holds them, or its tokenizer.json"
        ) from None
    return read_gpt2(folder)


def read_gpt2(folder: Path) -> BytePair:
    """GPT-2's tokenizer from a folder with encoder.json and vocab.bpe; ValueError unless both are OpenAI's.

    The ids follow from vocab.bpe alone; of encoder.json only the hash is checked.
    """
    for name in FILES:
        if not is_genuine(folder / name):
            state = "is damaged or not GPT-2's" if (folder / name).exists() else "is missing"
            raise ValueError(f"{folder / name} {state}; fetch it again from {ADDRESS}/{name}")
    lines = (folder / "vocab.bpe").read_text(encoding="utf-8-sig").splitlines()[1:]  # the first is a version
    tokenizer = byte_pair(tuple((first, second) for first, second in map(str.split, lines)))
    assert tokenizer is not None, "the file's hash is OpenAI's"
    return tokenizer


def is_genuine(path: Path) -> bool:
    """True if the file exists and is OpenAI's, byte for byte."""
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == FILES[path.name]


def _download(name: str) -> bytes:
    with urllib.request.urlopen(f"{ADDRESS}/{name}", timeout=TIMEOUT_SECONDS) as response:
        content: bytes = response.read()
    if hashlib.sha256(content).hexdigest() != FILES[name]:
        raise OSError(f"{ADDRESS}/{name} returned another file")
    return content
