"""The command `overnight train`: a new run from a recipe, or a run that goes on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from overnight.config import raise_problems
from overnight.distributed.launcher import (
    count_restarts,
    is_launched,
    is_main_process,
    use_new_rendezvous_store,
)
from overnight.distributed.machine import divide_cores
from overnight.distributed.processes import run_processes
from overnight.distributed.world import count_processes
from overnight.recipe import Recipe, read_recipe_of
from overnight.run import train
from overnight.run.resume import check_directory
from overnight.run_directory import RunDirectory
from overnight.terminal import echo, quiet


def load_resumed(run: Path) -> Recipe:
    """The same of a run that is to go on. Raises ValueError if its record is not whole."""
    directory, recipe = RunDirectory(run), read_recipe_of(run)
    directory.check_record()
    check_checkpoints(recipe, directory)
    return recipe


def check_checkpoints(recipe: Recipe, directory: RunDirectory) -> None:
    """Raise ValueError if the run must have had a checkpoint, and has none: it would begin anew."""
    every = recipe.checkpoints.checkpoint_every_steps
    lines = [] if any(directory.checkpoints.glob("step-*")) else directory.read_metrics()
    was_saved = every is not None and len(lines) > 2 * every  # the next save waits for the one under way
    if was_saved and not any("skipped" in line for line in lines):  # after which a run may not be saved
        raise ValueError(
            f"{directory.checkpoints} holds no checkpoint, and {len(lines)} steps are done: bring it "
            "back, or begin again with another --run-name, or take metrics.jsonl away"
        )


def train_in_processes(recipe: Recipe, resumed: Path | None, words: Sequence[str]) -> int:
    """Let several processes on this machine each run the command of these words; returns the exit status.

    What can be refused before they start is refused here, once.
    """
    compute = recipe.compute
    assert compute.processes is not None
    raise_problems(recipe.problems(), f"recipe {recipe.run_name}")
    directory = find_directory(recipe, resumed)
    check_directory(recipe, directory, resume=resumed is not None)
    count = count_processes(compute.processes, compute.device)
    divide_cores(count)
    use_new_rendezvous_store()
    status = run_processes(words, count, compute.max_restarts)
    if status == 0:
        is_begun = directory.exists()  # or all were told to stop before
        if not is_begun or not directory.is_finished(load_resumed(directory.path).schedule.total_steps or 0):
            raise KeyboardInterrupt
    elif any(directory.checkpoints.glob("step-*")):
        echo(f"next: overnight train --resume {directory.path}")
    return status


def find_directory(recipe: Recipe, resumed: Path | None) -> RunDirectory:
    """Where a new run is written, or the one that goes on."""
    return RunDirectory(resumed or Path("runs") / recipe.run_name)


def run(recipe: Recipe, resumed: Path | None) -> None:
    """Train `recipe` in runs/<run_name>, or go on in `resumed`; of several processes the main one speaks.

    A run that torchrun has begun anew goes on. A launcher must not take a process that was told to stop, and
    has saved, for one that failed.
    """
    directory = find_directory(recipe, resumed)
    if resumed is None and count_restarts() and directory.exists():
        recipe, resumed = load_resumed(directory.path), directory.path
    with quiet(not is_main_process()):
        try:
            train.run(recipe, directory, resume=resumed is not None)
        except KeyboardInterrupt:
            if not is_launched():
                raise
            return
        print_summary(directory)


def print_summary(directory: RunDirectory) -> None:
    """What was trained, and what to do next."""
    last = directory.read_metrics()[-1]
    done = f"{last['step']} steps, {last['tokens']:,} tokens"
    loss = "not finite" if last["loss"] is None else f"{last['loss']:.4f}"
    echo(f"trained {directory.path} for {done}; last loss {loss}")
    echo(f"next: overnight report {directory.path}")
