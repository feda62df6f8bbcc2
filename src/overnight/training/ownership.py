"""Who updates what, where several processes divide AdamW's moments among them (ZeRO-1). Needs no torch.

A process owns whole parameters: it keeps their moments, updates them, and sends them to the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Sharding = Literal["none", "zero1", "fsdp", "hsdp"]


def assign_parameters(sizes: Mapping[str, int], ranks: int) -> dict[str, int]:
    """The rank that owns each parameter, by name, in the order of `sizes`.

    The largest first, each to the rank that has the least so far; of parameters of one size the one that
    comes first in `sizes`, of ranks that have as much the lowest. So it depends on nothing but names, sizes
    and their order, and every process finds the same. No rank has more than a 1/`ranks` share and one
    parameter (Graham 1969, Bounds on Multiprocessing Timing Anomalies). Raises ValueError if `ranks` is
    less than 1.
    """
    if ranks < 1:
        raise ValueError(f"ranks={ranks} must be at least 1")
    taken = [0] * ranks
    owner = dict.fromkeys(sizes, 0)
    for name in sorted(sizes, key=lambda name: -sizes[name]):  # stable: ties stay in order
        rank = taken.index(min(taken))
        owner[name] = rank
        taken[rank] += sizes[name]
    return owner


def largest_share(sizes: Mapping[str, int], ranks: int) -> int:
    """How much the rank owns that owns the most, in the unit of `sizes`."""
    owned = [0] * ranks
    for name, rank in assign_parameters(sizes, ranks).items():
        owned[rank] += sizes[name]
    return max(owned)
