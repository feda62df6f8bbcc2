"""A recipe and everything built from it: what the stages that train hand from one to the next."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from overnight import __version__
from overnight.config import raise_problems
from overnight.conversion.open_model import open_model
from overnight.data import DataConfig
from overnight.data.dataset import Dataset, MixtureDataset, open_dataset
from overnight.data.incremental import IncrementalStream
from overnight.data.loader import TokenStream, prefetch
from overnight.data.mixture import Concatenation, Mixture
from overnight.data.packing import BestFitStream
from overnight.distributed.machine import compute_with_threads
from overnight.distributed.world import World
from overnight.hardware import find_memory_bytes
from overnight.model.gpt import init_weights, weight_shapes
from overnight.model.loss import next_token_loss
from overnight.model.model_config import ModelConfig
from overnight.recipe import Recipe, flatten
from overnight.terminal import echo
from overnight.training.batch import BatchConfig, BatchPlan, estimate_rows_that_fit, plan_batches
from overnight.training.compute import build_loss, resolve_compute
from overnight.training.memory import FLOAT32, choose_sharding, estimate_memory
from overnight.training.ownership import Sharding
from overnight.training.schedule import learning_rate_multiplier
from overnight.training.sharding import (
    SHARDS,
    broadcast_updates,
    build_sharded_model,
    build_sharded_optimizer,
    gradient_reduction,
    unsupported_reasons,
)
from overnight.training.state import TrainState, build_scaler
from overnight.training.step import Training, fits


@dataclass(frozen=True)
class TrainSetup:
    """One training run, ready to begin."""

    recipe: Recipe
    """With everything decided that was left open."""
    plan: BatchPlan
    dataset: Dataset | MixtureDataset
    train: TokenStream | BestFitStream | IncrementalStream | Mixture
    validation: TokenStream | Concatenation
    state: TrainState
    world: World
    sharding: Sharding
    """Of this world's processes; another world may choose another."""


def build_setup(recipe: Recipe, world: World, *, has_checkpoint: bool) -> TrainSetup:
    """Open the text, build the model, decide what is open. Raises ValueError if these do not fit.

    With `has_checkpoint` the weights are whatever memory held: they are about to be loaded. What one process
    refuses all refuse, before any takes part in placing a model that others will never place.
    """
    with world.raise_together():
        raise_problems(recipe.problems(), f"recipe {recipe.run_name}")
        dataset = open_dataset(recipe.data)
        model, weights = initial_model(recipe, dataset, has_checkpoint=has_checkpoint)
        recipe, plan = resolve_recipe(recipe, model, dataset.describe(), world.device, world.size)
        sharding = choose_sharding_for(recipe, plan, world)
        compute = recipe.compute
        obstacles = unsupported_reasons(
            sharding, compute.precision, world, deterministic_reduce=compute.deterministic_reduce
        )
        raise_problems(obstacles, f"recipe {recipe.run_name}")
        require_memory(recipe, plan, sharding, world)
        check_sample_prompts(recipe, dataset)
        train = dataset.training_rows(plan.tokens_per_row, recipe.seed)
        check_evaluation(recipe, dataset)
        validation = dataset.stream("validation", plan.tokens_per_row, recipe.seed)
    with world.raise_together():
        check_agreement(recipe, dataset, sharding, world)
    if compute.deterministic_reduce:
        compute_with_threads(1)  # products of another number of threads are rounded otherwise
    placed = build_sharded_model(model, weights, world, sharding)
    optimizer = build_sharded_optimizer(placed, recipe.optimizer, world, sharding)
    state = TrainState(placed, optimizer, scaler=build_scaler(world.device, recipe.compute.precision))
    return TrainSetup(recipe, plan, dataset, train, validation, state, world, sharding)


def check_agreement(
    recipe: Recipe, dataset: Dataset | MixtureDataset, sharding: Sharding, world: World
) -> None:
    """Raise ValueError, naming what, unless all processes are about to train the same.

    Of a text that may be growing, each may see more or less of the shards.
    """
    record = dataset.record()
    if recipe.data.shuffle_window is not None and "request" in record:
        record = {name: record[name] for name in ("request", "tokenizer_fingerprint", "split_rule")}
    text = json.dumps(record, sort_keys=True)
    facts = {name: str(value) for name, value in flatten(recipe).items() if name != "device"}
    facts |= {"the data": hashlib.sha256(text.encode()).hexdigest()[:12], "sharding": sharding}
    facts |= {"overnight's version": __version__, "torch's version": str(torch.__version__)}
    told = [json.loads(words) for words in world.all_gather_object(json.dumps(facts))]
    differing = [
        f"{name} is {other[name]} in rank {rank} and {told[0][name]} in rank 0"
        for rank, other in enumerate(told)
        for name in facts
        if other[name] != told[0][name]
    ]
    if differing:
        raise ValueError(f"the processes do not agree: {'; '.join(differing)}")


