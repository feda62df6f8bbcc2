"""Memory, disk and time of a whole recipe on this machine, as `overnight plan` reckons them, in seconds."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import NamedTuple

from overnight.batching import BatchPlan
from overnight.hardware import find_device, find_device_name, find_memory_bytes, native_precision
from overnight.measurement import measure_matmul_flops
from overnight.memory import USABLE_FRACTION
from overnight.model.config import ModelConfig
from overnight.stages import trial
from overnight.stages.forecast import Text, count_work, predict_disk, predict_seconds
from overnight.stages.job import decide
from overnight.stages.plan import SHARES_OF_PEAK, UNKNOWN, check_together, suppose_pace
from overnight.stages.recipe import Recipe
from overnight.stages.team import Team, assemble_team, share, with_sharding
from overnight.world import count_processes
from overnight.world.cores import count_cores

LONGEST_MICRO_BATCH = 0.5  # seconds, above which steps are not measured but reckoned
MEASURED_SECONDS = 2.0
BUSY = 1.5  # of a load average, for each core: this command is one of those counted
SHARE_ON_CPU = 0.85  # of its large products: 88 to 92% were measured of GPT-2 124M (README.md)


class Foresight(NamedTuple):
    """A whole recipe with everything decided, and what it needs."""

    recipe: Recipe
    plan: BatchPlan
    team: Team
    device_name: str
    needed_bytes: int
    """Of memory, in each process."""
    usable_bytes: int
    disk_bytes: dict[str, int]
    """What is not on the disk yet, by what it holds."""
    free_bytes: int


def foresee(recipe: Recipe, sizes: ModelConfig, text: Text, device: str) -> Foresight:
    """What a run would decide and need on `device`. Raises ValueError as a run would."""
    processes = count_processes(recipe.compute.processes or 1, device)
    check_together(device, processes)
    decided, plan = decide(recipe, sizes, recipe.data, device, processes)
    memory_bytes = find_memory_bytes(device) // (processes if device == "cpu" else 1)
    device_name = find_device_name(device)
    row = None if device == "cpu" else find_device(device_name) or UNKNOWN
    team = with_sharding(assemble_team(1, processes, row, "400g"), decided, plan, memory_bytes)
    memory = team.estimate_memory(decided.model, plan.rows_per_micro_batch, decided.compute)
    disk = predict_disk(decided, count_work(decided, plan, text.validation_tokens), text)
    return Foresight(
        recipe=decided,
        plan=plan,
        team=team,
        device_name=team.describe(device_name),
        needed_bytes=memory.together,
        usable_bytes=int(USABLE_FRACTION * memory_bytes),
        disk_bytes={name: count for name, count in disk.items() if name != "shards" or text.folder is None},
        free_bytes=shutil.disk_usage(Path.cwd()).free,
    )


def predict_time(seen: Foresight, text: Text) -> tuple[float, str]:
    """(seconds, what that rests on): a few steps where they are short, not compiled; else arithmetic."""
    recipe, plan = seen.recipe, seen.plan
    device, precision = recipe.compute.device, recipe.compute.precision
    assert device is not None
    assert precision is not None
    work = count_work(recipe, plan, text.validation_tokens)
    native = device != "cpu" or precision == native_precision(device)  # else emulated, a hundred times slower
    flops = measure_matmul_flops(device, precision if native else "fp32", repeats=3)
    tokens = plan.rows_per_micro_batch * plan.tokens_per_row
    seconds = tokens * recipe.model.flops_per_token() / flops
    found = None
    if seconds < LONGEST_MICRO_BATCH:
        eager = dataclasses.replace(recipe, compute=dataclasses.replace(recipe.compute, compile=False))
        found = trial.measure(eager, plan, MEASURED_SECONDS, seen.team.processes)
    if found is not None:
        paces, rests_on = found[0].paces(), "from a few steps, not compiled"
        load = os.getloadavg()[0] if device == "cpu" else 0.0
        rests_on = (
            rests_on if load < BUSY * (count_cores() or 1) else f"others are busy here: load {load:.1f}"
        )
    else:
        reached = SHARE_ON_CPU if device == "cpu" else max(SHARES_OF_PEAK)
        pace = suppose_pace(recipe, plan, reached * flops)
        paces = (pace, pace, pace)
        rests_on = (
            f"at {reached:.0%} of what it multiplies" if native else f"or more: {precision} is emulated here"
        )
    if seen.team.processes > 1:
        paces = share(seen.team, recipe, plan, paces, None).paces
    return sum(predict_seconds(work, paces[1]).values()), rests_on
