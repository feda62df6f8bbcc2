"""Statistics of prepared data: counts, duplicates, quality, domains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """What is in a prepared folder: counts, lengths, duplicates, frequent tokens, quality, samples.

    Of a file or folder of .jsonl or .parquet it shows which sites the texts come from.
    """

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SHARDS")]
    """A folder that `overnight prepare` wrote; or a file or folder with a column of addresses."""
    documents: int | None = None
    """Inspect only the first N documents of each split, or of the source; all if left out."""
    samples: int = 3
    """How many documents to show the beginning of."""
    seed: int = 0
    """Seed that chooses them."""
    url_column: str = "url"
    """The column of a source that holds the address."""
    text_column: str = "text"
    """The column of a source that holds the text."""
    json: bool = False
    """Print everything as one JSON object to standard output."""

    def problems(self) -> list[str]:
        """What is wrong with these values, one plain sentence each; [] if nothing."""
        found = []
        if self.documents is not None and self.documents < 1:
            found.append(f"documents={self.documents} must be at least 1, or left out")
        if self.samples < 0:
            found.append(f"samples={self.samples} must be 0 or more")
        return found
