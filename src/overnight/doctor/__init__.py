"""Checks of a recipe, its data and this machine before a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from overnight.data import BENCHMARK_KINDS
from overnight.recipe import Recipe
from overnight.renamed import Renamed


@dataclass(frozen=True, kw_only=True)
class DoctorConfig(Recipe):
    """A recipe with its options, and the options of the checks."""

    full: bool = False
    """Check all of the text; by default a sample of a long text."""
    benchmarks: tuple[str, ...] = ()
    """Benchmark files (.jsonl, .txt, .tokens) to search for in the training text."""
    baseline: str | None = None
    """A Hugging Face GPT-2, folder or name, whose logits are compared with those of Transformers."""
    only: tuple[str, ...] = ()
    """Names of the checks to run; all if left out."""
    json: bool = False
    """Print one JSON object to standard output."""

    RENAMED: ClassVar[Renamed] = Recipe.RENAMED.also(thorough="full", against="baseline")

    def problems(self) -> list[str]:
        """Invalid values, one sentence each; [] if there are none."""
        return super().problems() + [
            f"benchmarks={path} is not an existing {', '.join(BENCHMARK_KINDS)} file; give its path"
            for path in self.benchmarks
            if not path.lower().endswith(BENCHMARK_KINDS) or not Path(path).is_file()
        ]
