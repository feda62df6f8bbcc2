"""Statistics of prepared data: counts, duplicates, quality, domains; what a model's folder contains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Show what a prepared folder contains: counts, lengths, duplicates, frequent tokens, quality, samples.

    For a file or folder of .jsonl or .parquet, show the sites that the texts come from; for a model's folder
    in the format of Transformers, its class, sizes and switches.
    """

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SHARDS")]
    """A folder that `overnight prepare` wrote; a file or folder with a column of addresses; or a model's
    folder."""
    documents: int | None = None
    """Inspect only the first N documents of each split, or of the source; all if left out."""
    samples: int = 3
    """Number of documents whose beginning is shown."""
    seed: int = 0
    """Seed that chooses the shown documents."""
    url_column: str = "url"
    """The column of a source that holds the address."""
    text_column: str = "text"
    """The column of a source that holds the text."""
    json: bool = False
    """Print everything as one JSON object to standard output."""

    def problems(self) -> list[str]:
        """Invalid values, one sentence each; [] if there are none."""
        found = []
        if self.documents is not None and self.documents < 1:
            found.append(f"documents={self.documents} must be at least 1, or left out")
        if self.samples < 0:
            found.append(f"samples={self.samples} must be 0 or more")
        return found
