"""The command `overnight evaluate`: a model's loss on text it has not seen."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from overnight.stages.tasks import VALIDATION, as_values, describe, judge_tasks, split_names
from overnight.terminal import progress, say

if TYPE_CHECKING:  # --help is shown without torch
    from collections.abc import Iterator

    from overnight.data.stream import Batch
    from overnight.evaluation.language_model import Evaluation
    from overnight.stages.materials import DataConfig
    from overnight.stages.models import OpenedModel
    from overnight.stages.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Validation loss, perplexity and bits per byte of a model on prepared text; accuracy on tasks."""

    model: Positional[str]
    """A run, a checkpoint, a Hugging Face folder or name."""
    data: str | None = None
    """A folder that `overnight prepare` wrote; the run's own if left out."""
    evaluation_tokens: int | None = None
    """How many validation tokens; all of them if left out."""
    tasks: tuple[str, ...] = (VALIDATION,)
    """validation, hellaswag, arc-easy, arc-challenge, openbookqa, piqa, boolq, copa; spaces or commas
    between."""
    task_files: str | None = None
    """A folder that holds the tasks' official files; fetched once if left out."""
    against: str | None = None
    """Another model, judged on the same questions."""
    device: str | None = None
    """cpu, cuda, cuda:1, mps; the best one found if left out."""
    json: bool = False
    """Print one JSON object to standard output."""


def run(config: EvaluateConfig) -> None:
    """Evaluate and print, a run in the precision it was trained in, any other model in fp32."""
    from overnight.stages.models import open_model
    from overnight.stages.train import load_resumed
    from overnight.world import open_world

    if config.evaluation_tokens is not None and config.evaluation_tokens < 1:
        raise ValueError(f"--evaluation-tokens={config.evaluation_tokens} must be at least 1, or left out")
    names = split_names(config.tasks)
    tasks = [name for name in names if name != VALIDATION]
    if config.against is not None and not tasks:
        raise ValueError("--against compares two models on tasks: name some with --tasks")
    device = open_world(config.device).device
    opened = open_model(config.model)
    opened.model.to(device)
    recipe = load_resumed(opened.run) if opened.run else None
    precision = (recipe.compute.precision if recipe else None) or "fp32"
    values: dict[str, Any] = {"model": config.model, "precision": precision}
    if VALIDATION in names:
        values |= dataclasses.asdict(judge_validation(config, opened, recipe, precision))
    if tasks:
        other = open_model(config.against) if config.against is not None else None
        if other is not None:
            other.model.to(device)
        folder = Path(config.task_files) if config.task_files is not None else None
        accuracies = judge_tasks(tasks, folder, opened, other, precision)
        values["tasks"] = as_values(accuracies)
        for line in describe(accuracies):
            say(line)
    if config.json:
        sys.stdout.write(json.dumps(values) + "\n")
    say(f'next: overnight generate {config.model} "Once upon a time"')


def judge_validation(
    config: EvaluateConfig, opened: OpenedModel, recipe: Recipe | None, precision: str
) -> Evaluation:
    """The model's loss on prepared text, told."""
    from overnight.evaluation.language_model import evaluate_language_model, evaluation_rows
    from overnight.stages.materials import DataConfig
    from overnight.stages.mixing import gather_materials

    packing = recipe.data.packing if recipe else "stream"
    asked = DataConfig(data=config.data, packing=packing) if config.data else _own_data(recipe)
    materials = gather_materials(asked)
    if materials.tokenizer.fingerprint != opened.tokenizer.fingerprint:
        raise ValueError(
            f"{config.model} reads {opened.tokenizer.name}, but {materials.folder} is written with the "
            f"tokenizer {materials.tokenizer.name}: prepare that text with "
            f"--tokenizer {opened.tokenizer_folder}"
        )
    model = opened.model
    stream = materials.stream("validation", model.config.context_length, seed=0)
    wanted = config.evaluation_tokens or stream.tokens - 1
    with progress("evaluate", wanted, "tokens") as advance:

        def shown() -> Iterator[Batch]:
            for batch in stream.evaluation_batches(evaluation_rows(model), config.evaluation_tokens):
                yield batch
                advance(batch.targets.numel())

        found = evaluate_language_model(
            model, shown(), materials.tokenizer.token_bytes(), precision, materials.boundary
        )
    say(f"validation loss  {found.loss:.4f} nats per token")
    say(f"perplexity       {found.perplexity:.2f}")
    say(f"bits per byte    {found.bits_per_byte:.4f}")
    judged = f"{found.evaluated_tokens:,} tokens, {found.evaluated_bytes:,} bytes"
    say(f"judged on        {judged} of {materials.folder}, in {precision}")
    return found


def _own_data(recipe: Recipe | None) -> DataConfig:
    """What a run was trained on."""
    if recipe is None:
        raise ValueError(
            "this model does not say what it was trained on: name prepared text with --data FOLDER"
        )
    return recipe.data
