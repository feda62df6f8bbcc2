"""The command `overnight evaluate`: a model's loss on text it has not seen, and what it makes of tasks."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overnight.config import raise_problems
from overnight.conversion.open_model import OpenedModel, open_model
from overnight.data import DataConfig
from overnight.distributed.launcher import use_new_rendezvous_store
from overnight.distributed.machine import divide_cores
from overnight.distributed.processes import run_processes
from overnight.distributed.world import count_processes, join_world
from overnight.evaluation import EvaluateConfig
from overnight.evaluation.harness import check_harness, harness_scores
from overnight.evaluation.held_out import (
    METRICS,
    ValidationSet,
    check_same_tokenizer,
    measure_validation,
    open_validation_set,
)
from overnight.evaluation.perplexity import TextLoss, sum_up
from overnight.evaluation.run_tasks import (
    TaskNames,
    as_values,
    describe_score,
    evaluate_and_score,
    open_tasks,
    scores_to_json,
    split_names,
)
from overnight.evaluation.scores import Score, score_text
from overnight.recipe import Recipe, read_recipe_of
from overnight.terminal import echo, quiet

TIMEOUT_SECONDS = 1800  # a process may judge for so long while another waits for it


@dataclass(frozen=True)
class EvaluatedModel:
    """A model to be judged, and how."""

    opened: OpenedModel
    name: str
    recipe: Recipe | None
    precision: str
    """A run's own; of any other model fp32."""


def run(config: EvaluateConfig) -> None:
    """Evaluate and print. Of processes started together each does its share, and the main one speaks."""
    raise_problems(config.problems(), "overnight evaluate")
    names = split_names(config.tasks)
    with join_world(config.device, TIMEOUT_SECONDS) as world, quiet(not world.is_main):
        with world.raise_together():
            subjects = open_evaluated_models(config, world.device)
            held_out = open_validation(config, subjects) if names.validation else None
            check_harness_tasks(config, names)
            tasks = open_tasks(names.own, config.task_files, config.examples, config.stride)
        values: dict[str, Any] = {"model": config.model, "precision": subjects[0].precision}
        scores: list[Score] = []
        if held_out is not None:
            measured = [
                measure_validation(held_out, each.opened.model, each.precision, world) for each in subjects
            ]
            values |= _summary(measured[0])
            scores += score_validation(held_out, measured)
            print_scores(scores, f"of {held_out.dataset.folder}, in {subjects[0].precision}")
        for task in tasks:
            sides = [
                evaluate_and_score(task, each.opened.model, each.opened.tokenizer, each.precision, world)
                for each in subjects
            ]
            found = task.score(sides[0], sides[1] if len(sides) > 1 else None)
            scores += found
            print_scores(found)
        values["tasks"] = as_values(scores)
        if names.harness and world.is_main:
            values["lm_eval"] = evaluate_with_harness(config, names, subjects[0])
        if config.json and world.is_main:
            sys.stdout.write(json.dumps(values, allow_nan=False) + "\n")
        echo(f'next: overnight generate {config.model} "Once upon a time"')


def evaluate_in_processes(config: EvaluateConfig, words: Sequence[str]) -> int:
    """Let several processes on this machine each run the command of these words; returns the exit status."""
    assert config.processes is not None
    raise_problems(config.problems(), "overnight evaluate")
    split_names(config.tasks)
    count = count_processes(config.processes, config.device)
    divide_cores(count)
    use_new_rendezvous_store()
    return run_processes(words, count, max_restarts=0)


def open_evaluated_models(config: EvaluateConfig, device: str) -> list[EvaluatedModel]:
    """The model, and the other one if there is one."""
    subjects = []
    for name in filter(None, (config.model, config.baseline)):
        opened = open_model(name)
        opened.model.to(device)
        recipe = read_recipe_of(opened.run) if opened.run else None
        precision = (recipe.compute.precision if recipe else None) or "fp32"
        subjects.append(EvaluatedModel(opened, name, recipe, precision))
    return subjects


def open_validation(config: EvaluateConfig, subjects: list[EvaluatedModel]) -> ValidationSet:
    """Text that every model reads in its own tokens."""
    recipe = subjects[0].recipe
    packing = recipe.data.packing if recipe else "stream"
    asked = DataConfig(data=config.data, packing=packing) if config.data else _own_data(recipe)
    held_out = open_validation_set(asked, config.evaluation_tokens, config.stride)
    for each in subjects:
        check_same_tokenizer(held_out, each.opened.tokenizer, each.name, each.opened.tokenizer_folder)
    return held_out


def score_validation(held_out: ValidationSet, measured: list[TextLoss]) -> list[Score]:
    """The losses in all units, beside what others reached on such text."""
    against = measured[1] if len(measured) > 1 else None
    kind = "pieces" if held_out.stride is None else "windows"
    first, *others = score_text("validation", METRICS, measured[0], against, kind)
    return [dataclasses.replace(first, references=held_out.references()), *others]


def print_scores(scores: list[Score], where: str | None = None) -> None:
    """The table of one task."""
    for line in describe_score(scores):
        echo(line)
    if where is not None:
        echo(f"  {where}")


def check_harness_tasks(config: EvaluateConfig, names: TaskNames) -> None:
    """Raise ValueError for a task that lm-evaluation-harness does not know, or if it is not installed."""
    if names.harness:
        check_harness(names.harness, _folder(config))


def evaluate_with_harness(
    config: EvaluateConfig, names: TaskNames, subject: EvaluatedModel
) -> list[dict[str, Any]]:
    """Tasks of lm-evaluation-harness, told as it tells them."""
    opened, folder = subject.opened, _folder(config)
    found = harness_scores(
        opened.model, opened.tokenizer, names.harness, subject.precision, folder, config.examples
    )
    for each in found:
        echo(str(each))
    return [scores_to_json(dataclasses.asdict(each)) for each in found]


def _folder(config: EvaluateConfig) -> Path | None:
    return Path(config.task_files) if config.task_files is not None else None


def _summary(measured: TextLoss) -> dict[str, Any]:
    summary: dict[str, Any] = scores_to_json(dataclasses.asdict(sum_up(measured)))
    return summary


def _own_data(recipe: Recipe | None) -> DataConfig:
    """What a run was trained on."""
    if recipe is None:
        raise ValueError(
            "this model does not say what it was trained on: name prepared text with --data FOLDER"
        )
    return recipe.data
