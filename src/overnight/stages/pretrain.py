"""From a recipe to a trained model in a run directory: build, build, build, fit."""

from __future__ import annotations

import dataclasses
import json
import shutil

from overnight.batching import BatchPlan, estimate_rows_that_fit, plan_batches
from overnight.checkpoint import load_checkpoint, newest_checkpoint
from overnight.hardware import find_memory_bytes
from overnight.loss import next_token_nats
from overnight.model.gpt import GPT
from overnight.model.initialization import initialize
from overnight.optim import build_optimizer
from overnight.parallel import build_loss, resolve_compute
from overnight.run_directory import RunDirectory, write_atomically
from overnight.schedule import learning_rate_multiplier
from overnight.settings import from_toml, raise_problems, to_toml
from overnight.stages.environment import describe_environment
from overnight.stages.journal import Journal
from overnight.stages.materials import Materials, open_materials
from overnight.stages.models import open_model
from overnight.stages.recipe import Recipe, changed_settings
from overnight.state import TrainState
from overnight.terminal import say
from overnight.trainer import Training, fit, stop_on_signal
from overnight.world import World, open_world

BYTES_PER_SAVED_PARAMETER = 12  # a weight and AdamW's two moments, float32


def run(recipe: Recipe, directory: RunDirectory, *, resume: bool = False) -> Recipe:
    """Train what `recipe` describes into `directory`; returns the recipe with everything decided.

    With `resume` the run goes on from its newest good checkpoint. Interrupted by a signal, the run is
    saved after the step it is at, and KeyboardInterrupt is raised.
    """
    raise_problems(recipe.problems(), f"recipe {recipe.run_name}")
    world = open_world(recipe.compute.device)
    with directory.locked():
        _check_directory(recipe, directory, resume=resume)
        materials = open_materials(recipe.data)
        model = build_model(recipe, materials)
        recipe, plan = decide(recipe, model, materials, world)
        _check_disk(recipe, model, directory)
        model.to(world.device)
        state = TrainState(model, build_optimizer(model, recipe.optimizer))
        _begin(recipe, state, directory, materials, resume=resume)
        train(recipe, plan, state, directory, materials)
    return recipe


def build_model(recipe: Recipe, materials: Materials) -> GPT:
    """The model a run begins with: freshly initialised, or `start_from`'s."""
    vocabulary = materials.tokenizer.vocab_size
    config = dataclasses.replace(recipe.model, vocab_size=recipe.model.vocab_size or vocabulary)
    if recipe.start_from is None:
        model = GPT(config)
        initialize(model, recipe.seed)
    else:
        opened = open_model(recipe.start_from)
        if opened.tokenizer.fingerprint != materials.tokenizer.fingerprint:
            raise ValueError(
                f"the data is written with the tokenizer {materials.tokenizer.name}, {recipe.start_from} reads "
                f"{opened.tokenizer.name}: prepare the data with --tokenizer {opened.tokenizer.name}"
            )
        config = dataclasses.replace(opened.model.config, dropout=recipe.model.dropout)
        model = GPT(config)
        model.load_weights(opened.model.weights())
    if config.vocab_size != vocabulary:
        raise ValueError(
            f"vocab_size={config.vocab_size} contradicts the tokenizer {materials.tokenizer.name}, which has "
            f"{vocabulary} ids; leave vocab_size out"
        )
    return model


def decide(recipe: Recipe, model: GPT, materials: Materials, world: World) -> tuple[Recipe, BatchPlan]:
    """`recipe` with everything that was left open decided for this model, text and machine."""
    rows = estimate_rows_that_fit(model.config, find_memory_bytes(world.device), world.device)
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
        compute=resolve_compute(recipe.compute, world.device),
    )
    raise_problems(decided.problems(), f"recipe {recipe.run_name}")
    return decided, plan


def train(
    recipe: Recipe, plan: BatchPlan, state: TrainState, directory: RunDirectory, materials: Materials
) -> None:
    """Run the loop to the end, or to a signal, with everything that is to be written on the way."""
    total_steps = recipe.schedule.total_steps
    assert total_steps is not None and recipe.compute.device is not None
    stream = materials.stream("train", plan.tokens_per_row, recipe.seed)
    training = Training(
        batches=stream.batch,
        loss=build_loss(state.model, next_token_nats, recipe.compute),
        plan=plan,
        learning_rate=lambda step: (
            recipe.optimizer.peak_learning_rate * learning_rate_multiplier(step, recipe.schedule)
        ),
        max_grad_norm=recipe.optimizer.max_grad_norm,
        seed=recipe.seed,
        device=recipe.compute.device,
    )
    with Journal(recipe, state, directory, materials) as journal, stop_on_signal() as stopped:
        fit(state, training, total_steps, journal.hooks(total_steps), stopped)
        journal.save()
    if state.step < total_steps:
        say(f"stopped and saved after step {state.step} of {total_steps}")
        say(f"next: overnight train --resume {directory.path}")
        raise KeyboardInterrupt


def _check_directory(recipe: Recipe, directory: RunDirectory, *, resume: bool) -> None:
    """Raise ValueError unless `directory` is free for a new run, or holds the run that is to go on."""
    path = directory.path
    if resume and not directory.exists():
        raise ValueError(f"there is no run in {path} to resume")
    if not directory.exists():
        return
    before = from_toml(Recipe, directory.recipe.read_text(encoding="utf-8"), str(directory.recipe))
    if not resume:
        raise ValueError(
            f"{path} already holds a run: go on with `overnight train --resume {path}`, or give another --run-name"
        )
    changed = changed_settings(recipe, before)
    if changed:
        raise ValueError(
            f"{path} belongs to another recipe: {'; '.join(changed)}; take these back, or give another --run-name"
        )


def _check_disk(recipe: Recipe, model: GPT, directory: RunDirectory) -> None:
    """Raise ValueError if the checkpoints to be kept, and the one being written, do not fit the disk."""
    parameters = sum(weight.numel() for weight in model.weights().values())
    needed = ((recipe.checkpoints.keep_checkpoints or 1) + 1) * parameters * BYTES_PER_SAVED_PARAMETER
    free = shutil.disk_usage(directory.path).free
    if needed > free:
        raise ValueError(
            f"the disk of {directory.path} has {free / 1e9:.1f} GB free, the checkpoints need {needed / 1e9:.1f} GB: "
            "free some, or lower --keep-checkpoints"
        )


def _begin(
    recipe: Recipe, state: TrainState, directory: RunDirectory, materials: Materials, *, resume: bool
) -> None:
    """Write down what is about to run; with `resume`, become the newest good checkpoint first."""
    manifest = json.dumps(dataclasses.asdict(materials.manifest), indent=2) + "\n"
    if resume:
        if directory.data.read_text() != manifest:
            raise ValueError(
                f"the data in {materials.folder} is not what {directory.path} was trained on: "
                "put that data back, or give another --run-name"
            )
        checkpoint = newest_checkpoint(directory.checkpoints)
        if checkpoint is not None:
            load_checkpoint(state, checkpoint)
        directory.rewind(state.step)
    parameters = state.model.config.parameter_count()
    directory.begin(to_toml(recipe), describe_environment(recipe.compute, parameters))
    write_atomically(directory.data, manifest)
    if not directory.tokenizer.exists():
        materials.tokenizer.save(directory.tokenizer)
