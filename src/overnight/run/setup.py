"""From a recipe to a training set-up: decide everything once, then build model, optimizer and data."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import Tensor

from overnight.config import raise_problems
from overnight.data import DataConfig
from overnight.data.dataset import Dataset, MixtureDataset
from overnight.data.incremental import IncrementalStream
from overnight.data.loader import BatchSource, TokenStream, prefetch
from overnight.data.mixture import Concatenation, Mixture
from overnight.data.packing import BestFitStream
from overnight.distributed.world import World, compute_with_threads
from overnight.hardware import find_memory_bytes
from overnight.model.gpt import GPT, init_weights
from overnight.model.model_config import ModelConfig
from overnight.recipe import Recipe, Resolved, with_settings
from overnight.run.preflight import (
    check_agreement,
    check_evaluation,
    check_sample_prompts,
    require_memory,
)
from overnight.terminal import echo
from overnight.training import Compute
from overnight.training.batch import plan_batches
from overnight.training.compute import NextTokenLoss, resolve_compute
from overnight.training.memory import Resources, choose_sharding, rows_that_fit
from overnight.training.optim import build_scaler
from overnight.training.schedule import Schedule
from overnight.training.sharding import (
    FULLY_SHARDED,
    build_sharded_model,
    build_sharded_optimizer,
    build_sharing,
    unsupported_reasons,
)
from overnight.training.state import TrainState
from overnight.training.step import TrainSetup, fits

Weights = Iterable[tuple[str, Tensor]] | None


@dataclass(frozen=True)
class RunSetup:
    """A run that is ready to begin: resolved recipe, data, state and training set-up."""

    resolved: Resolved
    dataset: Dataset | MixtureDataset
    train: TokenStream | BestFitStream | IncrementalStream | Mixture
    validation: TokenStream | Concatenation
    state: TrainState
    training: TrainSetup

    @property
    def world(self) -> World:
        """The processes of the run."""
        return self.training.world


def resources_of(world: World) -> Resources:
    """The memory and devices of each process of `world`; processes on one CPU share its memory."""
    sharing = world.local_size if world.device == "cpu" else 1
    return Resources(world.device, find_memory_bytes(world.device) // sharing, world.size, world.local_size)


def resolve(
    recipe: Recipe, model: ModelConfig, data: DataConfig, compute: Compute, resources: Resources
) -> Resolved:
    """Decide what the recipe leaves open: rows per micro-batch, sharding, steps. Raises ValueError.

    `model` has the tokenizer's vocabulary, `data` names the prepared data, `compute` is decided for the
    device. The micro-batch is the largest that the memory estimate allows; sharding the first that fits.
    """
    asked = recipe.batch.micro_batch_size
    if recipe.compute.sharding is None and resources.processes > 1:
        sharding = choose_sharding(model, asked or 1, compute, resources, recipe.optimizer)
        compute = replace(compute, sharding=sharding)
    rows = asked or rows_that_fit(model, compute, resources, recipe.optimizer)
    plan = plan_batches(recipe.batch, model.context_length, rows, resources.processes)
    total_steps = recipe.schedule.total_steps or 0
    if recipe.schedule.total_tokens is not None:
        total_steps = plan.steps_for(recipe.schedule.total_tokens)
    complete = with_settings(
        replace(recipe, model=model, data=data),
        micro_batch_size=plan.micro_batch_size,
        total_steps=total_steps,
        device=compute.device,
        precision=compute.precision,
        compile=compute.compile,
        attention=compute.attention,
        loss=compute.loss,
    )
    problems = complete.problems() or complete.schedule.problems(plan.full_steps_before(total_steps))
    raise_problems(problems, f"recipe {recipe.run_name}")
    return Resolved(recipe=complete, model=model, compute=compute, plan=plan, total_steps=total_steps)


def resolve_on(
    recipe: Recipe, model: ModelConfig, dataset: Dataset | MixtureDataset, world: World
) -> Resolved:
    """`resolve` for the processes of `world`. Raises ValueError for what they can't do or hold."""
    compute = resolve_compute(recipe.compute, world.device)
    resolved = resolve(recipe, model, dataset.describe(), compute, resources_of(world))
    reasons = unsupported_reasons(resolved.compute, world)
    raise_problems(reasons, f"recipe {recipe.run_name}")
    require_memory(resolved, world)
    return resolved


def build_run(
    resolved: Resolved, dataset: Dataset | MixtureDataset, weights: Weights, world: World
) -> RunSetup:
    """Model, optimizer, data and loss of a resolved recipe; `weights` None leaves the model uninitialised."""
    recipe, plan, compute = resolved.recipe, resolved.plan, resolved.compute
    with world.raise_together():
        check_sample_prompts(recipe, dataset)
        train = dataset.training_rows(plan.tokens_per_row, recipe.seed)
        check_evaluation(recipe, dataset)
        validation = dataset.stream("validation", plan.tokens_per_row, recipe.seed)
    with world.raise_together():
        check_agreement(resolved, dataset, world)
    if compute.deterministic_reduce:
        compute_with_threads(1)  # the number of threads changes how products are rounded
    state = build_state(resolved, weights, world)
    training = build_training(resolved, state.model, train, world, dataset.document_separator)
    return _fit_into_memory(RunSetup(resolved, dataset, train, validation, state, training))


