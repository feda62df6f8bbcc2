"""Starts a run, resumes it from its newest good checkpoint, and rolls it back after bad steps."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from overnight.config import to_toml
from overnight.data.dataset import is_same_data
from overnight.distributed.world import World
from overnight.recipe import (
    Recipe,
    flatten,
    frozen_settings,
    incompatible_settings,
    read_recipe_of,
    with_settings,
)
from overnight.run.environment import describe_environment
from overnight.run.setup import RunSetup
from overnight.run_directory import RunDirectory
from overnight.terminal import echo, shell_command, wrap
from overnight.tokenizer.open_tokenizer import load_tokenizer
from overnight.training.checkpoint.format import checkpoint_name, discard_checkpoints_after, list_checkpoints
from overnight.training.checkpoint.load import (
    VerifiedCheckpoint,
    load_checkpoint,
    open_checkpoint,
    read_newest,
    restore,
)
from overnight.training.guard import SkippedRows


def load_resumed(path: Path) -> Recipe:
    """The recipe of a run that is to be resumed. Raises ValueError if the run's record is damaged."""
    directory, recipe = RunDirectory(path), read_recipe_of(path)
    directory.check_record()
    every = recipe.checkpoints.checkpoint_every_steps
    has_checkpoint = bool(list_checkpoints(directory.checkpoints))
    lines = [] if has_checkpoint or every is None else directory.read_metrics()
    # A checkpoint is published before the second one after it begins; steps that went wrong save none.
    if every is not None and len(lines) > 2 * every and not any("skipped" in line for line in lines):
        raise ValueError(
            f"{directory.checkpoints} holds no checkpoint, although {len(lines)} steps are done: restore it, "
            "or start again with another --run-name"
        )
    return recipe


def check_directory(recipe: Recipe, directory: RunDirectory, *, resume: bool) -> None:
    """Raise ValueError unless `directory` is free for a new run, or holds the run to be resumed."""
    path = directory.path
    if not directory.exists():
        if resume:
            raise ValueError(f"there is no run in {path} to resume")
        return
    if not resume:
        raise ValueError(
            f"{path} already holds a run: resume it with `{shell_command('train', '--resume', path)}`, or "
            "give another --run-name"
        )
    changed = incompatible_settings(flatten(recipe), flatten(read_recipe_of(path)))
    if changed:
        raise ValueError(
            f"{path} belongs to another recipe: {'; '.join(changed)}; undo these changes, or give another "
            "--run-name"
        )


def begin(run: RunSetup, directory: RunDirectory, choices: Mapping[str, str], *, resume: bool) -> None:
    """Restore the newest good checkpoint if `resume`; then write the files that describe the run."""
    state, world = run.state, run.world
    if resume:
        with world.raise_together():
            check_same_data(run, directory)
        newest = read_newest(directory.checkpoints, lambda found: open_checkpoint(found, world))
        with world.raise_together():
            if newest is not None:
                check_settings(run, directory, newest)
                restore(state, newest)
        check_step(state.step, world)
        total_steps = run.resolved.total_steps
        if state.step > total_steps:
            raise ValueError(
                f"total_steps={total_steps} is less than the {state.step} steps that {directory.path} has "
                "done: give more"
            )
    if world.is_main:
        record_start(run, directory, choices, resume=resume)
    world.barrier()
    if resume and state.step == total_steps:
        echo(f"{directory.path} has finished its {total_steps:,} steps; a larger --total-steps continues it")
        return
    for name, choice in choices.items():
        title = f"{name.replace('_', ' '):<25} "
        echo("\n".join(wrap(choice, 80, title, " " * len(title))))


def check_settings(run: RunSetup, directory: RunDirectory, newest: VerifiedCheckpoint) -> None:
    """Raise ValueError unless the recipe is the checkpoint's: recipe.toml may have been edited."""
    before = Recipe.RENAMED.settings(newest.settings)
    changed = incompatible_settings(frozen_settings(run.resolved.recipe), before)
    if changed:
        raise ValueError(
            f"{directory.recipe} is not the recipe of the newest checkpoint: {'; '.join(changed)}; undo "
            "these changes, or start another run with --run-name"
        )


