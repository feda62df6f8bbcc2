"""Checks before the first step: memory, disk, prompts, held-out text, agreement of processes."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import torch

from overnight import __version__
from overnight.data.dataset import Dataset, MixtureDataset
from overnight.distributed.world import World
from overnight.hardware import find_memory_bytes
from overnight.recipe import Recipe, Resolved, flatten
from overnight.terminal import byte_size
from overnight.training.checkpoint.format import list_checkpoints
from overnight.training.memory import estimate_memory
from overnight.training.moments import saved_bytes


def require_memory(resolved: Resolved, world: World) -> None:
    """Raise ValueError if the permanent memory of a run does not fit (weights, gradients, moments).

    On a GPU without sharded weights, a trial step tests the memory of activations before the run begins.
    """
    rows, sharing = resolved.plan.micro_batch_size, world.local_size if world.device == "cpu" else 1
    processes, optimizer = (world.size, world.local_size), resolved.recipe.optimizer
    memory = estimate_memory(resolved.model, rows, resolved.compute, *processes, optimizer)
    needed = sharing * (memory.weights + memory.gradients + memory.moments)
    whose = "AdamW's" if optimizer.optimizer == "adamw" else "the optimizer's"
    available, what = find_memory_bytes(world.device), f"weights, gradients and {whose} moments"
    remedy = "a smaller model, or, of several processes, fewer, or --sharding fsdp"
    is_copied = world.device == "cpu" and resolved.recipe.checkpoints.async_checkpoint
    if is_copied and needed <= available:
        needed += saved_bytes(resolved.model, optimizer)
        what, remedy = f"{what}, and a copy while a checkpoint is written,", "--no-async-checkpoint"
    if needed > available:
        raise ValueError(
            f"{what} take {byte_size(needed)} of memory, and {world.device} has {byte_size(available)}: "
            f"choose {remedy}; `overnight plan` shows what fits"
        )


def check_sample_prompts(recipe: Recipe, dataset: Dataset | MixtureDataset) -> None:
    """Raise ValueError for a sample prompt that is longer than the context."""
    for prompt in recipe.samples.sample_prompts:
        length = len(dataset.tokenizer.encode(prompt))
        if length > recipe.model.context_length:
            raise ValueError(
                f"the sample prompt {prompt[:40]!r} has {length} tokens, more than "
                f"context_length={recipe.model.context_length}: shorten it"
            )


def check_evaluation(recipe: Recipe, dataset: Dataset | MixtureDataset) -> None:
    """Raise ValueError if the run is to be evaluated on more held-out text than is prepared so far."""
    wanted = recipe.evaluation.evaluation_tokens
    record = dataset.record()
    if recipe.evaluation.evaluate_every_steps is None or record.get("is_complete", True):
        return
    available = sum(shard["tokens"] for shard in record["validation"]) - 1
    if wanted is None or wanted > available:
        raise ValueError(
            f"{dataset.folder} is still being prepared, and a run is evaluated on the same text throughout: "
            f"give --evaluation-tokens, {max(0, available)} or fewer, or wait until it is complete"
        )


def check_agreement(resolved: Resolved, dataset: Dataset | MixtureDataset, world: World) -> None:
    """Raise ValueError, naming the setting, unless all processes train the same run.

    Processes may see different numbers of shards of a text that is still being prepared.
    """
    record = dataset.record()
    if resolved.recipe.data.shuffle_window is not None and "request" in record:
        record = {name: record[name] for name in ("request", "tokenizer_fingerprint", "split_rule")}
    text = json.dumps(record, sort_keys=True)
    settings = flatten(resolved.recipe)
    facts = {name: str(value) for name, value in settings.items() if name != "device"}
    facts["the data"] = hashlib.sha256(text.encode()).hexdigest()[:12]
    facts |= {"sharding": resolved.compute.sharding, "overnight's version": __version__}
    facts["torch's version"] = str(torch.__version__)
    gathered = world.all_gather_object(facts)
    differing = [
        f"{name} is {other[name]} in rank {rank} and {gathered[0][name]} in rank 0"
        for rank, other in enumerate(gathered)
        for name in facts
        if other[name] != gathered[0][name]
    ]
    if differing:
        raise ValueError(f"the processes do not agree: {'; '.join(differing)}")


def check_checkpoint_space(resolved: Resolved, run: Path, checkpoints: Path) -> None:
    """Raise ValueError if the checkpoints to be kept, and the one being written, do not fit on the disk."""
    wanted = resolved.recipe.checkpoints.count_kept(resolved.total_steps) + 1
    missing = max(1, wanted - len(list_checkpoints(checkpoints)))
    needed = missing * saved_bytes(resolved.model, resolved.recipe.optimizer)
    existing = next(folder for folder in (run, *run.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise ValueError(
            f"the disk of {run} has {byte_size(free)} free, the checkpoints need {byte_size(needed)}: "
            "free some, or lower --keep-checkpoints"
        )
