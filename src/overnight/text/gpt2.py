"""GPT-2's own tokenizer: OpenAI's two files, from a folder, from the cache, or downloaded once."""

from __future__ import annotations

import hashlib
import http.client
import urllib.request
from pathlib import Path

from overnight.cache import cache_folder
from overnight.run_directory import write_atomically
from overnight.terminal import say
from overnight.text.byte_pair import GPT2_FINGERPRINT, BytePair

# Address and sha256 as tiktoken publishes them (tiktoken_ext/openai_public.py).
ADDRESS = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"
FILES = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": GPT2_FINGERPRINT,
}
TIMEOUT_SECONDS = 30.0


def load_gpt2() -> BytePair:
    """GPT-2's tokenizer from the cache, which is filled by one download of 1.5 MB.

    Raises ValueError, naming the files and the folder they belong in, if they can't be fetched.
    """
    folder = cache_folder() / "gpt2"
    missing = [name for name in FILES if not is_genuine(folder / name)]
    if missing:
        say(f"fetching GPT-2's vocabulary into {folder}, once")
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

    The ids follow from vocab.bpe alone. encoder.json repeats them; it is only held against its hash.
    """
    for name in FILES:
        if not is_genuine(folder / name):
            state = "is damaged, or not GPT-2's" if (folder / name).exists() else "is missing"
            raise ValueError(f"{folder / name} {state}; fetch it again from {ADDRESS}/{name}")
    lines = (folder / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]  # the first is a version
    return BytePair([(first, second) for first, second in map(str.split, lines)])


def is_genuine(path: Path) -> bool:
    """True if the file is there and is OpenAI's, byte for byte."""
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == FILES[path.name]


def _download(name: str) -> bytes:
    with urllib.request.urlopen(f"{ADDRESS}/{name}", timeout=TIMEOUT_SECONDS) as response:
        content: bytes = response.read()
    if hashlib.sha256(content).hexdigest() != FILES[name]:
        raise OSError(f"{ADDRESS}/{name} answered with something else")
    return content
