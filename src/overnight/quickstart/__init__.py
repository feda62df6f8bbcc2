"""Text, training, evaluation and report in one command, offline."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """The main job, small: it trains a GPT-2 on the Python documentation that comes with Python."""

    fresh: bool = False
    """Start over, even if there is a quickstart run already."""