def choose_sharding_for(recipe: Recipe, plan: BatchPlan, world: World) -> Sharding:
    """What the processes divide among them: as asked, or the least that fits into their memory."""
    if world.size == 1 or recipe.compute.sharding is not None:
        return recipe.compute.sharding or "none"
    sharing = world.local_size if world.device == "cpu" else 1  # a GPU is one process's own
    return choose_sharding(
        recipe.model,
        plan.micro_batch_size,
        recipe.compute,
        find_memory_bytes(world.device) // sharing,
        processes=world.size,
        processes_per_machine=world.local_size,
    )


def require_memory(recipe: Recipe, plan: BatchPlan, sharding: Sharding, world: World) -> None:
    """Raise ValueError if not even what a run holds all the time can lie in the memory.

    What a step takes besides is tried before the run begins, on a GPU that holds a whole model.
    """
    compute = dataclasses.replace(recipe.compute, sharding=sharding)
    rows, sharing = plan.micro_batch_size, world.local_size if world.device == "cpu" else 1
    memory = estimate_memory(recipe.model, rows, compute, world.size, world.local_size)
    needed = sharing * (memory.weights + memory.gradients + memory.moments)
    there, told = find_memory_bytes(world.device), "weights, gradients and AdamW's moments"
    way_out = "a smaller model, or, of several processes, fewer, or --sharding fsdp"
    if world.device == "cpu" and recipe.checkpoints.async_checkpoint and needed <= there:
        needed += 3 * FLOAT32 * recipe.model.parameter_count()
        told, way_out = f"{told}, and a copy while a checkpoint is written,", "--no-async-checkpoint"
    if needed > there:
        raise ValueError(
            f"{told} take {needed / 1e9:,.1f} GB of memory, and {world.device} has {there / 1e9:,.1f} GB: "
            f"choose {way_out}; `overnight plan` tells what fits"
        )


Weights = Iterable[tuple[str, Tensor]] | None


def initial_model(
    recipe: Recipe, dataset: Dataset | MixtureDataset, *, has_checkpoint: bool
) -> tuple[ModelConfig, Weights]:
    """The sizes of the model that a run begins with, and its weights, one after the other.

    They are drawn, or those of `init_from`; None for a run that has a checkpoint.
    """
    if recipe.init_from is None or has_checkpoint:
        model = with_vocabulary(recipe.model, dataset)
        drawn = init_weights(weight_shapes(model), model.n_layer, recipe.seed)
        return model, None if has_checkpoint else drawn
    opened = open_model(recipe.init_from)
    if opened.tokenizer.fingerprint != dataset.tokenizer.fingerprint:
        raise ValueError(
            f"{dataset.folder} is written with the tokenizer {dataset.tokenizer.name}, and "
            f"{recipe.init_from} reads another: prepare the text with --tokenizer {opened.tokenizer_folder}"
        )
    sizes = dataclasses.replace(opened.model.config, dropout=recipe.model.dropout)
    wrong = [
        f"{name}={wanted} contradicts {recipe.init_from}, which has {getattr(sizes, name)}; leave it out"
        for name, wanted in vars(recipe.model).items()
        if wanted not in {getattr(sizes, name), getattr(ModelConfig(), name)}
    ]
    raise_problems(wrong, f"recipe {recipe.run_name}")
    return with_vocabulary(sizes, dataset), opened.model.weights().items()


def with_vocabulary(model: ModelConfig, dataset: Dataset | MixtureDataset) -> ModelConfig:
    """The model's sizes with the tokenizer's. Raises ValueError if its vocabulary is another one."""
    tokenizer = dataset.tokenizer
    vocab_size = model.vocab_size or tokenizer.vocab_size
    if vocab_size != tokenizer.vocab_size:
        raise ValueError(
            f"vocab_size={vocab_size} contradicts the tokenizer {tokenizer.name} of {dataset.folder}, "
            f"which has {tokenizer.vocab_size} ids; leave vocab_size out, or give the run its own text"
        )
    return dataclasses.replace(model, vocab_size=vocab_size)


def check_sample_prompts(recipe: Recipe, dataset: Dataset | MixtureDataset) -> None:
    """Raise ValueError now, not after hours, for a sample prompt that does not fit the context."""
    for prompt in recipe.samples.sample_prompts:
        length = len(dataset.tokenizer.encode(prompt))
        if length > recipe.model.context_length:
            raise ValueError(
                f"the sample prompt {prompt[:40]!r} has {length} tokens, more than "
                f"context_length={recipe.model.context_length}: shorten it"
            )


