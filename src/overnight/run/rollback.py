"""When too many steps in a row went wrong: back to the last good checkpoint, and on without their rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

from overnight.run.log import RunLog
from overnight.run.setup import TrainSetup
from overnight.run_directory import RunDirectory
from overnight.terminal import echo
from overnight.training.checkpoint.format import checkpoint_name, discard_checkpoints_after, list_checkpoints
from overnight.training.checkpoint.load import load_checkpoint, read_newest
from overnight.training.guard import SkippedRows


def build_go_back(job: TrainSetup, directory: RunDirectory, journal: RunLog) -> Callable[[], bool]:
    """What `fit` asks after each step; see `Training.go_back`.

    It raises FloatingPointError where there is no checkpoint from before the trouble, and where that has
    happened too often already.
    """
    limit = job.recipe.guard.rollback_after_steps

    def go_back() -> bool:
        if limit is None or job.state.guard.bad_steps < limit:
            return False
        journal.wait_until_saved()
        roll_back(job, directory)
        journal.note_return()
        return True

    return go_back


def roll_back(job: TrainSetup, directory: RunDirectory) -> None:
    """Make the state that of the newest checkpoint before the bad steps, whose rows are left out from now on.

    Weights, moments, the order of everything else, and the run's files are then as they were at that step.
    """
    state, now = job.state, job.state.guard
    last, first = (
        state.step,
        state.step - now.bad_steps,
    )  # the bad ones, counted from 0, are first .. last - 1
    trouble = (
        f"steps {first + 1:,} to {last:,} went wrong (see their loss and grad_norm in {directory.metrics})"
    )
    if len(now.skipped) >= job.recipe.guard.max_rollbacks:
        raise FloatingPointError(
            f"{trouble}, after going back {len(now.skipped)} times (max_rollbacks): their rows are not the "
            "reason; look at the learning rate, the precision and the initialisation"
        )
    job.world.barrier()
    earlier = [
        path for path in list_checkpoints(directory.checkpoints) if path.name <= checkpoint_name(first)
    ]
    if not earlier:
        raise FloatingPointError(
            f"{trouble}, and no checkpoint is from before them: begin again with a lower "
            "--peak-learning-rate, or a smaller --checkpoint-every-steps"
        )

    def read(path: Path) -> None:
        load_checkpoint(state, path, job.world)

    job.world.barrier()
    if job.world.is_main:
        discard_checkpoints_after(first, directory.checkpoints)
    job.world.barrier()
    read_newest(directory.checkpoints, read)
    plan = job.plan
    rows = (plan.tokens_before(last) - plan.tokens_before(first)) // plan.tokens_per_row
    state.guard = dataclasses.replace(state.guard, skipped=(*now.skipped, SkippedRows(first, rows)))
    if job.world.is_main:
        discard_checkpoints_after(state.step, directory.checkpoints)  # passed over, since they are damaged
        write_down(directory, state.step, {"first_bad_step": first + 1, "last_bad_step": last, "rows": rows})
    echo(f"{trouble}: went back to step {state.step:,}, and goes on without their {rows:,} rows")
    job.world.barrier()


def write_down(directory: RunDirectory, step: int, event: Mapping[str, int]) -> None:
    """The run's files as they were at `step`, but that returns are kept, with this one as the last.

    An event belongs to the step that it goes on with: a run that is killed before that is saved comes to the
    same trouble again, and writes the same line again.
    """
    returns = [*directory.read_events("rollbacks"), {"step": step + 1, **event}]
    directory.rewind(step)
    for each in returns[len(directory.read_events("rollbacks")) :]:
        directory.append_event("rollbacks", each)