def build_state(resolved: Resolved, weights: Weights, world: World) -> TrainState:
    """Model and optimizer at step 0, sharded as decided."""
    compute = resolved.compute
    model = build_sharded_model(resolved.model, weights, world, compute.sharding)
    optimizer = build_sharded_optimizer(model, resolved.recipe.optimizer, world, compute)
    return TrainState(model, optimizer, scaler=build_scaler(compute.device, compute.precision))


def build_training(
    resolved: Resolved, model: GPT, rows: BatchSource, world: World, document_separator: int | None = None
) -> TrainSetup:
    """The set-up for training `model` on `rows`: the only place where one is built."""
    recipe, plan, compute = resolved.recipe, resolved.plan, resolved.compute
    next_row = functools.partial(plan.next_row, rank=world.rank, size=world.size)
    return TrainSetup(
        plan=plan,
        data=prefetch(rows, compute.device, next_row),
        loss=NextTokenLoss(model, compute, document_separator),
        schedule=Schedule(recipe.schedule, recipe.optimizer.peak_learning_rate, plan, resolved.total_steps),
        sharing=build_sharing(model, world, compute.sharding, deterministic=compute.deterministic_reduce),
        world=world,
        seed=recipe.seed,
        max_grad_norm=recipe.optimizer.max_grad_norm,
        spike_sigma=recipe.guard.spike_sigma,
    )


def _fit_into_memory(run: RunSetup) -> RunSetup:
    """Halve the micro-batch until a trial step fits on the device. Raises ValueError if one row does not.

    A sharded model is not tried: the others would wait for a process that ran out of memory.
    """
    while run.resolved.compute.sharding not in FULLY_SHARDED and run.world.any(
        not fits(run.state, run.training)
    ):
        resolved = with_fewer_rows(run.resolved, run.world.size)
        training = replace(run.training, plan=resolved.plan)
        run = replace(run, resolved=resolved, training=training)
    return run


def with_fewer_rows(resolved: Resolved, processes: int = 1) -> Resolved:
    """The same steps in micro-batches of at most half the rows. Raises ValueError if they have one row."""
    recipe, plan, device = resolved.recipe, resolved.plan, resolved.compute.device
    rows = plan.micro_batch_size
    if rows == 1:
        raise ValueError(
            f"a single row does not fit into the memory of {device}: choose --activation-checkpointing "
            "block, --loss chunked, a smaller model or a shorter --context-length"
        )
    open_batch = with_settings(recipe, micro_batch_size=None).batch
    plan = plan_batches(open_batch, plan.tokens_per_row, rows // 2, processes)
    recipe = with_settings(recipe, micro_batch_size=plan.micro_batch_size)
    echo(
        f"micro-batches of {rows} rows do not fit into the memory of {device}: training with "
        f"{plan.micro_batch_size}, and the same tokens per step"
    )
    return replace(resolved, recipe=recipe, plan=plan)


def initial_weights(
    recipe: Recipe, dataset: Dataset | MixtureDataset, source: GPT | None
) -> tuple[ModelConfig, Weights]:
    """The configuration of the model that a run begins with, and its weights, one at a time.

    They are those of `source`, the model of `init_from`, or, without one, drawn from the seed.
    """
    if source is None:
        model = with_vocabulary(recipe.model, dataset)
        return model, init_weights(model, recipe.seed)
    asked = recipe.model  # it decides what is not in the weights
    sizes = replace(source.config, dropout=asked.dropout, zero_projections=asked.zero_projections)
    wrong = [
        f"{name}={wanted} contradicts {recipe.init_from}, which has {getattr(sizes, name)}; leave it out"
        for name, wanted in vars(asked).items()
        if wanted not in {getattr(sizes, name), getattr(ModelConfig(), name)}
    ]
    raise_problems(wrong, f"recipe {recipe.run_name}")
    return with_vocabulary(sizes, dataset), source.weights().items()


def with_vocabulary(model: ModelConfig, dataset: Dataset | MixtureDataset) -> ModelConfig:
    """`model` with the tokenizer's vocabulary. Raises ValueError if it asks for another one."""
    tokenizer = dataset.tokenizer
    if model.vocab_size not in {None, tokenizer.vocab_size}:
        raise ValueError(
            f"vocab_size={model.vocab_size} contradicts the tokenizer {tokenizer.name} of {dataset.folder}, "
            f"which has {tokenizer.vocab_size} ids; leave vocab_size out, or give the run its own text"
        )
    return replace(model, vocab_size=tokenizer.vocab_size)
