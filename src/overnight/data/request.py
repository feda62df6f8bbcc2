"""What can be asked of `prepare`. Light to import, so that `overnight prepare --help` is instant."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from overnight.data.sources import source_name

MOST_TOKENS = 2**31 - 1  # a shard's header counts in an int32


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Which text becomes shards, and how.

    A document is a line of .jsonl, a row of .parquet, or a text file; a text file of more than 20,000
    bytes is cut at blank lines into documents of about 10,000.
    """

    source: Positional[str]
    """python-docs, shakespeare, or a file or folder of .txt, .md, .jsonl or .parquet."""
    out: str | None = None
    """Where the shards go; data/<source> if left out, or data/<source>-<tokenizer> if that is not gpt2."""
    tokenizer: str = "gpt2"
    """gpt2, characters, bpe-N (trained on the training documents: N ids), or the path of one."""
    validation_fraction: float | None = None
    """Share of the documents held out, chosen by their hash; 0.1 for the named sources and 0.01 for your own
    files if left out."""
    text_column: str = "text"
    """The column of JSON lines and Parquet files that holds the text."""
    on_bad_text: Literal["fail", "replace", "skip"] = "fail"
    """Text that is not UTF-8: stop, keep it with U+FFFD in the bad places, or leave the document out."""
    from_file: str | None = None
    """Your own copy of what would be downloaded, for a machine without a network."""
    tokens: int | None = None
    """Stop after the document with which both splits together have this many; all of it if left out."""
    shard_tokens: int = 100_000_000
    """Tokens per shard."""
    workers: int | None = None
    """Threads that encode; one per core if left out. The shards do not depend on it."""

    def problems(self) -> list[str]:
        """What is wrong with these values, one plain sentence each; [] if nothing."""
        found = []
        if self.validation_fraction is not None and not 0.0 < self.validation_fraction < 1.0:
            found.append(f"validation_fraction={self.validation_fraction} must lie between 0 and 1")
        if self.on_bad_text not in {"fail", "replace", "skip"}:
            found.append(f"on_bad_text={self.on_bad_text!r} must be fail, replace or skip")
        if not 1 <= self.shard_tokens <= MOST_TOKENS:
            found.append(f"shard_tokens={self.shard_tokens} must lie between 1 and {MOST_TOKENS:,}")
        for name in ("tokens", "workers"):
            if (count := getattr(self, name)) is not None and count < 1:
                found.append(f"{name}={count} must be at least 1, or left out")
        return found


def output_folder(config: PrepareConfig) -> Path:
    """The folder that `prepare(config)` fills. Raises ValueError if the source does not exist."""
    name = source_name(config.source)
    if config.out is not None:
        return Path(config.out)
    return Path("data", name if config.tokenizer == "gpt2" else f"{name}-{Path(config.tokenizer).stem}")
