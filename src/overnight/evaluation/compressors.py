"""Bits per byte of a run's held-out text with general compressors, for comparison with the model.

A compressor is a language model that has seen only the text itself. xz that first compresses the training
text has seen what the model has seen: it is the fair comparison. Imports no torch, as the report must not.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from overnight.data.shards import (
    SPLITS,
    chunks,
    load_prepared_tokenizer,
    open_tokens,
    read_manifest,
    verify_shard,
)
from overnight.recipe import read_recipe_of
from overnight.run_directory import RunDirectory
from overnight.terminal import progress, short

TEXT_BYTES, TRAINING_BYTES = 250_000, 1_200_000  # xz needs about a second for a megabyte
DECODED_TOKENS = 1 << 16  # at a time
XZ_WINDOW_BYTES = 1 << 30  # the whole training text stays in the window


def measure_compression(directory: RunDirectory, *, whole: bool = False) -> dict[str, Any]:
    """The content of the run's compression.json, measured if there is none.

    Keys: `bytes` of validation text, `training_bytes` of training text that xz was given, and
    `bits_per_byte` of each compressor. Measured on the beginning of both splits, or with `whole` on all of
    them. Empty if the shards that the run was trained on are not on this machine. A finished run keeps the
    result.
    """
    with suppress(OSError, ValueError, RecursionError):
        found = json.loads(directory.compression.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    try:
        text, training_text, is_cut = _texts_of(directory, whole)
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        RecursionError,
    ):  # not here, or damaged, or other shards
        return {}
    if not text:
        return {}
    with progress("compress", 1, "validation split") as advance:
        measured = {
            "bytes": len(text),
            "training_bytes": len(training_text),
            "bits_per_byte": compressed_bits_per_byte(text, training_text, is_cut=is_cut),
        }
        advance()
    _keep(directory, measured)
    return measured


def compressed_bits_per_byte(text: bytes, training_text: bytes, *, is_cut: bool = False) -> dict[str, float]:
    """Bits per byte of `text` with gzip, bz2 and xz at their best, and with xz after `training_text`.

    `is_cut`: `training_text` is a part of the training text, and the name says so.
    """
    if not text:
        raise ValueError("the validation split is empty: it has nothing to compress")
    seen = f"{short(len(training_text))} bytes of" if is_cut else "the"
    sizes = {
        "gzip": len(gzip.compress(text, 9, mtime=0)),
        "bz2": len(bz2.compress(text, 9)),
        "xz": _xz_bytes(text),
        f"xz given {seen} training text": _xz_bytes(training_text + text) - _xz_bytes(training_text),
    }
    return {name: 8 * size / len(text) for name, size in sizes.items()}


def _xz_bytes(text: bytes) -> int:
    window = min(XZ_WINDOW_BYTES, max(1 << 20, 1 << len(text).bit_length()))
    filters: list[dict[str, Any]] = [
        {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": window}
    ]
    return len(lzma.compress(text, lzma.FORMAT_XZ, filters=filters))


def _texts_of(directory: RunDirectory, whole: bool) -> tuple[bytes, bytes, bool]:
    """(validation text, training text, whether that is only its beginning), of a mixture part after part.

    Raises ValueError if a folder does not hold the shards that the run recorded.
    """
    data = read_recipe_of(directory.path).data
    folders = [Path(source.path) for source in data.mixture] or [Path(data.data)]
    recorded = json.loads(directory.data.read_text(encoding="utf-8"))
    hashes = {shard["sha256"] for split in SPLITS for shard in recorded[split]}
    texts = {
        split: [
            _decoded(folder, split, hashes, None if whole else most // len(folders)) for folder in folders
        ]
        for split, most in (("train", TRAINING_BYTES), ("validation", TEXT_BYTES))
    }
    is_cut = not whole and any(len(text) >= TRAINING_BYTES // len(folders) for text in texts["train"])
    return b"".join(texts["validation"]), b"".join(texts["train"]), is_cut


def _decoded(folder: Path, split: str, hashes: Collection[str], limit: int | None) -> bytes:
    """The text of a split, at most its first `limit` bytes; the shards that are read are verified."""
    manifest = read_manifest(folder)
    tokenizer = load_prepared_tokenizer(folder, manifest)
    text = bytearray()
    for shard in manifest.shards(split):
        if shard.sha256 not in hashes:
            raise ValueError(f"the run was not trained on {folder / shard.name}")
        verify_shard(folder, shard, manifest.vocab_size)
        for ids in chunks(open_tokens(folder / shard.name), DECODED_TOKENS):
            text += tokenizer.decode_bytes(ids.tolist())
            if limit is not None and len(text) >= limit:
                return bytes(text[:limit])
    return bytes(text)


def _keep(directory: RunDirectory, measured: dict[str, Any]) -> None:
    """Write compression.json if the run is finished and intact, so that nothing else is writing there."""
    with suppress(OSError, ValueError):  # a folder that can't be written to, or a run that is under way
        steps = read_recipe_of(directory.path).schedule.total_steps
        if steps is not None and directory.is_finished(steps) and not directory.problems():
            with directory.locked():
                directory.write(directory.compression, measured)