def check_same_data(run: RunSetup, directory: RunDirectory) -> None:
    """Raise ValueError unless data and tokenizer are those of the run to be resumed."""
    dataset, path = run.dataset, directory.path
    now = json.loads(json.dumps(dataset.record()))
    try:
        before = json.loads(directory.data.read_text(encoding="utf-8"))
        is_same = is_same_data(before, now)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{directory.data} is damaged: restore it from a copy of the run") from None
    if not is_same:
        names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        raise ValueError(
            f"the data in {dataset.folder} is not the data that {path} was trained on: {', '.join(names)} "
            "differ; put that data back, or give another --run-name"
        )
    if not (directory.tokenizer / "tokenizer.json").exists():
        return  # `record_start` writes it again
    try:
        is_same = load_tokenizer(directory.tokenizer).fingerprint == dataset.tokenizer.fingerprint
    except ValueError:  # damaged
        is_same = False
    if not is_same:
        raise ValueError(
            f"{directory.tokenizer} is not the tokenizer that {path} was trained with: delete that folder, "
            "and it is written again"
        )


def check_step(step: int, world: World) -> None:
    """Raise ValueError unless all processes resume from the same checkpoint."""
    steps = world.all_gather_object(step)
    if len({*steps}) > 1:
        raise ValueError(
            f"the processes have loaded checkpoints of different steps ({', '.join(map(str, steps))}): a "
            "run's folder must be on a disk that all of them see, with the same content"
        )


def record_start(run: RunSetup, directory: RunDirectory, choices: Mapping[str, str], *, resume: bool) -> None:
    """Write the run's files for its current step."""
    state, dataset, resolved, world = run.state, run.dataset, run.resolved, run.world
    if resume:
        discard_checkpoints_after(state.step, directory.checkpoints)
        directory.rewind(state.step)
    if not resume or not (directory.tokenizer / "tokenizer.json").is_file():
        dataset.tokenizer.save(directory.tokenizer)  # a new run replaces the files of a failed command
    record_data(run, directory)
    before = json.loads(directory.environment.read_text(encoding="utf-8")) if resume else None
    parameters = resolved.model.parameter_count()
    environment = describe_environment(resolved.compute, parameters, choices, before)
    # Of several processes each has its own GPU; the recipe names the kind.
    device = world.device.partition(":")[0] if world.is_distributed else world.device
    directory.begin(to_toml(with_settings(resolved.recipe, device=device)), environment)


def record_data(run: RunSetup, directory: RunDirectory) -> None:
    """Write the facts by which a resumed run recognises its data."""
    if run.world.is_main:
        directory.write(directory.data, run.dataset.record())


# ---------------------------------------------------------------- rollback


def needs_rollback(run: RunSetup) -> bool:
    """True if the last `rollback_after_steps` steps were all bad."""
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
            f"{trouble}, and there is no checkpoint from before them: start again with a lower "
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
        discard_checkpoints_after(state.step, directory.checkpoints)  # newer, damaged checkpoints
        record_rollback(
            directory, state.step, {"first_bad_step": first + 1, "last_bad_step": last, "rows": rows}
        )
    echo(f"{trouble}: returned to step {state.step:,}; training continues without their {rows:,} rows")
    world.barrier()


def record_rollback(directory: RunDirectory, step: int, event: Mapping[str, int]) -> None:
    """Rewind the run's files to `step`, but keep the record of rollbacks, with this one as the last.

    The event is dated with the step that follows: a run that is killed before that step is saved meets the
    same steps again, and writes the same line again.
    """
    rollbacks = [*directory.read_events("rollbacks"), {"step": step + 1, **event}]
    directory.rewind(step)
    for each in rollbacks[len(directory.read_events("rollbacks")) :]:
        directory.append_event("rollbacks", each)
