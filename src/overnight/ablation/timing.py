"""The time of a step of two arms, timed in turn in this process on random ids."""

from __future__ import annotations

import gc
import statistics
from typing import NamedTuple

import torch

from overnight.hardware import release_cached_memory
from overnight.planning.measure import build_trial, time_parts
from overnight.recipe import Resolved
from overnight.terminal import progress
from overnight.training.state import TrainState
from overnight.training.step import TrainSetup

WARM_UPS, ROUNDS = 2, 7
TIMED_MICRO_BATCHES = 2  # of a step; the last one is timed, and stands for all


class StepTimes(NamedTuple):
    """Medians over the rounds."""

    baseline_seconds: float
    seconds: float
    ratio: float
    """The median of each round's ratio: both steps of a round share the machine's temperature and load."""


def time_in_turn(baseline: Resolved, arm: Resolved, rounds: int = ROUNDS) -> StepTimes | None:
    """Time steps of the baseline and the arm, alternately; None if both together do not fit into memory."""
    device = arm.compute.device
    try:
        return _time_pair(baseline, arm, rounds)
    except torch.OutOfMemoryError:
        return None
    finally:
        gc.collect()
        release_cached_memory(device)
        torch.compiler.reset()  # it compiles a function for a few models only


def _time_pair(baseline: Resolved, arm: Resolved, rounds: int) -> StepTimes:
    trials = [(each, *build_trial(each)) for each in (baseline, arm)]
    times: list[tuple[float, float]] = []
    with progress("time steps in turn", WARM_UPS + rounds, "rounds") as advance:
        for _ in range(WARM_UPS + rounds):
            before, after = (time_step_of(*trial) for trial in trials)
            times.append((before, after))
            advance()
    counted = times[WARM_UPS:]
    return StepTimes(
        baseline_seconds=statistics.median(before for before, _ in counted),
        seconds=statistics.median(after for _, after in counted),
        ratio=statistics.median(after / before for before, after in counted),
    )


def time_step_of(resolved: Resolved, state: TrainState, training: TrainSetup) -> float:
    """Seconds of a whole step: one micro-batch as often as a step has it, and the update."""
    count = resolved.plan.stages[-1].micro_batches
    micro_batch, update = time_parts(state, training, min(TIMED_MICRO_BATCHES, count))
    return count * micro_batch + update
