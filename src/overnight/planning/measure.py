"""Times a few steps of a recipe on random ids, and records their peak memory."""

from __future__ import annotations

import dataclasses
import hashlib
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from overnight.data.loader import Batch
from overnight.distributed.world import World
from overnight.evaluation.perplexity import evaluate_language_model, evaluation_rows
from overnight.files import flush_to_disk
from overnight.generation.generate import Decoding, generate
from overnight.hardware import peak_memory_bytes, reset_peak_memory, synchronize
from overnight.model.gpt import GPT, init_weights
from overnight.model.model_config import ModelConfig
from overnight.planning.estimate import FORWARD_SHARE, CostRange, StepCost
from overnight.recipe import Recipe, Resolved
from overnight.run.setup import build_state, build_training, with_fewer_rows
from overnight.terminal import progress
from overnight.training.batch import constant_plan
from overnight.training.sharding import Replicated
from overnight.training.state import TrainState
from overnight.training.step import TrainSetup, fits, train_step

MINIMUM_SHARE = 1 / 4  # share of the time for timed steps, even if compiling takes long
FEWEST_STEPS, MOST_STEPS = 2, 100
REPEAT_SECONDS = 3  # a part other than training is repeated for this time
EVALUATION_SECONDS = 10  # at most; on a slow machine fewer rows are evaluated at once than in a run
SAMPLED_TOKENS = 32
WRITTEN_BYTES = 64_000_000


class MeasuredMemory(NamedTuple):
    """Memory of one process; None where it is unknown."""

    process_memory_bytes: int = 0
    """Memory of the process before the model was built; 0 on a GPU, where only tensors are counted."""
    peak_memory_bytes: int | None = None
    """Peak in training; on a CPU that of the whole process, mainly torch and its libraries."""
    evaluation_peak_memory_bytes: int | None = None
    """Peak in training and evaluation."""


class Measurement(NamedTuple):
    """Measurements of one process."""

    costs: CostRange
    resolved: Resolved
    """The resolved recipe, with the micro-batch size that fitted."""
    memory: MeasuredMemory


def measure_step_costs(resolved: Resolved, seconds: float, processes: int = 1) -> Measurement | None:
    """Train for about `seconds`, with fewer rows per micro-batch if a GPU needs it.

    `resolved` is for all `processes`; this one computes any micro-batches of a step, fewer if the time is
    short. None if not even one row fits into the GPU's memory.
    """
    device, plan = resolved.compute.device, resolved.plan
    started_at = time.perf_counter()
    reset_peak_memory(device)
    process_memory = peak_memory_bytes(device) or 0
    state, training = build_trial(resolved)
    with progress("measure", None, "steps") as advance:
        first_at = time.perf_counter()
        while not fits(state, training):
            if plan.micro_batch_size == 1:
                return None
            resolved = with_fewer_rows(resolved, processes)
            plan = resolved.plan
            training = dataclasses.replace(training, plan=plan)
        _step(state, training, 1)
        first = time.perf_counter() - first_at
        advance(1, "compiled" if training.loss.compute.compile else "")
        micro_batch, update = time_parts(state, training, min(2, plan.micro_batches(state.step)))
        advance()
        left = max(seconds - (time.perf_counter() - started_at), MINIMUM_SHARE * seconds)
        micro_batches = max(1, min(plan.micro_batches(state.step), int(left / (3 * micro_batch))))
        times: list[float] = []
        while len(times) < FEWEST_STEPS or (sum(times) < left and len(times) < MOST_STEPS):
            times.append(_step(state, training, micro_batches))
            advance()
    trained_peak = peak_memory_bytes(device)
    runs = Path("runs").absolute()
    token_seconds = micro_batch / (plan.micro_batch_size * plan.tokens_per_row)
    parts = StepCost(
        micro_batch=micro_batch,
        update=update,
        start=max(0.0, first - micro_batch - update),
        evaluated_token=_time_evaluation(resolved, state.model, token_seconds),
        sampled_token=_time_sampling(resolved.recipe, state.model),
        saved_byte=time_writing(next(folder for folder in (runs, *runs.parents) if folder.is_dir())),
    )
    return Measurement(
        costs=cost_quartiles(parts, times, micro_batches),
        resolved=resolved,
        memory=MeasuredMemory(process_memory, trained_peak, peak_memory_bytes(device)),
    )


def cost_quartiles(parts: StepCost, step_seconds: Sequence[float], micro_batches: int) -> CostRange:
    """`parts` scaled so that steps of `micro_batches` take the quartiles of the timed ones.

    Parts are timed once and whole steps often, so only the ratio of the parts is used.
    """
    quartiles = statistics.quantiles(step_seconds, n=4, method="inclusive")
    factors = [seconds / parts.step(micro_batches) for seconds in quartiles]
    return [
        parts._replace(micro_batch=factor * parts.micro_batch, update=factor * parts.update)
        for factor in factors
    ]


