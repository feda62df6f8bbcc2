"""The targets of fuzz.py that are about texts and ids: tokenizers of each kind, and what they promise."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mutants import original, replace

SPECIAL = ("<|endoftext|>", "<|user|>", "<tool>", "<|assistant|>", "</s>", "[INST]", "<0x00>", "<|im_start|>")
DOCUMENTS = ["the quick brown fox jumps over the lazy dog, naïve façade, 中文, 🙂 1,024 " * 4]
Check = Callable[[bytes], None]


def any_text(data: bytes) -> str:
    """Bytes as a text: UTF-8 or UTF-16, in which whatever is wrong becomes half of a surrogate pair."""
    if data[:1] >= b"\x80":
        return data[1 : 1 + (len(data) - 1) // 2 * 2].decode("utf-16-le", "surrogatepass")
    return data[1:].decode("utf-8", "surrogateescape")


@functools.cache
def make_tokenizers() -> list[Any]:
    """Of each kind one; GPT-2's own if the cache holds it."""
    from overnight.files import cache_path
    from overnight.tokenizer.bpe import FILES, is_genuine, read_gpt2
    from overnight.tokenizer.characters import Characters
    from overnight.tokenizer.open_tokenizer import build_tokenizer

    made = [Characters([]), *(build_tokenizer(name, DOCUMENTS) for name in ("characters", "bpe-300"))]
    made.append(make_foreign(made[-1]))
    folder = cache_path() / "gpt2"
    return [*made, read_gpt2(folder)] if all(is_genuine(folder / name) for name in FILES) else made


def make_foreign(bpe: Any) -> Any:
    """A tokenizer.json as others write it: with special tokens of its own, run by `tokenizers`."""
    from overnight.tokenizer.open_tokenizer import load_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        bpe.save(Path(folder))
        path = Path(folder, "tokenizer.json")
        content = json.loads(path.read_text(encoding="utf-8"))
        one = content["added_tokens"][0]
        content["added_tokens"] += [
            {**one, "content": name, "id": one["id"] + number} for number, name in enumerate(SPECIAL[1:], 1)
        ]
        path.write_text(json.dumps(content), encoding="utf-8")
        return load_tokenizer(path)


def check_encoding() -> Check:
    """P1: any text becomes ids that spell it; a lone surrogate, which is no character, U+FFFD."""
    tokenizers = make_tokenizers()

    def check(data: bytes) -> None:
        text = any_text(data)
        expected = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        for tokenizer in tokenizers:
            spelled = tokenizer.token_bytes()
            ids = tokenizer.encode(text)
            assert b"".join(spelled[id] for id in ids) == expected.encode(), (tokenizer.name, text)
            assert tokenizer.decode(ids) == expected, (tokenizer.name, text)

    return check


def drop_half_pairs() -> None:
    """A mutant of `encoding`: what is no character is left out."""
    replace("overnight.tokenizer.bpe:clean", lambda text: text.encode(errors="ignore").decode())


def check_special() -> Check:
    """P2: no text becomes a special token, whole or put together of pieces."""
    tokenizers = make_tokenizers()
    special = [{id for id, each in enumerate(one.token_bytes()) if not each} for one in tokenizers]

    def check(data: bytes) -> None:
        text = spell_special(data)
        for tokenizer, ids in zip(tokenizers, special, strict=True):
            assert not ids.intersection(tokenizer.encode(text)), (tokenizer.name, text)

    return check


def spell_special(data: bytes) -> str:
    """Three bytes at a time: a piece of a special token, from here to there; else the bytes as they are."""
    parts = []
    for place in range(0, len(data) - 2, 3):
        which, begin, end = data[place : place + 3]
        name = SPECIAL[which % len(SPECIAL)]
        parts.append(
            name[begin % len(name) :][: 1 + end % len(name)] if which < 192 else chr(begin << 8 | end)
        )
    return "".join(parts)


def trust_text() -> None:
    """A mutant of `special`: special tokens are read from the text."""
    target = "overnight.tokenizer.bpe:BytePair._encode"
    encode = original(target)

    def trusting(self: Any, text: str) -> Any:
        import numpy as np

        ids = self._encoding.encode(text, allowed_special="all") if "<|" in text else encode(self, text)
        return np.asarray(ids, dtype=np.uint32)

    replace(target, trusting)


def check_stream() -> Check:
    """P4: any ids, decoded one by one, are UTF-8 at each step and in the end the text of the whole."""
    from overnight.generation.generate import TextWriter

    tokenizers = make_tokenizers()

    def check(data: bytes) -> None:
        if len(data) < 2:
            return
        tokenizer = tokenizers[data[0] % len(tokenizers)]
        length = data[1] % 4  # of a text that ends it
        stop = [any_text(data[1 : 2 + length])] if length else []
        numbers = zip(data[2 + length :: 2], data[3 + length :: 2], strict=False)
        ids = [(high << 8 | low) % tokenizer.vocab_size for high, low in numbers]
        stop = [each for each in stop if each]
        whole = tokenizer.decode(ids)
        expected = whole.partition(stop[0])[0] if stop else whole
        writer = TextWriter(tokenizer, stop)
        pieces = [*map(writer.write, ids), writer.finish()]
        for piece in pieces:
            piece.encode()
        assert "".join(pieces) == expected, (tokenizer.name, ids, stop)

    return check


def token_by_token() -> None:
    """A mutant of `stream`: each token is decoded by itself, though characters may lie across two."""

    def write(self: Any, token: int) -> str:
        return self._bytes[token].decode(errors="replace")

    replace("overnight.generation.generate:TextWriter.write", write)
