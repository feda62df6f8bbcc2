"""Checks of a recipe, its data and this machine before a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from overnight.config import Renamed, nearest
from overnight.preparation.prepare_config import BENCHMARK_KINDS
from overnight.recipe import Recipe

DATA_CHECKS = ("shards", "tokenizer", "boundaries", "disjoint", "contamination")


OF_MODEL = (
    *("initial-loss", "gradients", "causality", "rows", "accumulation", "overfit", "generation"),
    *("checkpoint", "precision", "compiled", "processes", "reference"),
)


OF_RUN = ("schedule", "learning-rate", "memory", "disk", "time")


CHECKS = (*DATA_CHECKS, *OF_MODEL, *OF_RUN)


@dataclass(frozen=True, kw_only=True)
class DoctorConfig(Recipe):
    """A recipe, as `overnight train` takes it, and how closely to look."""

    full: bool = False
    """Look at all of the text, not at a sample where it is long."""
    benchmarks: tuple[str, ...] = ()
    """Benchmarks' files (.jsonl, .txt, .tokens): does the training text hold passages of them?"""
    baseline: str | None = None
    """A Hugging Face GPT-2, folder or name: does this package compute the logits Transformers computes?"""
    only: tuple[str, ...] = ()
    """Do these checks only, by their names; all if left out."""
    json: bool = False
    """Print one JSON object to standard output."""

    RENAMED: ClassVar[Renamed] = Recipe.RENAMED.also(thorough="full", against="baseline")

    def problems(self) -> list[str]:
        """What is wrong with these values, one plain sentence each; [] if nothing."""
        found = super().problems()
        found += [
            f"only={name} is no check{nearest(name, CHECKS)}" for name in self.only if name not in CHECKS
        ]
        found += [
            f"benchmarks: {path} is no {', '.join(BENCHMARK_KINDS)} file that is there; give its path"
            for path in self.benchmarks
            if not path.lower().endswith(BENCHMARK_KINDS) or not Path(path).is_file()
        ]
        return found
