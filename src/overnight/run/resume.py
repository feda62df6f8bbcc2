"""What a run runs on, written down before it begins, and again each time it goes on."""

from __future__ import annotations

import dataclasses
import json
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from overnight import __version__
from overnight.config import from_toml, to_toml
from overnight.data.dataset import is_same_data
from overnight.data.mixture import Mixture, Rows
from overnight.data.packing import BestFitStream
from overnight.distributed.world import World
from overnight.hardware import find_device_name
from overnight.recipe import Recipe, frozen_settings, incompatible_settings
from overnight.run.setup import TrainSetup
from overnight.run_directory import RunDirectory, write_atomically
from overnight.terminal import echo
from overnight.tokenizer.open_tokenizer import load_tokenizer
from overnight.training import ComputeConfig
from overnight.training.checkpoint.format import (
    BYTES_PER_SAVED_PARAMETER,
    discard_checkpoints_after,
    list_checkpoints,
)
from overnight.training.checkpoint.load import VerifiedCheckpoint, open_checkpoint, read_newest, restore
from overnight.training.compute import explain_compute, find_attention_kernel

ABOUT_EACH_START = {"started_at", "command"}


def explain_choices(asked: Recipe, job: TrainSetup) -> dict[str, str]:
    """What was chosen for this machine, and why, by the setting's name."""
    choices = explain_compute(asked.compute, job.recipe.compute)
    packing = job.recipe.data.packing
    kernel = find_attention_kernel(
        job.recipe.model, job.recipe.compute, within_documents=packing == "documents"
    )
    choices["attention"] += f", kernel {kernel}"
    if packing == "best-fit":
        choices["packing"] = f"{packing} (as asked), {describe_loss_of_tokens(job.train)}"
    if isinstance(job.train, Mixture):
        choices["sources"] = job.train.describe_shares()
    if job.world.is_distributed:
        choices["processes"] = describe_processes(asked, job)
    rows, first, last = job.plan.micro_batch_size, job.plan.stages[0], job.plan.stages[-1]
    micro_batches = (
        f"{last.micro_batches}" if first is last else f"{first.micro_batches} to {last.micro_batches}"
    )
    reason = "what memory is estimated to hold" if asked.batch.micro_batch_size is None else "as asked"
    if asked.batch.micro_batch_size not in {None, rows}:
        reason = "halved until it fitted"
    choices["micro_batch_size"] = f"{rows} ({reason}), {micro_batches} micro-batches a step"
    return choices


def describe_processes(asked: Recipe, job: TrainSetup) -> str:
    """How many there are, what they divide among them, and why."""
    reason = "as asked" if asked.compute.sharding is not None else "the first that fits"
    order = ", gradients summed in one tree" if job.recipe.compute.deterministic_reduce else ""
    machines = job.world.size // job.world.local_size
    where = f" on {machines} machines" if machines > 1 else ""
    return f"{job.world.size}{where}, sharding {job.sharding} ({reason}){order}"


def describe_loss_of_tokens(rows: Rows | Mixture) -> str:
    """How much of the text is in no row, in words; of each source of a mixture."""
    if isinstance(rows, Mixture):
        sources = zip(rows.names, rows.streams, strict=True)
        return "; ".join(f"{name}: {describe_loss_of_tokens(stream)}" for name, stream in sources)
    return rows.describe_loss() if isinstance(rows, BestFitStream) else "nothing cut off"


