"""A check: what was measured, what it must keep to, and what is likely wrong if it does not."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from overnight.state import TrainState
    from overnight.trainer import Training


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a check found out."""

    passed: bool | None
    """None if there was nothing to check, or no way to; `cause` says why."""
    measured: str = ""
    bound: str = ""
    """What `measured` must be."""
    cause: str = ""
    """If it failed: what is likely wrong, and what to do."""
    shown: tuple[str, ...] = ()
    """Lines for a person to judge: a drawing, texts."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """What was measured, in full, by name."""


class Check(NamedTuple):
    """A finding, by the name of what was checked."""

    name: str
    finding: Finding
    seconds: float


class SetUp(NamedTuple):
    """A model about to be trained, and everything to train it with, as a run has them."""

    state: TrainState
    training: Training


class Build(Protocol):
    """Makes a set-up, always of the same weights and the same text."""

    def __call__(self, **compute: object) -> SetUp:
        """The set-up with these fields of its ComputeConfig changed."""
        ...


def skipped(why: str) -> Finding:
    """A finding that there was nothing to find."""
    return Finding(passed=None, cause=why)


def perform(name: str, examine: Callable[[], Finding]) -> Check:
    """Do the check of that name. One that raises an error has failed, and says the error."""
    started_at = time.perf_counter()
    try:
        finding = examine()
    except Exception as error:  # whatever a night would have come to
        words = " ".join(str(error).split()) or type(error).__name__
        finding = Finding(
            passed=False,
            measured=type(error).__name__,
            bound="no error",
            cause=f"it came to an error, as a run would: {words}",
        )
    return Check(name, finding, time.perf_counter() - started_at)
