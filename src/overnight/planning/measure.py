"""A few steps of a recipe on random ids: how fast this machine trains it, and in how much memory."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from overnight.data.loader import Batch, prefetch
from overnight.evaluation.perplexity import evaluate_language_model, evaluation_rows
from overnight.generation.generate import Decoding, generate
from overnight.hardware import peak_memory_bytes, reset_peak_memory, synchronize
from overnight.model.gpt import GPT, empty_model, initialize
from overnight.model.loss import next_token_loss
from overnight.planning.estimate import FORWARD_SHARE, StepCost
from overnight.recipe import Recipe
from overnight.run.setup import with_fewer_rows
from overnight.run_directory import flush_to_disk
from overnight.terminal import progress
from overnight.training.batch import BatchPlan, constant_plan
from overnight.training.compute import build_loss
from overnight.training.optim import apply_gradients, build_optimizer
from overnight.training.state import TrainState, build_scaler
from overnight.training.step import Training, fits, train_step

LEAST_SHARE = 1 / 4  # of the time, which timed steps get however long the first one compiles
STEPS_AT_LEAST, STEPS_AT_MOST = 2, 100
SECONDS_BESIDE = 3  # after which what is measured beside training is not repeated
SECONDS_OF_EVALUATION = 10  # at most; a slower machine judges fewer rows at once than a run does
SAMPLED_TOKENS = 32
WRITTEN_BYTES = 64_000_000


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What was measured."""

    micro_batches: int
    """Of each timed step: as many as the recipe's, or as time allowed."""
    step_seconds: tuple[float, ...]
    update_seconds: float
    start_seconds: float
    """What the first step took longer than those after it."""
    evaluated_token_seconds: float
    sampled_token_seconds: float
    saved_byte_seconds: float
    peak_memory_bytes: int | None
    """While training; of a CPU with all that the process holds besides. None where it can't be known."""
    evaluation_peak_memory_bytes: int | None
    """The same, after an evaluation as well."""
    process_memory_bytes: int
    """What the process held before there was a model; 0 of a GPU, where only tensors are counted."""

    def paces(self) -> tuple[StepCost, StepCost, StepCost]:
        """Fast, likely, slow: by the quartiles of the timed steps."""
        quartiles = statistics.quantiles(self.step_seconds, n=4, method="inclusive")
        fast, likely, slow = (self._pace(seconds) for seconds in quartiles)
        return fast, likely, slow

    def _pace(self, step_seconds: float) -> StepCost:
        """The pace of a run, if a timed step takes so long."""
        return StepCost(
            micro_batch=(step_seconds - self.update_seconds) / self.micro_batches,
            update=self.update_seconds,
            start=self.start_seconds,
            evaluated_token=self.evaluated_token_seconds,
            sampled_token=self.sampled_token_seconds,
            saved_byte=self.saved_byte_seconds,
        )


def measure_step_costs(
    recipe: Recipe, plan: BatchPlan, seconds: float, processes: int = 1
) -> tuple[Trial, BatchPlan] | None:
    """Train a decided recipe for about so long; also the plan, whose rows are fewer if a GPU needs it.

    It is a plan for so many processes; this one does with all micro-batches of a step what it has time for.

    None if not even a single row fits into the GPU's memory.
    """
    device = recipe.compute.device
    assert device is not None
    started_at = time.perf_counter()
    reset_peak_memory(device)
    process_memory = peak_memory_bytes(device) or 0
    state, training = build(recipe, plan)
    with progress("measure", None, "steps") as advance:
        first_at = time.perf_counter()
        while not fits(training, state):
            if training.plan.micro_batch_size == 1:
                return None
            plan = with_fewer_rows(training.plan, recipe.batch, device, processes)
            training = dataclasses.replace(training, plan=plan)
        _step(state, training, 1)
        first = time.perf_counter() - first_at
        advance(1, "compiled" if recipe.compute.compile else "")
        micro_batch, update = time_parts(state, training, min(2, plan.micro_batches(state.step)))
        advance()
        left = max(seconds - (time.perf_counter() - started_at), LEAST_SHARE * seconds)
        micro_batches = max(1, min(plan.micro_batches(state.step), int(left / (3 * micro_batch))))
        times: list[float] = []
        while len(times) < STEPS_AT_LEAST or (sum(times) < left and len(times) < STEPS_AT_MOST):
            times.append(_step(state, training, micro_batches))
            advance()
    trained_peak = peak_memory_bytes(device)
    trial = Trial(
        micro_batches=micro_batches,
        step_seconds=tuple(times),
        update_seconds=update,
        start_seconds=max(0.0, first - micro_batch - update),
        evaluated_token_seconds=_time_evaluation(recipe, state.model, micro_batch / _tokens(plan)),
        sampled_token_seconds=_time_sampling(recipe, state.model),
        saved_byte_seconds=time_writing(_existing_folder(Path("runs"))),
        peak_memory_bytes=trained_peak,
        evaluation_peak_memory_bytes=peak_memory_bytes(device),
        process_memory_bytes=process_memory,
    )
    return trial, plan