def check_evaluation(recipe: Recipe, dataset: Dataset | MixtureDataset) -> None:
    """Raise ValueError if the run is to be judged on more held-out text than there is yet."""
    wanted = recipe.evaluation.evaluation_tokens
    record = dataset.record()
    if recipe.evaluation.evaluate_every_steps is None or record.get("is_complete", True):
        return
    there = sum(shard["tokens"] for shard in record["validation"]) - 1
    if wanted is None or wanted > there:
        raise ValueError(
            f"{dataset.folder} is still being prepared, and a run is judged on the same text throughout: "
            f"give --evaluation-tokens, {max(0, there)} or fewer, or wait until it is complete"
        )


def resolve_recipe(
    recipe: Recipe, model: ModelConfig, data: DataConfig, device: str, processes: int = 1
) -> tuple[Recipe, BatchPlan]:
    """`recipe` with everything that was left open decided for this model, text and device."""
    rows = estimate_rows_that_fit(model, find_memory_bytes(device), device)
    compute = resolve_compute(recipe.compute, device)
    return settle(dataclasses.replace(recipe, model=model, data=data, compute=compute), rows, processes)


def settle(recipe: Recipe, rows_that_fit: int, processes: int = 1) -> tuple[Recipe, BatchPlan]:
    """`recipe`, whose model and device are decided, with the length and the division of its steps."""
    plan = plan_batches(recipe.batch, recipe.model.context_length, rows_that_fit, processes)
    schedule = recipe.schedule
    if schedule.total_tokens is not None:
        steps = plan.steps_for(schedule.total_tokens)
        schedule = dataclasses.replace(schedule, total_steps=steps, total_tokens=None)
    batch = dataclasses.replace(recipe.batch, micro_batch_size=plan.micro_batch_size)
    decided = dataclasses.replace(recipe, schedule=schedule, batch=batch)
    raise_problems(decided.problems(), f"recipe {recipe.run_name}")
    return decided, plan


def build_training(job: TrainSetup) -> Training:
    """What the loop needs besides the state. Raises ValueError if the schedule does not fit the run."""
    recipe, plan, device = job.recipe, job.plan, job.recipe.compute.device
    assert device is not None
    assert recipe.schedule.total_steps is not None
    length = plan.full_steps_before(recipe.schedule.total_steps)
    raise_problems(recipe.schedule.problems(length), f"recipe {recipe.run_name}")
    loss = functools.partial(next_token_loss, document_separator=job.dataset.document_separator)
    world, model = job.world, job.state.model
    following = functools.partial(plan.next_row, rank=world.rank, size=world.size)
    return Training(
        batches=prefetch(job.train, device, following).batch,
        loss=build_loss(model, loss, recipe.compute, by_block=job.sharding in SHARDS),
        plan=plan,
        learning_rate=lambda step: (
            recipe.optimizer.peak_learning_rate
            * learning_rate_multiplier(plan.full_steps_before(step + 1) - 1, length, recipe.schedule)
        ),
        max_grad_norm=recipe.optimizer.max_grad_norm,
        spike_sigma=recipe.guard.spike_sigma,
        seed=recipe.seed,
        device=device,
        world=world,
        add_up=gradient_reduction(
            model, job.sharding, deterministic_reduce=recipe.compute.deterministic_reduce
        ),
        after_update=broadcast_updates(model, world, job.sharding),
    )


def with_fewer_rows(plan: BatchPlan, batch: BatchConfig, device: str, processes: int = 1) -> BatchPlan:
    """A plan of the same steps with at most half as many rows at once.

    Raises ValueError if there is a single row already.
    """
    at_once = plan.micro_batch_size
    if at_once == 1:
        raise ValueError(
            f"not a single row fits in the memory of {device}: choose --activation_checkpointing block, "
            "--loss chunked, a smaller model or a shorter --context-length"
        )
    open_batch = dataclasses.replace(batch, micro_batch_size=None)
    smaller = plan_batches(open_batch, plan.tokens_per_row, at_once // 2, processes)
    echo(
        f"{at_once} rows at once do not fit in the memory of {device}: going on with "
        f"{smaller.micro_batch_size}, and as many tokens a step"
    )
    return smaller


def fit_into_memory(training: Training, job: TrainSetup) -> tuple[Training, TrainSetup]:
    """Both with the micro-batch halved until a GPU can hold it: tried before the run begins.

    Shards are not tried: there, a process that has no memory left would be waited for. Raises ValueError if
    not even a single row fits.
    """
    if job.sharding in SHARDS:
        return training, job
    while job.world.any(not fits(training, job.state)):
        plan = with_fewer_rows(training.plan, job.recipe.batch, training.device, job.world.size)
        batch = dataclasses.replace(job.recipe.batch, micro_batch_size=plan.micro_batch_size)
        job = dataclasses.replace(job, plan=plan, recipe=dataclasses.replace(job.recipe, batch=batch))
        training = dataclasses.replace(training, plan=plan)
    return training, job
