"""The command `overnight doctor`: checks a recipe before its run, with the functions that train it."""

from __future__ import annotations

import functools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from overnight.config import nearest, raise_problems
from overnight.doctor import DoctorConfig, data_checks, model_checks, run_checks, step_checks
from overnight.doctor.check import (
    COLUMNS,
    CheckResult,
    checks_to_json,
    describe_check,
    run_check,
    skipped,
    summarize_checks,
)
from overnight.doctor.context import DoctorContext
from overnight.recipe import changed_options, load_recipe, plain_recipe
from overnight.terminal import echo, quiet, shell_command, wrap

CHECKS: dict[str, Callable[[DoctorContext], CheckResult]] = {
    "shards": data_checks.check_shards,
    "tokenizer": data_checks.check_tokenizer,
    "boundaries": data_checks.check_boundaries,
    "disjoint": data_checks.check_disjoint,
    "contamination": data_checks.check_contamination,
    "initial-loss": model_checks.check_initial_loss,
    "gradients": model_checks.check_gradients,
    "causality": model_checks.check_causality,
    "rows": data_checks.check_rows,
    "accumulation": step_checks.check_accumulation,
    "overfit": model_checks.check_overfit,
    "generation": model_checks.check_generation,
    "checkpoint": model_checks.check_saving,
    "precision": step_checks.check_precision,
    "compiled": step_checks.check_compiled,
    "processes": step_checks.check_processes,
    "reference": model_checks.check_reference,
    "schedule": run_checks.check_schedule,
    "learning-rate": run_checks.check_peak,
    "memory": run_checks.check_memory,
    "disk": run_checks.check_disk,
    "time": run_checks.check_time,
}
"""All checks, in their order."""
DEPENDS_ON = dict.fromkeys(("accumulation", "overfit", "checkpoint", "processes"), "gradients")
"""Check -> the check that must pass first: without gradients no step can be taken."""


def run(config: DoctorConfig, name: str) -> int:
    """Check the recipe `name` with the settings in `config`; returns 1 if a check failed, else 0.

    Writes only the data that `overnight train` would prepare. Raises ValueError for a recipe that can't
    be trained at all, and PermissionError for a path that can't be used.
    """
    unknown = [
        f"only={each} is not a check{nearest(each, CHECKS)}" for each in config.only if each not in CHECKS
    ]
    raise_problems(config.problems() + unknown, f"recipe {config.run_name}")
    started_at = time.perf_counter()
    results: list[CheckResult] = []
    with tempfile.TemporaryDirectory(prefix="overnight-doctor-") as scratch:
        context = DoctorContext(config, name, Path(scratch))
        if not config.json:
            echo("\n".join(describe_context(context)))
        for result in check_recipe(context, config.only or CHECKS):
            results.append(result)
            if not config.json:
                echo("\n".join(describe_check(result)))
    seconds = time.perf_counter() - started_at
    if config.json:
        sys.stdout.write(json.dumps(checks_to_json(name, results, seconds), indent=2) + "\n")
    echo(summarize_checks(results, seconds))
    words = [name, *changed_options(plain_recipe(config), load_recipe(name))]
    failed = [result.name for result in results if result.passed is False]
    if failed:
        echo(f"fix {' and '.join(failed)}, then: {shell_command('doctor', *words)}")
        return 1
    echo(f"next: {shell_command('train', *words)}")
    return 0


def describe_context(context: DoctorContext) -> list[str]:
    """Lines with the recipe, the device, and the reductions of the tiny run."""
    where = f"{context.name} on {context.world.device}"
    with quiet(True):
        reductions = context.tiny_run.reductions
    words = f"the checked model has {reductions}; memory, disk and time are those of the whole run"
    return [where, *wrap(words, COLUMNS)] if reductions else [where]


def check_recipe(context: DoctorContext, names: Collection[str]) -> Iterator[CheckResult]:
    """The results of these checks, in the order of CHECKS."""
    failed: set[str] = set()
    for name, function in CHECKS.items():
        if name not in names:
            continue
        check = functools.partial(function, context)
        if (needed := DEPENDS_ON.get(name)) in failed:
            check = functools.partial(skipped, f"it can't be checked before {needed} passes")
        with quiet(True):
            result = run_check(name, check)
        if result.passed is False:
            failed.add(name)
        yield result
