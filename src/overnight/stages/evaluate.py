"""The command `overnight evaluate`: a model's loss on text it has not seen."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tyro.conf import Positional

from overnight.terminal import progress, say

if TYPE_CHECKING:  # --help is shown without torch
    from collections.abc import Iterator

    from overnight.data.stream import Batch
    from overnight.stages.materials import DataConfig
    from overnight.stages.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Validation loss, perplexity and bits per byte of a model on prepared text."""

    model: Positional[str]
    """A run, a checkpoint, a Hugging Face folder or name."""
    data: str | None = None
    """A folder that `overnight prepare` wrote; the run's own if left out."""
    evaluation_tokens: int | None = None
    """How many validation tokens; all of them if left out."""
    device: str | None = None
    """cpu, cuda, cuda:1, mps; the best one found if left out."""
    json: bool = False
    """Print one JSON object to standard output."""


def run(config: EvaluateConfig) -> None:
    """Evaluate and print, a run in the precision it was trained in, any other model in fp32."""
    from overnight.evaluation.language_model import evaluate_language_model, evaluation_rows
    from overnight.stages.materials import DataConfig
    from overnight.stages.mixing import gather_materials
    from overnight.stages.models import open_model
    from overnight.stages.train import load_resumed
    from overnight.world import open_world

    if config.evaluation_tokens is not None and config.evaluation_tokens < 1:
        raise ValueError(f"--evaluation-tokens={config.evaluation_tokens} must be at least 1, or left out")
    opened = open_model(config.model)
    recipe = load_resumed(opened.run) if opened.run else None
    precision = (recipe.compute.precision if recipe else None) or "fp32"
    packing = recipe.data.packing if recipe else "stream"
    asked = DataConfig(data=config.data, packing=packing) if config.data else _own_data(recipe)
    materials = gather_materials(asked)
    if materials.tokenizer.fingerprint != opened.tokenizer.fingerprint:
        raise ValueError(
            f"{config.model} reads {opened.tokenizer.name}, but {materials.folder} is written with the "
            f"tokenizer {materials.tokenizer.name}: prepare that text with "
            f"--tokenizer {opened.tokenizer_folder}"
        )
    model = opened.model.to(open_world(config.device).device)
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
    if config.json:
        about = {"model": config.model, "precision": precision}
        sys.stdout.write(json.dumps({**about, **dataclasses.asdict(found)}) + "\n")
    say(f"validation loss  {found.loss:.4f} nats per token")
    say(f"perplexity       {found.perplexity:.2f}")
    say(f"bits per byte    {found.bits_per_byte:.4f}")
    judged = f"{found.evaluated_tokens:,} tokens, {found.evaluated_bytes:,} bytes"
    say(f"judged on        {judged} of {materials.folder}, in {precision}")
    say(f'next: overnight generate {config.model} "Once upon a time"')


def _own_data(recipe: Recipe | None) -> DataConfig:
    """What a run was trained on."""
    if recipe is None:
        raise ValueError(
            "this model does not say what it was trained on: name prepared text with --data FOLDER"
        )
    return recipe.data
