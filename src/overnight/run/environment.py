"""The choices made for this machine, and the environment of a run, recorded at each start."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from overnight import __version__
from overnight.config import working_directory
from overnight.data.mixture import Mixture, SourceRows
from overnight.data.packing import BestFitStream
from overnight.hardware import find_device_name
from overnight.recipe import Recipe
from overnight.run.setup import RunSetup
from overnight.training import Compute
from overnight.training.compute import describe_attention_kernel, explain_compute

ABOUT_EACH_START = {"started_at", "command", "working_directory"}


def explain_choices(asked: Recipe, run: RunSetup, *, resume: bool = False) -> dict[str, str]:
    """The value chosen for this machine and the reason, by the setting's name.

    The recipe of a resumed run holds what was chosen when it began, whether or not anybody asked for it.
    """
    resolved = run.resolved
    requested = "as before" if resume else "as requested"
    choices = explain_compute(asked.compute, resolved.compute, requested)
    packing = resolved.recipe.data.packing
    kernel = describe_attention_kernel(
        resolved.model, resolved.compute, within_documents=packing == "documents"
    )
    choices["attention"] += f", kernel {kernel}"
    if packing == "best-fit":
        choices["packing"] = f"{packing} ({requested}), {describe_cut_tokens(run.train)}"
    if isinstance(run.train, Mixture):
        choices["mixture"] = run.train.describe_shares()
    if run.world.is_distributed:
        choices["processes"] = describe_processes(asked, run, requested)
    rows, first, last = resolved.plan.micro_batch_size, resolved.plan.stages[0], resolved.plan.stages[-1]
    micro_batches = (
        f"{last.micro_batches}" if first is last else f"{first.micro_batches} to {last.micro_batches}"
    )
    reason = "the memory estimate allows it" if asked.batch.micro_batch_size is None else requested
    if asked.batch.micro_batch_size not in {None, rows}:
        reason = "halved until it fitted"
    plural = "" if micro_batches == "1" else "es"
    choices["micro_batch_size"] = f"{rows} ({reason}), {micro_batches} micro-batch{plural} a step"
    return choices


def describe_processes(asked: Recipe, run: RunSetup, requested: str) -> str:
    """The number of processes, their sharding, and the reason for it."""
    world, compute = run.world, run.resolved.compute
    reason = requested if asked.compute.sharding is not None else "the first that fits"
    order = ", gradients summed in one tree" if compute.deterministic_reduce else ""
    machines = world.size // world.local_size
    where = f" on {machines} machines" if machines > 1 else ""
    return f"{world.size}{where}, sharding {compute.sharding} ({reason}){order}"


def describe_cut_tokens(rows: SourceRows | Mixture) -> str:
    """The share of the text that is in no row, as text; for each source of a mixture."""
    if isinstance(rows, Mixture):
        sources = zip(rows.names, rows.streams, strict=True)
        return "; ".join(f"{name}: {describe_cut_tokens(stream)}" for name, stream in sources)
    return rows.describe_loss() if isinstance(rows, BestFitStream) else "nothing cut off"


def describe_environment(
    compute: Compute,
    parameters: int,
    choices: Mapping[str, str],
    before: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Versions, hardware, precision, commit and command of this process, for environment.json.

    For a resumed run, `before` is that file's content: it stays, and its list "resumed" grows by the time
    and command of the resumption and every fact that differs from the first start.
    """
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
        "working_directory": str(working_directory() or ""),
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
    """The commit that contains `file`, which is this package's own; None if none does, or without git.

    An installed package is often inside another project's repository, whose commit says nothing about it.
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
