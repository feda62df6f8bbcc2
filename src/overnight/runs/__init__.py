"""The runs in a folder and the state of each."""

from __future__ import annotations

from dataclasses import dataclass

from tyro.conf import Positional

FOLDER = "runs"


@dataclass(frozen=True, kw_only=True)
class RunsConfig:
    """List every run: progress, losses, speed. Reads only the ends of the files.

    A run that can't be read is listed as damaged, with the reason below the table.
    """

    folder: Positional[str] = FOLDER
    """The folder that holds the runs, or one run."""
    json: bool = False
    """Print one JSON list to standard output, with an object for each run."""
