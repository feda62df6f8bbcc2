"""The command `overnight doctor`: a recipe checked before the night, through the functions that train it."""

from __future__ import annotations

import dataclasses
import json
import random
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from overnight.settings import nearest, raise_problems
from overnight.stages.doctor_page import as_json, describe, summarize
from overnight.stages.recipe import Recipe
from overnight.terminal import hushed, say

if TYPE_CHECKING:
    from overnight.checks.check import Check, Finding

OF_TEXT = ("shards", "tokenizer", "boundaries", "disjoint", "contamination")
OF_MODEL = (
    *("initial-loss", "gradients", "causality", "rows", "accumulation", "overfit", "generation"),
    *("checkpoint", "precision", "compiled", "processes", "reference"),
)
OF_RUN = ("schedule", "learning-rate", "memory", "disk", "time")
CHECKS = (*OF_TEXT, *OF_MODEL, *OF_RUN)
NEEDS = dict.fromkeys(("accumulation", "overfit", "checkpoint", "processes"), "gradients")
"""What can't be told before another check has passed: without its gradients no step can be taken."""
BENCHMARK_KINDS = (".jsonl", ".txt", ".tokens")


@dataclass(frozen=True, kw_only=True)
class DoctorConfig(Recipe):
    """A recipe, as `overnight train` takes it, and how closely to look."""

    thorough: bool = False
    """Look at all of the text, not at a sample where it is long."""
    benchmarks: tuple[str, ...] = ()
    """Benchmarks' files (.jsonl, .txt, .tokens): does the training text hold passages of them?"""
    against: str | None = None
    """A Hugging Face GPT-2, folder or name: does this package compute the logits Transformers computes?"""
    only: tuple[str, ...] = ()
    """Do these checks only, by their names; all if left out."""
    json: bool = False
    """Print one JSON object to standard output."""

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


def run(config: DoctorConfig, name: str) -> int:
    """Check the recipe `name`, changed as `config` has it; returns 0 if all is well, 1 if a check failed.

    Writes nothing but what `overnight train` would prepare first. Raises ValueError for what could not be
    trained at all.
    """
    raise_problems(config.problems(), f"recipe {config.run_name}")
    started_at = time.perf_counter()
    done: dict[str, Check] = {}
    with tempfile.TemporaryDirectory(prefix="overnight-doctor-") as scratch, _left_as_found():
        from overnight.stages.examination import Examination, open_examination

        examination: Examination = open_examination(config, name, Path(scratch))
        if not config.json:
            say("\n".join(examination.describe()))
        for check in perform_all(examination.checks(), config.only or CHECKS):
            done[check.name] = check
            if not config.json:
                say("\n".join(describe(check)))
    seconds = time.perf_counter() - started_at
    if config.json:
        sys.stdout.write(json.dumps(as_json(name, done.values(), seconds), indent=2) + "\n")
    failed = [check.name for check in done.values() if check.finding.passed is False]
    say(summarize(done.values(), seconds))
    words = shlex.join([name, *changed_words(config, name)])
    say(
        f"mend {' and '.join(failed)}, then: overnight doctor {words}"
        if failed
        else f"next: overnight train {words}"
    )
    return 1 if failed else 0


def perform_all(checks: Mapping[str, Callable[[], Finding]], names: tuple[str, ...]) -> Iterator[Check]:
    """Do the checks of these names, in their own order, one by one."""
    from overnight.checks.check import Check, perform, skipped

    failed: set[str] = set()
    for name in CHECKS:
        if name not in names:
            continue
        if NEEDS.get(name) in failed:
            yield Check(name, skipped(f"it can't be told before {NEEDS[name]} is mended"), 0.0)
            continue
        with hushed(True):
            check = perform(name, checks[name])
        if check.finding.passed is False:
            failed.add(name)
        yield check


def changed_words(config: DoctorConfig, name: str) -> list[str]:
    """The options by which the recipe was changed, for the next command."""
    from overnight.stages.options import changed_options
    from overnight.stages.recipe import load_recipe

    recipe = Recipe(**{field.name: getattr(config, field.name) for field in dataclasses.fields(Recipe)})
    return changed_options(recipe, load_recipe(name))


@contextmanager
def _left_as_found() -> Iterator[None]:
    """Afterwards Python's and torch's noise, torch's threads and its precision are what they were."""
    import torch

    threads, products = torch.get_num_threads(), torch.get_float32_matmul_precision()
    noise = random.getstate()  # torch's launcher draws from it
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(noise)
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(products)
