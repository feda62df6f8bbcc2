"""What `overnight plan` has found out, and how programs are told: as JSON."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from overnight.batching import BatchPlan
from overnight.memory import MemoryEstimate, WayOut
from overnight.stages.forecast import Cost, Pace, Text, Work, predict_cost, predict_disk, predict_seconds
from overnight.stages.recipe import Recipe
from overnight.stages.team import Shared, Team


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """Everything that a plan says."""

    name: str
    """Of the recipe, as it was given."""
    recipe: Recipe
    """With everything decided."""
    plan: BatchPlan
    text: Text
    device_name: str
    assumption: str | None
    """What an estimate rests on; None if the machine was measured."""
    team: Team = Team()
    """The processes that train together."""
    memory: MemoryEstimate
    """Of one process."""
    device_memory_bytes: int | None
    """That a process may use; None of a device that shares the memory of a machine which is not here."""
    process_memory_bytes: int = 0
    """Of a CPU: what a process holds besides, torch and its libraries above all."""
    peak_memory_bytes: int | None = None
    """Measured while training."""
    evaluation_peak_memory_bytes: int | None = None
    """Measured after an evaluation as well."""
    fits: bool | None
    """None where the device's memory is not known."""
    ways_out: tuple[WayOut, ...] = ()
    """What would make it fit, if it does not."""
    several: WayOut | None = None
    """With how many GPUs of a machine it fits, up to eight, if it does not with one."""
    smaller: tuple[str, int] | None = None
    """The largest published model that fits, and its bytes, if this one does not."""
    work: Work
    paces: tuple[Pace, Pace, Pace] | None = None
    """Fast, likely and slow, of all processes together; None if there was nothing to measure."""
    shared: Shared | None = None
    """What several processes make of the paces of one."""
    peak_flops: float | None = None
    """Of all devices together in the recipe's precision, as their maker publishes it."""
    disk_free_bytes: int | None = None
    """None of another machine's disk."""
    load_average: float = 0.0
    """How many programs competed for this machine's cores in the minute before; 0 where a GPU computes."""
    dollars_per_hour: float | None = None
    """Of all machines together."""
    made_at: datetime

    @property
    def needed_bytes(self) -> int:
        """Of memory, all in all: an estimate."""
        return self.memory.together + self.process_memory_bytes

    @property
    def micro_batches(self) -> int:
        """Of a step, when a ramp has come to its end."""
        return self.plan.stages[-1].micro_batches

    @property
    def disk_bytes(self) -> dict[str, int]:
        """By what they hold."""
        return predict_disk(self.recipe, self.work, self.text)

    @property
    def new_disk_bytes(self) -> int:
        """Of these, what is not on the disk yet."""
        there = self.disk_bytes["shards"] if self.text.folder else 0
        return sum(self.disk_bytes.values()) - there

    def tokens_per_second(self, pace: Pace) -> float:
        """Of the steps alone."""
        step = self.recipe.batch.tokens_per_step
        return step / pace.step(self.micro_batches)

    def mfu(self, pace: Pace) -> float | None:
        """Share of the device's peak; None if that is not published."""
        used = self.tokens_per_second(pace) * self.recipe.model.flops_per_token()
        return used / self.peak_flops if self.peak_flops else None

    def seconds(self, pace: Pace) -> dict[str, float]:
        """How long the run takes, by what it does meanwhile."""
        return predict_seconds(self.work, pace)

    def ends_at(self, pace: Pace) -> datetime | None:
        """When a run ends that begins now; None beyond the calendar's end."""
        try:
            return self.made_at + timedelta(seconds=sum(self.seconds(pace).values()))
        except OverflowError:
            return None

    def cost(self, pace: Pace) -> Cost | None:
        """None unless it was said what an hour costs."""
        if self.dollars_per_hour is None:
            return None
        return predict_cost(sum(self.seconds(pace).values()), self.work.tokens, self.dollars_per_hour)


# ---------------------------------------------------------------- for programs


