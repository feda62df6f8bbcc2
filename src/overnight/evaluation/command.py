"""The command `overnight evaluate`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from overnight.config import raise_problems
from overnight.distributed.launcher import divide_cores, use_new_rendezvous_store
from overnight.distributed.processes import run_processes
from overnight.distributed.world import count_processes, join_world
from overnight.evaluation import EvaluateConfig
from overnight.evaluation.results import evaluate_models, open_evaluated_models
from overnight.evaluation.tasks import split_names
from overnight.terminal import echo, quiet, quote

TIMEOUT_SECONDS = 1800  # a process may wait this long for the slowest one


def run(config: EvaluateConfig) -> None:
    """Evaluate and print. Several processes share the work, and the main one prints."""
    raise_problems(config.problems(), "overnight evaluate")
    split_names(config.tasks)  # raises for an unknown task before a model is loaded
    with join_world(config.device, TIMEOUT_SECONDS) as world, quiet(not world.is_main):
        with world.raise_together():
            models = open_evaluated_models(config, world.device)
        results = evaluate_models(models, config, world)
        if config.json and world.is_main:
            sys.stdout.write(json.dumps(results.to_dict(), allow_nan=False) + "\n")
        echo(f'next: overnight generate {quote(config.model)} "Once upon a time"')


def evaluate_in_processes(config: EvaluateConfig, words: Sequence[str]) -> int:
    """Run the command with arguments `words` in several processes; returns the exit status."""
    raise_problems(config.problems(), "overnight evaluate")
    split_names(config.tasks)
    count = count_processes(config.processes or 1, config.device)
    divide_cores(count)
    use_new_rendezvous_store()
    return run_processes(words, count, max_restarts=0)
