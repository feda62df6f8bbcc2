"""Several processes that train together: what each holds, what they say, and how fast they are then.

Everything here is arithmetic on what one of them does alone; needs no torch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import NamedTuple

from overnight.batching import ROWS_AT_MOST, BatchPlan
from overnight.communication import BETWEEN, Cluster, StepPrediction, find_link_within, predict_step
from overnight.hardware import Device
from overnight.memory import MemoryEstimate, WayOut, estimate_memory, fits_into, try_shardings
from overnight.model.config import ModelConfig
from overnight.ownership import Sharding
from overnight.parallel import ComputeConfig
from overnight.stages.forecast import Pace
from overnight.stages.recipe import Recipe

WORTH_TELLING = 0.95  # of the time that a step takes: what saves less is not advised
HIDDEN = (1.0, 0.5, 0.0)  # fast, likely, slow: how much of what can be hidden behind computing is


@dataclass(frozen=True, kw_only=True)
class Team:
    """The processes that a plan is for; one by itself as well."""

    machines: int = 1
    processes_per_machine: int = 1
    cluster: Cluster | None = None
    """None on a CPU, of whose processes it is not known how fast they talk."""
    sharding: Sharding = "none"
    tried: dict[Sharding, int] = field(default_factory=dict)
    """Bytes that a process needs with each sharding that was considered, the chosen one the last."""
    is_asked: bool = False
    """Whether the sharding was, and not chosen."""

    @property
    def processes(self) -> int:
        """All of them."""
        return self.machines * self.processes_per_machine

    @property
    def sharers_of_a_device(self) -> int:
        """How many compute on one device: those of a machine share its CPU, and have a GPU each."""
        return self.processes_per_machine if self.cluster is None else 1

    def estimate_memory(self, model: ModelConfig, rows: int, compute: ComputeConfig) -> MemoryEstimate:
        """What one process takes."""
        compute = dataclasses.replace(compute, sharding=self.sharding)
        return estimate_memory(model, rows, compute, self.processes, self.processes_per_machine)

    def describe(self, device_name: str) -> str:
        """The machines, in words; one device by its bare name."""
        if self.processes == 1:
            return device_name
        each = f"{self.processes_per_machine} x {device_name}"
        if self.cluster is None:
            each = f"{self.processes_per_machine} processes on {device_name}"
        return each if self.machines == 1 else f"{self.machines} machines of {each}"


def assemble_team(machines: int, processes_per_machine: int, device: Device | None, network: str) -> Team:
    """So many processes with a GPU each of that row of the table; on a CPU if it is None."""
    team = Team(machines=machines, processes_per_machine=processes_per_machine)
    if device is None:
        return team
    cluster = Cluster(
        machines=machines,
        processes_per_machine=processes_per_machine,
        within=find_link_within(device.name),
        between=BETWEEN[network] if machines > 1 else None,
        memory_bytes_per_second=device.facts.bytes_per_second,
    )
    return dataclasses.replace(team, cluster=cluster)


def with_sharding(team: Team, recipe: Recipe, plan: BatchPlan, memory_bytes: int | None) -> Team:
    """`team` with what its processes divide: as asked, or as `overnight train` would choose.

    `memory_bytes` are one process's; nothing is divided where they are not known.
    """
    compute, rows = recipe.compute, plan.rows_per_micro_batch
    if team.processes == 1:
        return team
    if compute.sharding is not None or memory_bytes is None:
        sharding: Sharding = compute.sharding or "none"
        team = dataclasses.replace(team, sharding=sharding, is_asked=compute.sharding is not None)
        return dataclasses.replace(
            team, tried={sharding: team.estimate_memory(recipe.model, rows, compute).together}
        )
    tried = try_shardings(
        recipe.model, rows, compute, memory_bytes, team.processes, team.processes_per_machine
    )
    return dataclasses.replace(team, sharding=[*tried][-1], tried=tried)


def find_processes(team: Team, recipe: Recipe, memory_bytes: int) -> WayOut | None:
    """The fewest GPUs of a machine, up to eight, that a model fits into which does not into one."""
    if team.processes > 1 or team.cluster is None:
        return None
    for change in ({}, {"recompute": "selective"}, {"recompute": "block"}):
        compute = dataclasses.replace(recipe.compute, **change)  # type: ignore[arg-type]
        for count in (2, 4, 8):
            *_, needed = try_shardings(recipe.model, 1, compute, memory_bytes, count, count).values()
            if fits_into(memory_bytes, needed):
                words = [f"--processes {count}", *(f"--{name} {value}" for name, value in change.items())]
                return WayOut(" ".join(words), needed)
    return None


class Shared(NamedTuple):
    """What becomes of the work of one when the team does it."""

    paces: tuple[Pace, Pace, Pace]
    """Fast, likely and slow, of all together: a micro-batch takes its share of the time it takes one."""
    step: StepPrediction | None
    """Of one process in a full step; None where it is not known how fast they talk."""
    networks: dict[str, StepPrediction]
    """The same over other networks between the machines, by their names."""
    faster: tuple[str, float] | None
    """Settings with which a step is faster, and its seconds."""


def share(
    team: Team, recipe: Recipe, plan: BatchPlan, paces: tuple[Pace, Pace, Pace], memory_bytes: int | None
) -> Shared:
    """What the team makes of the paces of one process with a device for itself."""
    fast, likely, slow = (
        share_pace(team, recipe.model, pace, hidden) for pace, hidden in zip(paces, HIDDEN, strict=True)
    )
    if team.cluster is None:
        return Shared((fast, likely, slow), None, {}, None)
    micro_batches = plan.stages[-1].micro_batches // team.processes
    seconds = micro_batches * paces[1].micro_batch + _update_seconds(team, paces[1])
    networks = {}
    if team.machines > 1:
        others = (
            dataclasses.replace(team.cluster, between=link)
            for link in BETWEEN.values()
            if link != team.cluster.between
        )
        networks = {
            other.between.name: predict_step(recipe.model, team.sharding, other, micro_batches, seconds)
            for other in others
            if other.between is not None
        }
    step = predict_step(recipe.model, team.sharding, team.cluster, micro_batches, seconds)
    faster = find_faster(team, recipe, plan, paces[1], memory_bytes) if step.overlaps else None
    return Shared((fast, likely, slow), step, networks, faster)


def share_pace(team: Team, model: ModelConfig, pace: Pace, hidden: float) -> Pace:
    """The pace of all together, if so much of what can be hidden behind computing is."""
    alone = pace.micro_batch * team.sharers_of_a_device
    micro_batch, update = alone, _update_seconds(team, pace)
    if team.cluster is not None:
        said = predict_step(model, team.sharding, team.cluster, 1, alone)
        best, worst = said.seconds_range
        if said.overlaps:
            micro_batch = worst - hidden * (worst - best)
        else:
            update += said.communication_seconds
    return pace._replace(
        micro_batch=micro_batch / team.processes,
        update=update,
        evaluated_token=pace.evaluated_token * team.sharers_of_a_device / team.processes,
    )


def _update_seconds(team: Team, pace: Pace) -> float:
    """Of one process, which updates all weights, or its part of them."""
    whole = pace.update * team.sharers_of_a_device
    return whole if team.sharding == "none" else whole / team.processes


def find_faster(
    team: Team, recipe: Recipe, plan: BatchPlan, pace: Pace, memory_bytes: int | None
) -> tuple[str, float] | None:
    """More rows at once, for which weights are gathered less often; None if they gain too little.

    Recomputed blocks make room for them, and cost what is computed again.
    """
    model, compute = recipe.model, recipe.compute
    rows_before, micro_batches = plan.rows_per_micro_batch, plan.stages[-1].micro_batches
    of_process = plan.stages[0].micro_batches * rows_before // team.processes
    if memory_bytes is None:
        return None
    executed = model.executed_flops_per_token(compute.recompute)
    found: dict[str, float] = {}
    for change in ({}, {"recompute": "block"}):
        changed = dataclasses.replace(compute, **change)  # type: ignore[arg-type]
        slower = model.executed_flops_per_token(changed.recompute) / executed
        for rows in range(rows_before, min(of_process, ROWS_AT_MOST) + 1):
            needed = team.estimate_memory(model, rows, changed).together
            if of_process % rows or not fits_into(memory_bytes, needed):
                continue
            longer = pace._replace(micro_batch=slower * pace.micro_batch * rows / rows_before)
            likely = share_pace(team, model, longer, HIDDEN[1])
            options = {**change, "rows-per-micro-batch": rows}
            words = " ".join(f"--{name} {value}" for name, value in options.items())
            found[words] = likely.step(micro_batches * rows_before // rows)
    now = share_pace(team, model, pace, HIDDEN[1]).step(micro_batches)
    best = min(found, key=lambda words: found[words], default=None)
    return (best, found[best]) if best is not None and found[best] < WORTH_TELLING * now else None
