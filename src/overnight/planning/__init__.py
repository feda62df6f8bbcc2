"""What a recipe needs: memory, time, disk and money, measured here or computed for another device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from overnight.config import Renamed
from overnight.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class PlanConfig(Recipe):
    """A recipe, as `overnight train` takes it, and what is asked about it."""

    device_type: str | None = None
    """Estimate for a device that is not here (h200, a100-80gb, t4) instead of measuring this machine."""
    machines: int = 1
    """How many machines, each with as many processes; the plan is then a prediction."""
    network: Literal["100g", "400g", "8x400g"] = "400g"
    """Between machines: an adapter of 100 or 400 Gb/s in each, or eight of 400 Gb/s."""
    dollars_per_hour: float | None = None
    """What a machine costs; the plan then says what the run costs."""
    seconds: float = 40.0
    """About how long to measure."""
    json: bool = False
    """Print one JSON object to standard output."""

    RENAMED: ClassVar[Renamed] = Recipe.RENAMED.also(on="device_type")

    def problems(self) -> list[str]:
        """What is wrong with these values, one plain sentence each; [] if nothing."""
        found = super().problems()
        for name in ("dollars_per_hour", "seconds"):
            if (value := getattr(self, name)) is not None and not 0 < value < float("inf"):
                found.append(f"{name}={value} must be greater than 0")
        if self.device_type is not None and self.compute.device is not None:
            found.append(
                f"device={self.compute.device} is of this machine, device_type={self.device_type} of another: give one"
            )
        processes = self.compute.processes
        if self.device_type is not None and processes == "auto":
            found.append(
                f"processes=auto counts this machine's GPUs, and device_type={self.device_type} is another: give a number"
            )
        for name, count in (("machines", self.machines), ("processes", processes)):
            if isinstance(count, int) and count < 1:
                found.append(f"{name}={count} must be at least 1")
        return found
