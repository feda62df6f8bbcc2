"""What a model needs for a text: the nats of each example of it, and how much text that is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Unit = Literal["token", "word", "byte", "character"]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One model on one text."""

    nats: tuple[float, ...]
    """Of each example: a window, a passage."""
    tokens: tuple[int, ...]
    """Judged in each."""
    units: Mapping[Unit, float]
    """How many words, bytes, characters they all spell together, as far as known."""

    def count(self, unit: Unit) -> float:
        """How many tokens, words, bytes or characters."""
        return sum(self.tokens) if unit == "token" else self.units[unit]

    def per(self, unit: Unit) -> float:
        """Nats for each of them."""
        return math.fsum(self.nats) / self.count(unit)


def count_characters(token_bytes: Sequence[bytes]) -> list[int]:
    """Of each id how many characters begin in it: bytes that do not go on with a character of UTF-8."""
    return [sum(byte & 0xC0 != 0x80 for byte in spelt) for spelt in token_bytes]
