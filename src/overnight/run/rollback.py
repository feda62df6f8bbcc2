"""After too many bad steps in a row: return to the last good checkpoint and skip their rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from overnight.run.setup import RunSetup
from overnight.run_directory import RunDirectory
from overnight.terminal import echo
from overnight.training.checkpoint.format import checkpoint_name, discard_checkpoints_after, list_checkpoints
from overnight.training.checkpoint.load import load_checkpoint, read_newest
from overnight.training.guard import SkippedRows


def needs_rollback(run: RunSetup) -> bool:
    """True if the last steps were bad, as many in a row as `rollback_after_steps` allows."""
    limit = run.resolved.recipe.guard.rollback_after_steps
    return limit is not None and run.state.guard.bad_steps >= limit


def roll_back(run: RunSetup, directory: RunDirectory) -> None:
    """Restore the newest checkpoint from before the bad steps; their rows are skipped from there on.

    Weights, moments and the run's files are then as they were at that step. Raises FloatingPointError if
    there is no such checkpoint, and after `max_rollbacks` rollbacks.
    """
    state, world, guard = run.state, run.world, run.state.guard
    # The bad steps, counted from 0, are first .. last - 1.
    first, last = state.step - guard.bad_steps, state.step
    trouble = (
        f"steps {first + 1:,} to {last:,} went wrong (see their loss and grad_norm in {directory.metrics})"
    )
    if len(guard.skipped) >= run.resolved.recipe.guard.max_rollbacks:
        raise FloatingPointError(
            f"{trouble}, after {len(guard.skipped)} rollbacks (max_rollbacks): their rows are not the "
            "reason; look at the learning rate, the precision and the initialisation"
        )
    world.barrier()
    earlier = [
        path for path in list_checkpoints(directory.checkpoints) if path.name <= checkpoint_name(first)
    ]
    if not earlier:
        raise FloatingPointError(
            f"{trouble}, and there is no checkpoint from before them: begin again with a lower "
            "--peak-learning-rate, or a smaller --checkpoint-every-steps"
        )
    world.barrier()
    if world.is_main:
        discard_checkpoints_after(first, directory.checkpoints)
    world.barrier()
    read_newest(directory.checkpoints, lambda path: load_checkpoint(state, path, world))
    plan = run.resolved.plan
    rows = (plan.tokens_before(last) - plan.tokens_before(first)) // plan.tokens_per_row
    state.guard = dataclasses.replace(state.guard, skipped=(*guard.skipped, SkippedRows(first, rows)))
    if world.is_main:
        discard_checkpoints_after(state.step, directory.checkpoints)  # newer ones, found damaged
        record_rollback(
            directory, state.step, {"first_bad_step": first + 1, "last_bad_step": last, "rows": rows}
        )
    echo(f"{trouble}: returned to step {state.step:,}; training continues without their {rows:,} rows")
    world.barrier()


def record_rollback(directory: RunDirectory, step: int, event: Mapping[str, int]) -> None:
    """Rewind the run's files to `step`, but keep the record of rollbacks, with this one as the last.

    The event is dated with the step that follows: a run that is killed before that step is saved meets the
    same trouble again, and writes the same line again.
    """
    rollbacks = [*directory.read_events("rollbacks"), {"step": step + 1, **event}]
    directory.rewind(step)
    for each in rollbacks[len(directory.read_events("rollbacks")) :]:
        directory.append_event("rollbacks", each)
