"""Evaluates a model, and a baseline if there is one, on validation text and tasks."""

from __future__ import annotations

import dataclasses
import html
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby
from typing import Any

import torch

from overnight.conversion.open_model import OpenedModel, open_model
from overnight.data import DataConfig
from overnight.data.dataset import is_same_data
from overnight.distributed.world import SINGLE_PROCESS, World
from overnight.evaluation import EvaluateConfig
from overnight.evaluation.harness import HarnessScore, check_harness, harness_scores
from overnight.evaluation.held_out import ValidationSet, open_validation_set
from overnight.evaluation.passages import check_finite
from overnight.evaluation.perplexity import Evaluation
from overnight.evaluation.scores import (
    LEAST_EXAMPLES,
    AccuracyComparison,
    Interval,
    LossComparison,
    Score,
)
from overnight.evaluation.tasks import VALIDATION, evaluate_cached, open_task, split_names
from overnight.recipe import Recipe, read_recipe_of
from overnight.run_directory import RunDirectory, finite_values
from overnight.terminal import echo


@dataclass(frozen=True)
class EvaluatedModel:
    """A model, and how to evaluate it."""

    opened: OpenedModel
    name: str
    recipe: Recipe | None
    """The run's recipe; None for any other model."""


@dataclass(kw_only=True)
class EvaluationResults:
    """The results of one model."""

    model: str
    precision: str
    """Precision of the matrix products, of the baseline too."""
    validation: Evaluation | None = None
    scores: list[Score] = field(default_factory=list)
    harness: list[HarnessScore] | None = None
    """None if no task of lm-evaluation-harness was named."""

    def to_dict(self) -> dict[str, Any]:
        """Values for JSON; NaN and infinity are None."""
        values: dict[str, Any] = {"model": self.model, "precision": self.precision}
        if self.validation is not None:
            values |= dataclasses.asdict(self.validation)
        values["tasks"] = [dataclasses.asdict(score) for score in self.scores]
        if self.harness is not None:
            values["lm_eval"] = [dataclasses.asdict(score) for score in self.harness]
        found: dict[str, Any] = finite_values(values)
        return found

    def __str__(self) -> str:
        return "\n".join([*describe_scores(self.scores, self.precision), *map(str, self.harness or ())])

    def _repr_html_(self) -> str:
        """The tables, for a notebook."""
        return f"<pre>{html.escape(str(self))}</pre>"


def evaluate_opened(opened: OpenedModel, config: EvaluateConfig) -> EvaluationResults:
    """Evaluate a model that is already open, in this process. Raises ValueError for an invalid task."""
    return evaluate_models([_evaluated_model(opened, config.model)], config, SINGLE_PROCESS)


def open_evaluated_models(config: EvaluateConfig, device: str) -> list[EvaluatedModel]:
    """The model, and the baseline if one is named, on `device`."""
    models = []
    for name in (config.model, *filter(None, [config.baseline])):
        opened = open_model(name)
        opened.model.to(device)
        models.append(_evaluated_model(opened, name))
    return models


def _evaluated_model(opened: OpenedModel, name: str) -> EvaluatedModel:
    recipe = read_recipe_of(opened.run) if opened.run else None
    return EvaluatedModel(opened, name, recipe)


def _open_validation(config: EvaluateConfig, models: Sequence[EvaluatedModel]) -> ValidationSet:
    """The validation text. Raises ValueError unless it is encoded with every model's tokenizer."""
    recipe = models[0].recipe
    if config.data:
        data = DataConfig(data=config.data, packing=recipe.data.packing if recipe else "stream")
    elif recipe:
        data = recipe.data
    else:
        raise ValueError("this model's training data is unknown: give prepared data with --data FOLDER")
    validation = open_validation_set(data, config.evaluation_tokens, config.stride)
    if not config.data and models[0].opened.run:
        _require_same_data(RunDirectory(models[0].opened.run), validation)
    for each in models:
        validation.check_tokenizer(each.opened.tokenizer, each.name, each.opened.tokenizer_folder)
    return validation


def _require_same_data(run: RunDirectory, validation: ValidationSet) -> None:
    """Raise ValueError if the folder that a run names holds other data than the run was trained on."""
    try:
        before = json.loads(run.data.read_text(encoding="utf-8"))
        is_same = is_same_data(before, json.loads(json.dumps(validation.dataset.record())))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return  # nothing is recorded to compare with
    if not is_same:
        raise ValueError(
            f"the data in {validation.dataset.folder} is not the data that {run.path} was trained on: put "
            "that data back, or name the text to evaluate on with --data"
        )