def build(recipe: Recipe, plan: BatchPlan) -> tuple[TrainState, Training]:
    """A fresh model of the recipe, and everything to train it with, on random ids."""
    device = recipe.compute.device
    assert device is not None
    model = empty_model(recipe.model)
    initialize(model, recipe.seed)
    model.to(device)
    scaler = build_scaler(device, recipe.compute.precision)
    # Any id may stand for the one that begins a document: all are as rare in these rows.
    document_separator = 0 if recipe.data.packing == "documents" else None
    training = Training(
        batches=prefetch(random_batches(model), device),
        loss=build_loss(
            model, functools.partial(next_token_loss, document_separator=document_separator), recipe.compute
        ),
        plan=plan,
        learning_rate=lambda _step: recipe.optimizer.peak_learning_rate,
        max_grad_norm=recipe.optimizer.max_grad_norm,
        seed=recipe.seed,
        device=device,
    )
    return TrainState(model, build_optimizer(model, recipe.optimizer), scaler=scaler), training


def random_batches(model: GPT) -> Callable[[int, int], Batch]:
    """(first row, rows) -> Batch of ids without meaning: they cost what a text's do."""
    generator = torch.Generator().manual_seed(0)

    def batch(_first_row: int, rows: int) -> Batch:
        shape = (2, rows, model.config.context_length)
        ids, targets = torch.randint(model.vocab_size, shape, generator=generator)
        return Batch(ids, targets)

    return batch


def _step(state: TrainState, training: Training, micro_batches: int) -> float:
    """Seconds of one step of `overnight train` with so many micro-batches."""
    plan = training.plan
    cut = constant_plan(plan.tokens_per_row, plan.micro_batch_size, micro_batches)
    return train_step(state, dataclasses.replace(training, plan=cut)).seconds


def time_parts(state: TrainState, training: Training, micro_batches: int) -> tuple[float, float]:
    """Seconds of a step's last micro-batch, and of its update: the one step that is not `train_step`'s."""
    plan, device = training.plan, training.device
    times = []
    for micro_batch in range(micro_batches):
        started_at = time.perf_counter()
        batch = training.batches(*plan.rows(state.step, micro_batch))
        nats = training.loss(batch.ids, batch.targets) / _tokens(plan) / micro_batches
        state.scaler.scale(nats).backward()  # type: ignore[no-untyped-call]
        synchronize(device)
        times.append(time.perf_counter() - started_at)
    started_at = time.perf_counter()
    parameters, learning_rate = list(state.model.parameters()), training.learning_rate(state.step)
    apply_gradients(state.optimizer, parameters, learning_rate, training.max_grad_norm, state.scaler)
    synchronize(device)
    return times[-1], time.perf_counter() - started_at


def _time_evaluation(recipe: Recipe, model: GPT, trained_token_seconds: float) -> float:
    """Seconds to judge one token; 0 if the recipe evaluates nothing."""
    if recipe.evaluation.evaluate_every_steps is None:
        return 0.0
    row_seconds = FORWARD_SHARE * trained_token_seconds * model.config.context_length
    rows = max(1, min(evaluation_rows(model), int(SECONDS_OF_EVALUATION / row_seconds)))
    batch = random_batches(model)(0, rows)
    token_bytes = [b" "] * model.vocab_size
    precision = recipe.compute.precision or "fp32"
    seconds = _seconds(lambda: evaluate_language_model(model, [batch], token_bytes, precision))
    return seconds / batch.targets.numel()


def _time_sampling(recipe: Recipe, model: GPT) -> float:
    """Seconds to write one token; 0 if the recipe samples nothing."""
    if recipe.samples.sample_every_steps is None:
        return 0.0
    decoding = Decoding(max_new_tokens=min(SAMPLED_TOKENS, recipe.samples.sample_tokens))
    prompts = [[0] for _ in recipe.samples.sample_prompts]
    seconds = _seconds(lambda: generate(model, prompts, decoding))
    return seconds / (decoding.max_new_tokens * len(prompts))


def time_writing(folder: Path) -> float:
    """Seconds to bring one byte to the disk of `folder` and to hash it, as saving a checkpoint does."""
    content = torch.randint(256, (WRITTEN_BYTES,), dtype=torch.uint8).numpy().tobytes()
    with tempfile.TemporaryFile(dir=folder) as file:
        started_at = time.perf_counter()
        file.write(content)
        file.flush()
        flush_to_disk(file.fileno())
        file.seek(0)
        hashlib.file_digest(file, "sha256")
        return (time.perf_counter() - started_at) / WRITTEN_BYTES


def _existing_folder(path: Path) -> Path:
    """`path`, or the nearest folder above it that there is."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())


def _seconds(action: Callable[[], object]) -> float:
    """Median of at most three calls; each must wait for the device by itself."""
    times: list[float] = []
    while len(times) < 3 and sum(times) < SECONDS_BESIDE:
        started_at = time.perf_counter()
        action()
        times.append(time.perf_counter() - started_at)
    return statistics.median(times)


def _tokens(plan: BatchPlan) -> int:
    """Of a micro-batch."""
    return plan.micro_batch_size * plan.tokens_per_row
