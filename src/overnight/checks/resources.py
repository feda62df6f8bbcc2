"""Is there enough of it? Memory, disk, and how long it takes."""

from __future__ import annotations

import math
from collections.abc import Mapping

from overnight.checks.check import Finding


def check_memory(needed_bytes: int, usable_bytes: int, device: str) -> Finding:
    """What a step takes, by `overnight plan`'s arithmetic, against what the device has for it."""
    return Finding(
        passed=needed_bytes <= usable_bytes,
        measured=f"{needed_bytes / 1e9:.2f} GB",
        bound=f"at most {usable_bytes / 1e9:.2f} GB usable",
        cause=f"a step does not fit into the memory of {device}: overnight plan says what would "
        "(--recompute block, --head chunked, fewer --rows-per-micro-batch, more --processes)",
        figures={"needed_bytes": needed_bytes, "usable_bytes": usable_bytes},
    )


def check_disk(needed_bytes: Mapping[str, int], free_bytes: int) -> Finding:
    """What the run writes, by what it holds, against what is free."""
    needed = sum(needed_bytes.values())
    told = ", ".join(f"{name} {count / 1e9:.2f} GB" for name, count in needed_bytes.items() if count)
    return Finding(
        passed=needed <= free_bytes,
        measured=f"{needed / 1e9:.2f} GB",
        bound=f"at most {free_bytes / 1e9:.2f} GB free",
        cause=f"the disk of this folder is too small, and the run would end in the middle ({told}): free "
        "some, lower --keep-checkpoints, or work in a folder of a larger disk",
        figures={"needed_bytes": needed, "free_bytes": free_bytes} | dict(needed_bytes),
    )


def check_time(seconds: float, words: str, rests_on: str) -> Finding:
    """How long the run takes; there is no bound but that somebody can wait for it."""
    return Finding(
        passed=math.isfinite(seconds) and seconds > 0,
        measured=f"about {words}",
        bound=rests_on,
        cause="how long the run takes can't be told: the machine was not to be measured; see overnight plan",
        figures={"seconds": seconds},
    )
