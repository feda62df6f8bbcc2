"""The record of a plan: the resolved recipe, its machine, and the figures found."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from overnight.planning.communication import Communication, predict_communication, scale_costs
from overnight.planning.estimate import (
    CostRange,
    Forecast,
    RunCounts,
    TokenCounts,
    forecast_run,
    predict_disk,
)
from overnight.planning.network import ParallelLayout
from overnight.recipe import Resolved
from overnight.training import Sharding
from overnight.training.memory import FitOption, MemoryEstimate


@dataclass(kw_only=True)
class Plan:
    """The resolved recipe, its machine, and the figures of the plan, which are filled in step by step."""

    name: str
    """The recipe's name, as the user gave it."""
    resolved: Resolved
    text: TokenCounts
    counts: RunCounts
    layout: ParallelLayout
    needed_bytes_by_sharding: dict[Sharding, int]
    """Memory of one process with each sharding considered, the chosen one last; {} for one process."""
    device_name: str
    """All devices, as text."""
    device_memory_bytes: int | None
    """Memory available to one process; None for a device of another machine that shares its memory."""
    peak_flops: float | None
    """Published peak FLOP/s of one device in the recipe's precision."""
    disk_free_bytes: int | None
    """Free bytes on the disk; None for another machine."""
    load_average: float = 0.0
    """Load average of the last minute from other programs; 0 if the run computes on a GPU."""
    dollars_per_hour: float | None = None
    """Price of all machines."""
    memory: MemoryEstimate
    """Memory of one process."""
    fits: bool | None
    """True if the run fits; None if the device's memory is unknown."""
    fit_options: tuple[FitOption, ...] = ()
    """Options that make it fit, if it does not."""
    fit_in_processes: FitOption | None = None
    """The number of GPUs of one machine that it fits into, up to eight, if it does not fit into one."""
    largest_fitting: tuple[str, int] | None = None
    """The largest published model that fits, and its bytes, if this one does not."""
    assumption: str | None = None
    """What an estimate is based on; None if the machine was measured."""
    process_memory_bytes: int = 0
    """Other memory of a process on a CPU, mainly torch and its libraries."""
    peak_memory_bytes: int | None = None
    """Measured peak in training."""
    evaluation_peak_memory_bytes: int | None = None
    """Measured peak in training and evaluation."""
    forecast: Forecast | None = None
    """Speed and duration; None if no speed was measured or assumed."""
    communication: Communication | None = None
    """Communication of a step; None for a single process, and if it is unknown."""

    @property
    def needed_bytes(self) -> int:
        """Estimated memory of one process."""
        return self.memory.together + self.process_memory_bytes

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a full step, after any batch ramp."""
        return self.resolved.plan.stages[-1].micro_batches

    @property
    def disk_bytes(self) -> dict[str, int]:
        """Bytes on the disk, by use."""
        return predict_disk(self.resolved.recipe, self.counts, self.text)

    @property
    def new_disk_bytes(self) -> dict[str, int]:
        """The bytes of `disk_bytes` that are still to be written."""
        return {
            use: count for use, count in self.disk_bytes.items() if use != "shards" or not self.text.folder
        }

    def forecast_with(self, costs: CostRange) -> Forecast:
        """The forecast from the costs of one process."""
        peak = self.peak_flops and self.peak_flops * self.layout.processes
        together = scale_costs(self.layout, self.resolved.model, costs)
        return forecast_run(self.resolved, self.counts, together, peak, self.dollars_per_hour)

    def add_forecast(self, costs: CostRange) -> None:
        """Add the forecast and the communication, from the costs of one process."""
        self.forecast = self.forecast_with(costs)
        self.communication = predict_communication(
            self.layout, self.resolved, costs[1], self.device_memory_bytes
        )


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """Every figure by name; null where it is unknown."""
    layout, resolved, counts, disk = plan.layout, plan.resolved, plan.counts, plan.disk_bytes
    same = ("device_name", "assumption", "fits", "device_memory_bytes", "needed_bytes", "load_average")
    measured = ("peak_memory_bytes", "evaluation_peak_memory_bytes", "disk_free_bytes")
    found = {
        "recipe": plan.name,
        "parameters": resolved.model.parameter_count(),
        "measured": plan.assumption is None,
        **dataclasses.asdict(resolved.recipe.compute),
        **{name: getattr(plan, name) for name in (*same, *measured)},
        "needed_bytes_by_use": {**dataclasses.asdict(plan.memory), "process": plan.process_memory_bytes},
        "ways_out": [option._asdict() for option in plan.fit_options],
        "fits_in_processes": plan.fit_in_processes and plan.fit_in_processes.options,
        "micro_batch_size": resolved.plan.micro_batch_size,
        "micro_batches_per_step": plan.micro_batches,
        "tokens_per_step": resolved.recipe.batch.tokens_per_step,
        "total_steps": counts.steps,
        "total_tokens": counts.tokens,
        "checkpoint_bytes": counts.checkpoint_bytes,
        "disk_bytes_by_use": disk,
        "disk_bytes": sum(disk.values()),
        "machines": layout.machines,
        "processes_per_machine": layout.processes_per_machine,
        "all_processes": layout.processes,
        "sharding": layout.sharding,
        "needed_bytes_by_sharding": plan.needed_bytes_by_sharding,
        "link_within": None if layout.is_on_cpu else dataclasses.asdict(layout.within),
        "link_between": layout.between and dataclasses.asdict(layout.between),
    }
    if plan.communication:
        found |= {
            **dataclasses.asdict(plan.communication),
            "efficiency_range": plan.communication.efficiency_range,
        }
    return found | (dataclasses.asdict(plan.forecast) if plan.forecast else {})