def describe_environment(
    compute: ComputeConfig,
    parameters: int,
    choices: Mapping[str, str],
    before: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Versions, hardware, precision, commit and command of this process, for environment.json.

    Of a run that goes on, `before` is what that file says: it stays, and its list "resumed" grows by
    when and by which command the run went on, and whatever else is not as it was at first.
    """
    assert compute.device is not None
    facts = {
        "overnight": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "device": compute.device,
        "device_name": find_device_name(compute.device),
        "precision": compute.precision,
        "compiled": compute.compile,
        "choices": dict(choices),
        "threads": torch.get_num_threads(),
        "git_commit": _git_commit(),
        "command": shlex.join(["overnight", *sys.argv[1:]]),
        "started_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "parameters": parameters,
    }
    if before is None:
        return facts
    again = {
        name: fact for name, fact in facts.items() if name in ABOUT_EACH_START or before.get(name) != fact
    }
    return {**before, "resumed": [*before.get("resumed", []), again]}


def _git_commit(file: Path = Path(__file__)) -> str | None:
    """The commit that `file`, this package's own, belongs to; None if it is in none, or without git.

    An installed package often lies inside somebody else's repository, whose commit says nothing about it.
    """
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD", f"HEAD:./{file.name}"],  # fails if the commit has no such file
            cwd=file.parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.split()[0]


def check_directory(recipe: Recipe, directory: RunDirectory, *, resume: bool) -> None:
    """Raise ValueError unless `directory` is free for a new run, or holds the run that is to go on."""
    path = directory.path
    if not directory.exists():
        if resume:
            raise ValueError(f"there is no run in {path} to resume")
        return
    if not resume:
        raise ValueError(
            f"{path} already holds a run: go on with `overnight train --resume {path}`, "
            "or give another --run-name"
        )
    before = from_toml(Recipe, directory.read_recipe(), str(directory.recipe))
    changed = incompatible_settings(recipe, before)
    if changed:
        raise ValueError(
            f"{path} belongs to another recipe: {'; '.join(changed)}; "
            "take these back, or give another --run-name"
        )


def check_checkpoint_space(job: TrainSetup, directory: RunDirectory) -> None:
    """Raise ValueError if the checkpoints to be kept, and the one being written, do not fit the disk."""
    assert job.recipe.schedule.total_steps is not None
    wanted = job.recipe.checkpoints.count_kept(job.recipe.schedule.total_steps) + 1
    missing = max(1, wanted - len(list_checkpoints(directory.checkpoints)))
    needed = missing * job.state.model.config.parameter_count() * BYTES_PER_SAVED_PARAMETER
    existing = next(
        folder for folder in (directory.path, *directory.path.absolute().parents) if folder.exists()
    )
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise ValueError(
            f"the disk of {directory.path} has {free / 1e9:.1f} GB free, the checkpoints need "
            f"{needed / 1e9:.1f} GB: free some, or lower --keep-checkpoints"
        )


def begin(job: TrainSetup, directory: RunDirectory, choices: Mapping[str, str], *, resume: bool) -> None:
    """Write down what is about to run; with `resume`, become the newest good checkpoint first."""
    state = job.state
    if resume:
        with job.world.raise_together():
            check_text(job, directory)
        newest = read_newest(directory.checkpoints, lambda found: open_checkpoint(found, job.world))
        with job.world.raise_together():
            if newest is not None:
                check_settings(job, directory, newest)
                restore(state, newest)
        check_step(state.step, job.world)
        total_steps = job.recipe.schedule.total_steps or 0
        if state.step > total_steps:
            raise ValueError(
                f"total_steps={total_steps} is fewer than the {state.step} steps that {directory.path} "
                "has done: give more"
            )
    if job.world.is_main:
        record_start(job, directory, choices, resume=resume)
    job.world.barrier()
    for name, choice in choices.items():
        echo(f"{name.replace('_', ' '):<21} {choice}")


def check_settings(job: TrainSetup, directory: RunDirectory, newest: VerifiedCheckpoint) -> None:
    """Raise ValueError unless the recipe is the one by which it was saved: its file may have been edited."""
    now = frozen_settings(job.recipe)
    changed = [
        f"{name}={now[name]} (was {before})"
        for name, before in newest.settings.items()
        if name in now and now[name] != before
    ]
    if changed:
        raise ValueError(
            f"{directory.recipe} is not the recipe that the newest checkpoint was trained by: "
            f"{'; '.join(changed)}; take these back, or begin another run with --run-name"
        )


def check_text(job: TrainSetup, directory: RunDirectory) -> None:
    """Raise ValueError unless text and tokenizer are those of the run that is to go on."""
    dataset, path = job.dataset, directory.path
    now = json.loads(json.dumps(dataset.record()))
    try:
        before = json.loads(directory.data.read_text(encoding="utf-8"))
        is_same = is_same_data(before, now)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{directory.data} is damaged: take it from a copy of the run") from None
    if not is_same:
        names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        raise ValueError(
            f"the data in {dataset.folder} is not what {path} was trained on: other {', '.join(names)}; "
            "put that data back, or give another --run-name"
        )
    if not (directory.tokenizer / "tokenizer.json").is_file():
        return  # it is about to be written again
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
    """Raise ValueError unless all processes go on from the same checkpoint."""
    steps = world.all_gather_object(str(step))
    if len({*steps}) > 1:
        raise ValueError(
            f"the processes have loaded checkpoints of different steps ({', '.join(steps)}): a run's folder "
            "must lie on a disk that all of them see, and see alike"
        )


def record_start(
    job: TrainSetup, directory: RunDirectory, choices: Mapping[str, str], *, resume: bool
) -> None:
    """The run's files as they are to be at the step that it is at."""
    state, dataset = job.state, job.dataset
    if resume:
        discard_checkpoints_after(state.step, directory.checkpoints)
        directory.rewind(state.step)
    if not resume or not (directory.tokenizer / "tokenizer.json").is_file():
        dataset.tokenizer.save(directory.tokenizer)  # of a new run also where a failed command has left one
    record_text(job, directory)
    before = json.loads(directory.environment.read_text(encoding="utf-8")) if resume else None
    parameters = state.model.config.parameter_count()
    environment = describe_environment(job.recipe.compute, parameters, choices, before)
    device = job.world.device.partition(":")[0] if job.world.is_distributed else job.world.device
    compute = dataclasses.replace(job.recipe.compute, device=device)
    directory.begin(to_toml(dataclasses.replace(job.recipe, compute=compute)), environment)


def record_text(job: TrainSetup, directory: RunDirectory) -> None:
    """Write down by what the text of the run is known again."""
    if job.world.is_main:
        write_atomically(directory.data, json.dumps(job.dataset.record(), indent=2) + "\n")
