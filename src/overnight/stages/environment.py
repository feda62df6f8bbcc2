"""What a run runs on, written down before it begins, and again each time it goes on."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from overnight import __version__
from overnight.data.mixture import Mixture, Rows
from overnight.data.packing import BestFitStream
from overnight.hardware import find_device_name
from overnight.parallel import ComputeConfig, explain_compute, find_attention_kernel
from overnight.stages.job import Job
from overnight.stages.recipe import Recipe

ABOUT_EACH_START = {"started_at", "command"}


def explain_choices(asked: Recipe, job: Job) -> dict[str, str]:
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
    if job.world.is_joined:
        choices["processes"] = describe_processes(asked, job)
    rows, first, last = job.plan.rows_per_micro_batch, job.plan.stages[0], job.plan.stages[-1]
    micro_batches = (
        f"{last.micro_batches}" if first is last else f"{first.micro_batches} to {last.micro_batches}"
    )
    reason = "what memory is estimated to hold" if asked.batch.rows_per_micro_batch is None else "as asked"
    if asked.batch.rows_per_micro_batch not in {None, rows}:
        reason = "halved until it fitted"
    choices["rows_per_micro_batch"] = f"{rows} ({reason}), {micro_batches} micro-batches a step"
    return choices


def describe_processes(asked: Recipe, job: Job) -> str:
    """How many there are, what they divide among them, and why."""
    reason = "as asked" if asked.compute.sharding is not None else "the first that fits"
    order = ", gradients summed in one tree" if job.recipe.compute.bitwise else ""
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
    import torch

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
