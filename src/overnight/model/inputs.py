"""What the blocks of one forward pass read besides the residual stream.

Shapes: B rows, T positions of this call, S positions of keys, C channels, H heads, D channels a head.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from overnight.model.positions import Rotation


class Cache(Protocol):
    """Keys and values of earlier positions. The generator owns, fills and resets it."""

    def positions(self, length: int) -> Tensor:
        """Positions of the next `length` ids, int64 (T,) or, where rows differ, (B, T)."""
        ...

    def append(self, layer: int, k_BHTD: Tensor, v_BHTD: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Add these; return all keys and values so far (B, H, S, D) and the attention mask.

        The mask is boolean, broadcastable to (B, H, T, S), or None: the cache was empty and attention is
        causal, or T is 1 and every position is visible.
        """
        ...


class BlockInputs(NamedTuple):
    """The same for all blocks."""

    ids_BT: Tensor  # noqa: N815 - shapes are part of names
    cache: Cache | None = None
    """Adds earlier positions."""
    document_BT: Tensor | None = None  # noqa: N815
    """Masks other documents."""
    rotation: Rotation | None = None
    """Of rotary positions."""
    embedding_BTC: Tensor | None = None  # noqa: N815
    """The residual stream before the first block."""
    positions: Tensor | None = None
    """Of the ids, (T,) or (B, T); None: 0 to T - 1."""