def build_trial(resolved: Resolved) -> tuple[TrainState, TrainSetup]:
    """A new model and its training set-up in this process alone, on random ids."""
    model, world = resolved.model, World(rank=0, size=1, device=resolved.compute.device)
    compute = dataclasses.replace(resolved.compute, sharding="none", deterministic_reduce=False)
    resolved = dataclasses.replace(resolved, compute=compute)
    weights = init_weights(model, resolved.recipe.seed)
    state = build_state(resolved, weights, world)
    # Any id can be the document separator: all are equally rare in random rows.
    separator = 0 if resolved.recipe.data.packing == "documents" else None
    return state, build_training(resolved, state.model, RandomRows(model), world, separator)


class RandomRows:
    """Rows of random ids, which take the same time as rows of a text."""

    def __init__(self, model: ModelConfig) -> None:
        self._vocab_size, self._context_length = model.vocabulary, model.context_length
        self._generator = torch.Generator().manual_seed(0)

    def batch(self, _first_row: int, rows: int) -> Batch:
        """`rows` rows, different in each call."""
        shape = (2, rows, self._context_length)
        ids, targets = torch.randint(self._vocab_size, shape, generator=self._generator)
        return Batch(ids, targets)


def _step(
    state: TrainState, training: TrainSetup, micro_batches: int, sharing: Replicated | None = None
) -> float:
    """Seconds of one step of `overnight train` with `micro_batches`."""
    plan = training.plan
    cut = constant_plan(plan.tokens_per_row, plan.micro_batch_size, micro_batches)
    changed = dataclasses.replace(training, plan=cut, sharing=sharing or training.sharing)
    return train_step(state, changed).seconds


class Stopwatch(Replicated):
    """Replicated training that records the time after each micro-batch."""

    def __init__(self, model: GPT, world: World) -> None:
        super().__init__(model, world)
        self.finished_at: list[float] = []

    def reduce(self, nats: Tensor, number: int, count: int) -> Tensor:
        """See `Replicated.reduce`."""
        total = super().reduce(nats, number, count)
        synchronize(self.world.device)
        self.finished_at.append(time.perf_counter())
        return total


def time_parts(state: TrainState, training: TrainSetup, micro_batches: int) -> tuple[float, float]:
    """Seconds of the last micro-batch of a step, and of its update."""
    stopwatch = Stopwatch(state.model, training.world)
    started_at = time.perf_counter()
    _step(state, training, micro_batches, stopwatch)
    before, last = [started_at, *stopwatch.finished_at][-2:]
    return last - before, time.perf_counter() - last


def _time_evaluation(resolved: Resolved, model: GPT, trained_token_seconds: float) -> float:
    """Seconds to evaluate one token; 0 if the recipe evaluates nothing."""
    if resolved.recipe.evaluation.evaluate_every_steps is None:
        return 0.0
    row_seconds = FORWARD_SHARE * trained_token_seconds * model.config.context_length
    rows = max(1, min(evaluation_rows(model), int(EVALUATION_SECONDS / row_seconds)))
    batch = RandomRows(resolved.model).batch(0, rows)
    token_bytes = [b" "] * model.vocab_size
    seconds = _seconds(
        lambda: evaluate_language_model(model, [batch], token_bytes, resolved.compute.precision)
    )
    return seconds / batch.targets.numel()


def _time_sampling(recipe: Recipe, model: GPT) -> float:
    """Seconds to generate one token; 0 if the recipe samples nothing."""
    if recipe.samples.sample_every_steps is None:
        return 0.0
    decoding = Decoding(max_new_tokens=min(SAMPLED_TOKENS, recipe.samples.sample_tokens))
    prompts = [[0] for _ in recipe.samples.sample_prompts]
    seconds = _seconds(lambda: generate(model, prompts, decoding))
    return seconds / (decoding.max_new_tokens * len(prompts))


def time_writing(folder: Path) -> float:
    """Seconds to write one byte to the disk of `folder` and to hash it, as when a checkpoint is saved."""
    content = torch.randint(256, (WRITTEN_BYTES,), dtype=torch.uint8).numpy().tobytes()
    with tempfile.TemporaryFile(dir=folder) as file:
        started_at = time.perf_counter()
        file.write(content)
        file.flush()
        flush_to_disk(file.fileno())
        file.seek(0)
        hashlib.file_digest(file, "sha256")
        return (time.perf_counter() - started_at) / WRITTEN_BYTES


def _seconds(action: Callable[[], object]) -> float:
    """Median of at most three calls; each must synchronize the device itself."""
    times: list[float] = []
    while len(times) < 3 and sum(times) < REPEAT_SECONDS:
        started_at = time.perf_counter()
        action()
        times.append(time.perf_counter() - started_at)
    return statistics.median(times)
