"""From a recipe to a trained model in a run directory: build, build, build, fit."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress

from overnight.config import parse_duration
from overnight.data.incremental import IncrementalStream
from overnight.distributed.watchdog import Watchdog, watchdog
from overnight.distributed.world import join_world
from overnight.recipe import Recipe
from overnight.run.log import RunLog, RunTask, open_run_tasks
from overnight.run.resume import (
    begin,
    check_checkpoint_space,
    check_directory,
    explain_choices,
    record_text,
)
from overnight.run.rollback import build_go_back
from overnight.run.setup import TrainSetup, build_setup, build_training, fit_into_memory
from overnight.run_directory import RunDirectory
from overnight.terminal import echo
from overnight.training.checkpoint.format import (
    list_checkpoints,
)
from overnight.training.step import Training, fit, stop_on_signal


def run(recipe: Recipe, directory: RunDirectory, *, resume: bool = False) -> Recipe:
    """Train what `recipe` describes into `directory`; returns the recipe with everything decided.

    With `resume` the run goes on from its newest good checkpoint. Interrupted by a signal, it is saved
    after the step it is at, and KeyboardInterrupt is raised. Raises ValueError if the recipe can't be
    trained there, before any file of a run is written into `directory`.
    """
    with join_world(recipe.compute.device, recipe.compute.timeout_seconds) as world:
        with world.raise_together():
            check_directory(recipe, directory, resume=resume)
            has_checkpoint = resume and bool(list_checkpoints(directory.checkpoints))
        job = build_setup(recipe, world, has_checkpoint=has_checkpoint)
        with world.raise_together():
            check_checkpoint_space(job, directory)
            tasks = open_run_tasks(recipe.evaluation, job.dataset.tokenizer, job.plan.tokens_per_row)
        training, job = fit_into_memory(build_training(job), job)
        choices = explain_choices(recipe, job)
        with ExitStack() as held:
            with world.raise_together():
                if world.is_main:
                    held.enter_context(directory.locked())
                    check_directory(recipe, directory, resume=resume)  # another may have begun meanwhile
            begin(job, directory, choices, resume=resume)
            train(job, training, directory, tasks)
    return job.recipe


def train(job: TrainSetup, training: Training, directory: RunDirectory, tasks: Sequence[RunTask]) -> None:
    """Run the loop to the end, or to a signal, with everything that is to be written on the way."""
    state, total_steps = job.state, job.recipe.schedule.total_steps
    assert total_steps is not None
    world = job.world
    with (
        watchdog(world.rank, world.size, job.recipe.compute.timeout_seconds) as watch,
        RunLog(job, directory, watch, tasks) as journal,
        stop_on_signal() as stopped,
    ):
        journal.evaluate_at_start()
        training = dataclasses.replace(training, go_back=build_go_back(job, directory, journal))
        is_over = functools.partial(is_out_of_time, job.recipe.checkpoints.max_time, time.monotonic())
        may_not_go_on = functools.partial(is_to_stop, job, lambda: stopped() or is_over(), watch, journal)
        with recording_failure(job, directory):
            fit(state, training, total_steps, journal.hooks(total_steps), may_not_go_on)
            journal.save()
            journal.finish_saving()
        record_text(job, directory)
        reason = "its time limit" if is_over() else "a signal" if stopped() else "a lack of text"
        is_finished = state.step == total_steps
        if world.is_main:
            directory.record_end(state.step, "its last step" if is_finished else reason)
    if not is_finished:
        echo(f"stopped and saved after step {state.step} of {total_steps}")
        echo(f"next: overnight train --resume {directory.path}")
        raise KeyboardInterrupt


@contextmanager
def recording_failure(job: TrainSetup, directory: RunDirectory) -> Iterator[None]:
    """Within, what the run fails by is written down, if the disk takes it."""
    try:
        yield
    except (FloatingPointError, OSError) as error:
        if job.world.is_main:
            with suppress(OSError):
                directory.record_end(job.state.step, f"{type(error).__name__}: {error}")
        raise


def is_out_of_time(max_time: str | None, begun_at: float) -> bool:
    """True once so long has passed since that moment of the monotonic clock."""
    return max_time is not None and time.monotonic() - begun_at >= parse_duration(max_time)


def is_to_stop(job: TrainSetup, stopped: Callable[[], bool], watch: Watchdog, journal: RunLog) -> bool:
    """True if any process was told to stop, or if the text of the next step is not there and will not come.

    Waits for text that is being prepared; before that, where there are several processes, for a checkpoint
    under way: they publish it after a step only.
    """
    watch.heartbeat()
    if not isinstance(job.train, IncrementalStream):
        return job.world.any(stopped())
    rows = job.plan.tokens_before(job.state.step + 1) // job.plan.tokens_per_row
    rows += job.state.guard.skipped_rows(job.state.step)
    if job.world.size > 1:
        journal.wait_until_saved()
    with watch.paused():
        return job.world.any(stopped() or not job.train.wait_for(rows, stopped))