def as_json(outlook: Outlook) -> dict[str, Any]:
    """Every figure, by name; what is not known is null."""
    recipe, compute = outlook.recipe, dataclasses.asdict(outlook.recipe.compute)
    found: dict[str, Any] = {
        "recipe": outlook.name,
        "parameters": recipe.model.parameter_count(),
        "device_name": outlook.device_name,
        "measured": outlook.assumption is None,
        "assumption": outlook.assumption,
        **compute,
        "fits": outlook.fits,
        "device_memory_bytes": outlook.device_memory_bytes,
        "needed_bytes": outlook.needed_bytes,
        "needed_bytes_by_use": {**vars(outlook.memory), "process": outlook.process_memory_bytes},
        "peak_memory_bytes": outlook.peak_memory_bytes,
        "evaluation_peak_memory_bytes": outlook.evaluation_peak_memory_bytes,
        "ways_out": [way._asdict() for way in outlook.ways_out],
        "fits_in_processes": outlook.several.options if outlook.several else None,
        "rows_per_micro_batch": outlook.plan.rows_per_micro_batch,
        "micro_batches_per_step": outlook.micro_batches,
        "tokens_per_step": recipe.batch.tokens_per_step,
        "total_steps": outlook.work.steps,
        "total_tokens": outlook.work.tokens,
        "checkpoint_bytes": outlook.work.checkpoint_bytes,
        "disk_bytes_by_use": outlook.disk_bytes,
        "disk_bytes": sum(outlook.disk_bytes.values()),
        "disk_free_bytes": outlook.disk_free_bytes,
        "load_average": outlook.load_average,
    }
    found |= _team(outlook.team)
    found |= _step(outlook.shared) if outlook.shared else {}
    return found | (_forecast(outlook, outlook.paces) if outlook.paces else {})


def _team(team: Team) -> dict[str, Any]:
    """Who trains, and what they divide; the memory above is that of each."""
    cluster = team.cluster
    return {
        "machines": team.machines,
        "processes_per_machine": team.processes_per_machine,
        "all_processes": team.processes,
        "sharding": team.sharding,
        "needed_bytes_by_sharding": team.tried,
        "link_within": dataclasses.asdict(cluster.within) if cluster else None,
        "link_between": dataclasses.asdict(cluster.between) if cluster and cluster.between else None,
    }


def _step(shared: Shared) -> dict[str, Any]:
    """What is predicted of communication: of one process in a full step."""
    step = shared.step
    if step is None:
        return {}
    return {
        "compute_seconds_per_step": step.compute_seconds,
        "communication_seconds_per_step": step.communication_seconds,
        "communication_bytes_per_step": step.communication_bytes,
        "communication_overlaps": step.overlaps,
        "efficiency_range": step.efficiency_range,
        "efficiency_range_by_network": {
            name: other.efficiency_range for name, other in shared.networks.items()
        },
        "faster_options": shared.faster[0] if shared.faster else None,
        "faster_step_seconds": shared.faster[1] if shared.faster else None,
    }


def _forecast(outlook: Outlook, paces: tuple[Pace, Pace, Pace]) -> dict[str, Any]:
    """What follows from how fast the steps are."""
    fast, likely, slow = paces
    seconds = {
        name: outlook.seconds(pace) for name, pace in zip(("fast", "likely", "slow"), paces, strict=True)
    }
    cost, ends_at = outlook.cost(likely), outlook.ends_at(likely)
    return {
        "tokens_per_second": outlook.tokens_per_second(likely),
        "tokens_per_second_range": [outlook.tokens_per_second(slow), outlook.tokens_per_second(fast)],
        "step_seconds": likely.step(outlook.micro_batches),
        "micro_batch_seconds": likely.micro_batch,
        "update_seconds": likely.update,
        "mfu": outlook.mfu(likely),
        "seconds_by_use": seconds["likely"],
        "seconds": sum(seconds["likely"].values()),
        "seconds_range": [sum(seconds["fast"].values()), sum(seconds["slow"].values())],
        "ends_at": ends_at.isoformat(timespec="seconds") if ends_at else None,
        "dollars": cost.run if cost else None,
        "dollars_per_billion_tokens": cost.billion_tokens if cost else None,
    }
