"""A step of the work as a step of datatrove's pipelines. Imports datatrove."""

from __future__ import annotations

from pathlib import Path

from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from overnight.data.executors import Step


class WorkStep(PipelineStep):  # type: ignore[misc]  # untyped there
    """Does a rank's share. Pickled by reference: its machine has the same package."""

    type, name = "overnight", "share"

    def __init__(self, step: Step, place: Path) -> None:
        super().__init__()
        self.step, self.place = step, str(place)

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Nothing is read from the step before, and nothing handed on: all is in the folder."""
        self.step(Path(self.place), rank, world_size)
        yield from data or ()
