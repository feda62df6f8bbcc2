"""The command `overnight train`: a new run from a recipe, or a resumed run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from overnight.config import raise_problems
from overnight.distributed.launcher import (
    count_restarts,
    divide_cores,
    is_launched,
    is_main_process,
    use_new_rendezvous_store,
)
from overnight.distributed.processes import REFUSED, run_processes
from overnight.distributed.world import count_processes
from overnight.recipe import Recipe
from overnight.run.resume import check_directory, load_resumed
from overnight.run.train import train_recipe
from overnight.run_directory import FROM_A_COPY, RunDirectory
from overnight.terminal import echo, quiet, shell_command


def run(recipe: Recipe, resumed: Path | None) -> None:
    """Train `recipe` in runs/<run_name>, or continue `resumed`; of several processes the main one prints.

    A run that torchrun has restarted is resumed. A process that was stopped by a signal and has saved ends
    normally under a launcher, which would take an error for a failure.
    """
    directory = find_directory(recipe, resumed)
    if resumed is None and count_restarts() and directory.exists():
        recipe, resumed = load_resumed(directory.path), directory.path
    with quiet(not is_main_process()):
        try:
            train_recipe(recipe, directory, resume=resumed is not None)
        except KeyboardInterrupt:
            if not is_launched():
                raise
            return
        print_summary(directory)


def train_in_processes(recipe: Recipe, resumed: Path | None, words: Sequence[str]) -> int:
    """Run the command of these words in `recipe.compute.processes` processes; returns the exit status.

    Invalid settings are reported here once, before the processes start.
    """
    compute = recipe.compute
    raise_problems(recipe.problems(), f"recipe {recipe.run_name}")
    directory = find_directory(recipe, resumed)
    check_directory(recipe, directory, resume=resumed is not None)
    count = count_processes(1 if compute.processes is None else compute.processes, compute.device)
    divide_cores(count)
    use_new_rendezvous_store()
    status = run_processes(words, count, compute.max_restarts)
    if status == 0:
        # The processes end normally also when a signal stops them, even before the run began.
        total_steps = load_resumed(directory.path).schedule.total_steps if directory.exists() else None
        if total_steps is None or not directory.is_finished(total_steps):
            raise KeyboardInterrupt
    elif status != REFUSED and any(directory.checkpoints.glob("step-*")):
        echo(f"next: {shell_command('train', '--resume', directory.path)}")
    return status


def find_directory(recipe: Recipe, resumed: Path | None) -> RunDirectory:
    """The directory of a new run, or of the one to be resumed."""
    return RunDirectory(resumed or Path("runs") / recipe.run_name)


def print_summary(directory: RunDirectory) -> None:
    """Print a summary of the run and the next command."""
    try:
        last = directory.read_metrics()[-1]
        done = f"{last['step']} steps, {last['tokens']:,} tokens"
        loss = "not finite" if last["loss"] is None else f"{last['loss']:.4f}"
    except (LookupError, TypeError):
        raise ValueError(f"{directory.metrics} has no line of the last step: {FROM_A_COPY}") from None
    echo(f"trained {directory.path} for {done}; last loss {loss}")
    echo(f"next: {shell_command('report', directory.path)}")
