"""Where downloads are kept between runs: the user's cache folder, as the XDG convention places it."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/overnight`, or `~/.cache/overnight`; not created here."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "overnight"
