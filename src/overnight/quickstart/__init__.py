"""Text, training, evaluation and report in one command, offline."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """Train a small GPT-2 on the Python documentation, from text to report."""

    fresh: bool = False
    """Start over, even if there is already a quickstart run."""
