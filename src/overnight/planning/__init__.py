"""Memory, time, disk and money that a recipe needs, measured here or estimated for another device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from overnight.recipe import Recipe
from overnight.renamed import Renamed


@dataclass(frozen=True, kw_only=True)
class PlanConfig(Recipe):
    """A recipe with its options, and the options of the plan."""

    device_type: str | None = None
    """Estimate for another device (h200, a100-80gb, t4) instead of measuring this machine."""
    machines: int = 1
    """Number of machines, each with the same number of processes; the plan is then a prediction."""
    network: Literal["100g", "400g", "8x400g"] = "400g"
    """The network between machines: one adapter of 100 or 400 Gb/s in each, or eight of 400 Gb/s."""
    dollars_per_hour: float | None = None
    """Price of one machine; the plan then shows the price of the run."""
    seconds: float = 40.0
    """Approximate duration of the measurement."""
    json: bool = False
    """Print one JSON object to standard output."""

    RENAMED: ClassVar[Renamed] = Recipe.RENAMED.also(on="device_type")

    def problems(self) -> list[str]:
        """Invalid values, one sentence each; [] if there are none."""
        found = super().problems()
        for name in ("dollars_per_hour", "seconds"):
            if (value := getattr(self, name)) is not None and not 0 < value < float("inf"):
                found.append(f"{name}={value} must be greater than 0")
        if self.device_type is not None and self.compute.device is not None:
            found.append(
                f"give only one of device={self.compute.device}, on this machine, and "
                f"device_type={self.device_type}, another device"
            )
        processes = self.compute.processes
        if self.device_type is not None and processes == "auto":
            found.append(
                f"processes=auto counts this machine's GPUs, device_type={self.device_type} is another's: "
                "give a number"
            )
        for name, count in (("machines", self.machines), ("processes", processes)):
            if isinstance(count, int) and count < 1:
                found.append(f"{name}={count} must be at least 1")
        return found
