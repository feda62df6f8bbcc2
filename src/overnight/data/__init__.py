"""Shards of tokens, the datasets made of them, and the loader of training batches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Packing = Literal["stream", "documents", "best-fit"]

BENCHMARK_KINDS = (".jsonl", ".txt", ".tokens")
"""Endings of the benchmark files that are searched for in a training text."""


@dataclass(frozen=True, kw_only=True)
class MixtureSource:
    """One text of a mixture. Its share of the rows is its weight by the sum of all weights."""

    path: str
    """A value that `data` allows."""
    weight: float


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The text to train on, and its tokenizer."""

    data: str = "python-docs"
    """A named source, a file or folder of text, or a folder that `overnight prepare` wrote, here or at
    a URL (s3://bucket/folder)."""
    mixture: tuple[MixtureSource, ...] = ()
    """Instead of `data`: several, mixed by weight. [{path = "data/a", weight = 0.7}, ...] in a
    recipe, --mixture data/a=0.7 data/b=0.3 here."""
    cache_bytes: int | None = None
    """Size of the local cache of shards at URLs; the least recently used are deleted. All if left out."""
    tokenizer: str = "gpt2"
    """gpt2, characters, bpe-N (trained on the text, N ids), or a folder or file that holds one."""
    validation_fraction: float | None = None
    """Share of the documents held out, chosen by their hash; `prepare`'s own choice if left out."""
    near_duplicates: Literal["keep", "drop"] = "keep"
    """Documents that differ in a few words (MinHash): keep all, or only the first of each cluster."""
    packing: Packing = "stream"
    """How documents become rows. stream: windows over all of them, concatenated; documents: the same, but
    attention stays within a document; best-fit: whole documents, with as few cut off as possible."""
    shuffle_window: int | None = None
    """Shuffle rows among this number of tokens at a time, not among all. Training may then begin while the
    text is being prepared, once it has twice that number of tokens, and remote shards are fetched on use."""

    def problems(self) -> list[str]:
        """Invalid values, one sentence each; [] if there are none."""
        found = []
        if self.mixture and self.data not in {"", DataConfig.data}:
            found.append(f"give only one of data={self.data} and mixture")
        paths = [source.path for source in self.mixture]
        found += [f"{path} is twice in mixture" for path in sorted({*paths}) if paths.count(path) > 1]
        found += [
            f"the weight {source.weight} of {source.path} must be a finite number above 0"
            for source in self.mixture
            if not 0 < source.weight < math.inf
        ]
        for name in ("cache_bytes", "shuffle_window"):
            if (count := getattr(self, name)) is not None and count < 1:
                found.append(f"{name}={count} must be at least 1, or left out")
        if self.shuffle_window is not None and self.packing == "best-fit":
            found.append("shuffle_window can't be used with packing=best-fit, which shuffles whole documents")
        return found