def evaluate_models(
    models: Sequence[EvaluatedModel], config: EvaluateConfig, world: World
) -> EvaluationResults:
    """The first model's results, compared with the second's if there is one; each table is printed.

    All inputs are opened before anything is evaluated. Raises ValueError for one that cannot be, and
    FloatingPointError for a loss that is not finite.
    """
    torch.set_float32_matmul_precision("highest")  # training in this process may have allowed less
    model, names, precision = models[0], split_names(config.tasks), config.precision
    with world.raise_together():
        validation = _open_validation(config, models) if names.validation else None
        if names.harness:
            check_harness(names.harness, config.task_files)
        tasks = [open_task(name, config.task_files, config.examples, config.stride) for name in names.own]
    results = EvaluationResults(model=model.name, precision=precision)
    if validation is not None:
        losses = [validation.measure(each.opened.model, precision, world) for each in models]
        for each, loss in zip(models, losses, strict=True):
            check_finite(loss.nats, f"{each.name} on {VALIDATION}", precision)
        results.validation = losses[0].summary()
        results.scores += validation.score(losses)
        for line in describe_scores(results.scores, precision):
            echo(line)
        echo(f"  of {validation.dataset.folder}")
    for task in tasks:
        found = []
        for each in models:
            opened = each.opened
            found.append(evaluate_cached(task, opened.model, opened.tokenizer, precision, world))
            check_finite(chain.from_iterable(found[-1].numbers), f"{each.name} on {task.name}", precision)
        scores = task.score(found)
        results.scores += scores
        for line in describe_scores(scores, precision):
            echo(line)
    if names.harness and world.is_main:
        opened, folder = model.opened, config.task_files
        results.harness = harness_scores(
            opened.model, opened.tokenizer, names.harness, precision, folder, config.examples
        )
        for score in results.harness:
            echo(str(score))
    return results


# ---------------------------------------------------------------- text and JSON


def describe_scores(scores: Sequence[Score], precision: str) -> Iterator[str]:
    """The lines of one table for each task, at most 80 columns wide."""
    for _, group in groupby(scores, key=lambda score: score.task):
        yield from _describe_task(list(group), precision)


def _describe_task(scores: Sequence[Score], precision: str) -> Iterator[str]:
    first, last = scores[0], scores[-1].against
    chance = "" if first.chance is None else f", chance {first.chance:.2f}"
    yield f"{first.task}: {first.examples:,} {first.kind}{chance}, in {precision}"
    for score in scores:
        interval = f"no interval from fewer than {LEAST_EXAMPLES} {first.kind}"
        if score.interval:
            interval = f"95% {_interval(score.interval)} ({score.interval.method})"
        yield _line(score.metric, _number(score.value), interval)
        source = None
        for reference in score.references:
            cited = f" ({reference.source})" if reference.source != source else ""
            source = reference.source
            yield _line("", f"{reference.value:g}", f"{reference.whose}{cited}")
        if isinstance(score.against, AccuracyComparison):
            differing = f"correct only here {score.against.only_here:,}, there {score.against.only_there:,}"
            yield _line("", _number(score.against.value), f"the baseline; {differing}")
            yield _line("", "", f"p = {score.against.probability:.3g} (McNemar)")
        elif score.against is not None:
            yield _line("", _number(score.against.value), "the baseline")
    if isinstance(last, LossComparison):
        if not last.is_paired:
            yield "  no paired test: the baseline reads the text in different windows"
        elif last.difference is None:
            yield f"  no paired test of fewer than {LEAST_EXAMPLES} {first.kind}"
        else:
            unit = "word" if first.kind == "passages" else "token"
            ends = f"{last.difference.low:+.4f} to {last.difference.high:+.4f}"
            yield f"  difference to the baseline: {ends} nats per {unit} (paired bootstrap)"


def describe_briefly(score: Score) -> str:
    """One line: hellaswag accuracy_per_token 0.2912 (0.2713 to 0.3120)."""
    interval = f" ({_interval(score.interval)})" if score.interval else ""
    return f"{score.task} {score.metric} {_number(score.value)}{interval}"


def _interval(interval: Interval) -> str:
    return f"{_number(interval.low)} to {_number(interval.high)}"


def _line(name: str, number: str, text: str) -> str:
    return f"  {name:<23}{number:<8} {text}"


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}" if abs(value) < 100_000 else f"{value:.3g}"
