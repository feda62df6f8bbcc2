"""The text that is measured with: what a user names, or the documentation that comes with Python."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from overnight.tokenizer.tokenizer import Tokenizer


def read_ids(text: Path | None, data: Path | None, bpe: Path | None) -> NDArray[Any]:
    """One row of ids: a prepared folder's training split, else GPT-2's of a file or Python's documentation.

    Raises ValueError for a file or folder that is not there.
    """
    if data is not None:
        from overnight.data.shards import open_tokens, read_manifest

        shards = read_manifest(data).shards("train")
        return np.concatenate([open_tokens(data / shard.name) for shard in shards])
    if text is not None and not text.is_file():
        raise ValueError(f"there is no file {text}")
    tokenizer = load_bpe(bpe)
    texts = python_texts() if text is None else [text.read_text(encoding="utf-8", errors="replace")]
    return np.concatenate(tokenizer.encode_batch(texts))


def python_texts() -> list[str]:
    """Every document of the source python-docs."""
    from overnight.preparation.sources import python_texts

    return list(python_texts())


def load_bpe(folder: Path | None) -> Tokenizer:
    """GPT-2's tokenizer from a folder, or from the cache; nothing is downloaded here.

    Raises ValueError, with the remedy, if its files are not there.
    """
    from overnight.files import cache_path
    from overnight.tokenizer.bpe import FILES, is_genuine, read_gpt2

    cached = cache_path() / "gpt2"
    if folder is None and not all(is_genuine(cached / name) for name in FILES):
        raise ValueError(
            f"GPT-2's vocabulary is not in {cached}: name with --bpe a folder that holds "
            f"{' and '.join(FILES)}, or with --data a folder that overnight prepare wrote"
        )
    return read_gpt2(folder or cached)
