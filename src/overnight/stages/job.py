"""A recipe and everything built from it: what the stages that train hand from one to the next."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from overnight.batching import BatchPlan, estimate_rows_that_fit, plan_batches
from overnight.data.stream import TokenStream
from overnight.hardware import find_memory_bytes
from overnight.model.gpt import GPT, allocate_model
from overnight.model.initialization import initialize
from overnight.optim import build_optimizer
from overnight.parallel import resolve_compute
from overnight.settings import raise_problems
from overnight.stages.materials import Materials, open_materials
from overnight.stages.models import open_model
from overnight.stages.recipe import Recipe
from overnight.state import TrainState
from overnight.world import open_world


@dataclass(frozen=True)
class Job:
    """One training run, ready to begin."""

    recipe: Recipe
    """With everything decided that was left open."""
    plan: BatchPlan
    materials: Materials
    train: TokenStream
    validation: TokenStream
    state: TrainState


def build_job(recipe: Recipe) -> Job:
    """Open the text, build the model, decide what is open. Raises ValueError if these do not fit."""
    raise_problems(recipe.problems(), f"recipe {recipe.run_name}")
    device = open_world(recipe.compute.device).device
    materials = open_materials(recipe.data)
    model = build_model(recipe, materials)
    recipe, plan = decide(recipe, model, materials, device)
    train, validation = (
        materials.stream(split, plan.tokens_per_row, recipe.seed) for split in ("train", "validation")
    )
    model.to(device)
    state = TrainState(model, build_optimizer(model, recipe.optimizer))
    return Job(recipe, plan, materials, train, validation, state)


def build_model(recipe: Recipe, materials: Materials) -> GPT:
    """The model a run begins with: freshly initialised, or with the weights of `start_from`."""
    tokenizer = materials.tokenizer
    config = dataclasses.replace(recipe.model, vocab_size=recipe.model.vocab_size or tokenizer.vocab_size)
    weights = None
    if recipe.start_from is not None:
        opened = open_model(recipe.start_from)
        if opened.tokenizer.fingerprint != tokenizer.fingerprint:
            raise ValueError(
                f"the data is written with the tokenizer {tokenizer.name}, {recipe.start_from} reads "
                f"{opened.tokenizer.name}: prepare the data with --tokenizer {opened.tokenizer.name}"
            )
        config = dataclasses.replace(opened.model.config, dropout=recipe.model.dropout)
        weights = opened.model.weights()
    if config.vocab_size != tokenizer.vocab_size:
        raise ValueError(
            f"vocab_size={config.vocab_size} contradicts the tokenizer {tokenizer.name}, which has "
            f"{tokenizer.vocab_size} ids; leave vocab_size out"
        )
    model = allocate_model(config)
    if weights is None:
        initialize(model, recipe.seed)
    else:
        model.load_weights(weights)
    return model


def decide(recipe: Recipe, model: GPT, materials: Materials, device: str) -> tuple[Recipe, BatchPlan]:
    """`recipe` with everything that was left open decided for this model, text and device."""
    rows = estimate_rows_that_fit(model.config, find_memory_bytes(device), device)
    plan = plan_batches(recipe.batch, model.config.context_length, rows)
    schedule = recipe.schedule
    if schedule.total_tokens is not None:
        steps = -(-schedule.total_tokens // plan.tokens_per_step)
        schedule = dataclasses.replace(schedule, total_steps=steps, total_tokens=None)
    decided = dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, data=str(materials.folder)),
        model=model.config,
        schedule=schedule,
        batch=dataclasses.replace(recipe.batch, rows_per_micro_batch=plan.rows_per_micro_batch),
        compute=resolve_compute(recipe.compute, device),
    )
    raise_problems(decided.problems(), f"recipe {recipe.run_name}")
    return decided, plan
