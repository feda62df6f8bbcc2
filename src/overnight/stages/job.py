"""A recipe and everything built from it: what the stages that train hand from one to the next."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from overnight.batching import BatchPlan, estimate_rows_that_fit, plan_batches
from overnight.data.growing import GrowingStream
from overnight.data.mixture import Concatenation, Mixture
from overnight.data.packing import BestFitStream
from overnight.data.stream import TokenStream
from overnight.hardware import find_memory_bytes
from overnight.model.config import ModelConfig
from overnight.model.gpt import GPT, allocate_model
from overnight.model.initialization import initialize
from overnight.optim import build_optimizer
from overnight.parallel import resolve_compute
from overnight.settings import raise_problems
from overnight.stages.materials import DataConfig, Materials
from overnight.stages.mixing import MixedMaterials, gather_materials
from overnight.stages.models import open_model
from overnight.stages.recipe import Recipe
from overnight.state import TrainState, build_scaler
from overnight.world import open_world


@dataclass(frozen=True)
class Job:
    """One training run, ready to begin."""

    recipe: Recipe
    """With everything decided that was left open."""
    plan: BatchPlan
    materials: Materials | MixedMaterials
    train: TokenStream | BestFitStream | GrowingStream | Mixture
    validation: TokenStream | Concatenation
    state: TrainState


def build_job(recipe: Recipe, *, has_checkpoint: bool) -> Job:
    """Open the text, build the model, decide what is open. Raises ValueError if these do not fit.

    With `has_checkpoint` the weights are left unset: they are about to be loaded.
    """
    raise_problems(recipe.problems(), f"recipe {recipe.run_name}")
    device = open_world(recipe.compute.device).device
    materials = gather_materials(recipe.data)
    model = allocate(recipe, materials) if has_checkpoint else build_model(recipe, materials)
    recipe, plan = decide(recipe, model.config, materials.describe(), device)
    check_prompts(recipe, materials)
    train = materials.training_rows(plan.tokens_per_row, recipe.seed)
    check_evaluation(recipe, materials)
    validation = materials.stream("validation", plan.tokens_per_row, recipe.seed)
    model.to(device)
    scaler = build_scaler(device, recipe.compute.precision)
    state = TrainState(model, build_optimizer(model, recipe.optimizer), scaler=scaler)
    return Job(recipe, plan, materials, train, validation, state)


def build_model(recipe: Recipe, materials: Materials | MixedMaterials) -> GPT:
    """The model a run begins with: freshly initialised, or with the weights of `start_from`."""
    if recipe.start_from is None:
        model = allocate(recipe, materials)
        initialize(model, recipe.seed)
        return model
    opened = open_model(recipe.start_from)
    if opened.tokenizer.fingerprint != materials.tokenizer.fingerprint:
        raise ValueError(
            f"{materials.folder} is written with the tokenizer {materials.tokenizer.name}, and "
            f"{recipe.start_from} reads another: prepare the text with --tokenizer {opened.tokenizer_folder}"
        )
    sizes = dataclasses.replace(opened.model.config, dropout=recipe.model.dropout)
    wrong = [
        f"{name}={wanted} contradicts {recipe.start_from}, which has {getattr(sizes, name)}; leave it out"
        for name, wanted in vars(recipe.model).items()
        if wanted not in {getattr(sizes, name), getattr(ModelConfig(), name)}
    ]
    raise_problems(wrong, f"recipe {recipe.run_name}")
    model = allocate(dataclasses.replace(recipe, model=sizes), materials)
    model.load_weights(opened.model.weights())
    return model


def allocate(recipe: Recipe, materials: Materials | MixedMaterials) -> GPT:
    """The recipe's model, its weights not set. Raises ValueError if its vocabulary is not the tokenizer's."""
    tokenizer = materials.tokenizer
    vocab_size = recipe.model.vocab_size or tokenizer.vocab_size
    if vocab_size != tokenizer.vocab_size:
        raise ValueError(
            f"vocab_size={vocab_size} contradicts the tokenizer {tokenizer.name}, which has "
            f"{tokenizer.vocab_size} ids; leave vocab_size out"
        )
    return allocate_model(dataclasses.replace(recipe.model, vocab_size=vocab_size))


def check_prompts(recipe: Recipe, materials: Materials | MixedMaterials) -> None:
    """Raise ValueError now, not after hours, for a sample prompt that does not fit the context."""
    for prompt in recipe.samples.sample_prompts:
        length = len(materials.tokenizer.encode(prompt))
        if length > recipe.model.context_length:
            raise ValueError(
                f"the sample prompt {prompt[:40]!r} has {length} tokens, more than "
                f"context_length={recipe.model.context_length}: shorten it"
            )


def check_evaluation(recipe: Recipe, materials: Materials | MixedMaterials) -> None:
    """Raise ValueError if the run is to be judged on more held-out text than there is yet."""
    wanted = recipe.evaluation.evaluation_tokens
    record = materials.record()
    if recipe.evaluation.evaluate_every_steps is None or record.get("is_complete", True):
        return
    there = sum(shard["tokens"] for shard in record["validation"]) - 1
    if wanted is None or wanted > there:
        raise ValueError(
            f"{materials.folder} is still being prepared, and a run is judged on the same text throughout: "
            f"give --evaluation-tokens, {max(0, there)} or fewer, or wait until it is complete"
        )


def decide(recipe: Recipe, model: ModelConfig, data: DataConfig, device: str) -> tuple[Recipe, BatchPlan]:
    """`recipe` with everything that was left open decided for this model, text and device."""
    rows = estimate_rows_that_fit(model, find_memory_bytes(device), device)
    compute = resolve_compute(recipe.compute, device)
    return settle(dataclasses.replace(recipe, model=model, data=data, compute=compute), rows)


def settle(recipe: Recipe, rows_that_fit: int) -> tuple[Recipe, BatchPlan]:
    """`recipe`, whose model and device are decided, with the length and the division of its steps."""
    plan = plan_batches(recipe.batch, recipe.model.context_length, rows_that_fit)
    schedule = recipe.schedule
    if schedule.total_tokens is not None:
        steps = plan.steps_for(schedule.total_tokens)
        schedule = dataclasses.replace(schedule, total_steps=steps, total_tokens=None)
    batch = dataclasses.replace(recipe.batch, rows_per_micro_batch=plan.rows_per_micro_batch)
    decided = dataclasses.replace(recipe, schedule=schedule, batch=batch)
    raise_problems(decided.problems(), f"recipe {recipe.run_name}")
    return decided, plan
