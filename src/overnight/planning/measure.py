"""A few steps of a recipe on random ids: how fast this machine trains it, and in how much memory."""

from __future__ import annotations

import dataclasses
import hashlib
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from overnight.data.loader import Batch
from overnight.distributed.world import SINGLE_PROCESS
from overnight.evaluation.perplexity import evaluate_language_model, evaluation_rows
from overnight.generation.generate import Decoding, stream_ids
from overnight.hardware import peak_memory_bytes, reset_peak_memory, synchronize
from overnight.model.gpt import GPT, init_weights, weight_shapes
from overnight.model.model_config import ModelConfig
from overnight.planning.estimate import FORWARD_SHARE, StepCost
from overnight.recipe import Recipe, Resolved
from overnight.run.setup import build_state, build_training, with_fewer_rows
from overnight.run_directory import flush_to_disk
from overnight.terminal import progress
from overnight.training.batch import BatchPlan, constant_plan
from overnight.training.optim import clip_gradients, step_if
from overnight.training.state import TrainState
from overnight.training.step import TrainSetup, fits, train_step

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
    resolved: Resolved, seconds: float, processes: int = 1
) -> tuple[Trial, Resolved] | None:
    """Train a resolved recipe for about `seconds`; also the recipe, with fewer rows if a GPU needs it.

    It is divided for `processes` processes; this one computes as many of a step's micro-batches as it has
    time for. None if not even a single row fits into the GPU's memory.
    """
    device, compute = resolved.compute.device, dataclasses.replace(resolved.compute, sharding="none")
    resolved = dataclasses.replace(resolved, compute=compute)
    started_at = time.perf_counter()
    reset_peak_memory(device)
    process_memory = peak_memory_bytes(device) or 0
    state, setup = build(resolved)
    with progress("measure", None, "steps") as advance:
        first_at = time.perf_counter()
        while not fits(state, setup):
            if resolved.plan.micro_batch_size == 1:
                return None
            resolved = with_fewer_rows(resolved, processes)
            setup = dataclasses.replace(setup, plan=resolved.plan)
        plan = resolved.plan
        _step(state, setup, 1)
        first = time.perf_counter() - first_at
        advance(1, "compiled" if compute.compile else "")
        micro_batch, update = time_parts(state, setup, min(2, plan.micro_batches(state.step)))
        advance()
        left = max(seconds - (time.perf_counter() - started_at), LEAST_SHARE * seconds)
        micro_batches = max(1, min(plan.micro_batches(state.step), int(left / (3 * micro_batch))))
        times: list[float] = []
        while len(times) < STEPS_AT_LEAST or (sum(times) < left and len(times) < STEPS_AT_MOST):
            times.append(_step(state, setup, micro_batches))
            advance()
    trained_peak = peak_memory_bytes(device)
    trial = Trial(
        micro_batches=micro_batches,
        step_seconds=tuple(times),
        update_seconds=update,
        start_seconds=max(0.0, first - micro_batch - update),
        evaluated_token_seconds=_time_evaluation(resolved, state.model, micro_batch / _tokens(plan)),
        sampled_token_seconds=_time_sampling(resolved.recipe, state.model),
        saved_byte_seconds=time_writing(_existing_folder(Path("runs"))),
        peak_memory_bytes=trained_peak,
        evaluation_peak_memory_bytes=peak_memory_bytes(device),
        process_memory_bytes=process_memory,
    )
    return trial, resolved


def build(resolved: Resolved) -> tuple[TrainState, TrainSetup]:
    """A fresh model of the recipe and its set-up, on random ids."""
    world = dataclasses.replace(SINGLE_PROCESS, device=resolved.compute.device)
    weights = init_weights(weight_shapes(resolved.model), resolved.model.n_layer, resolved.recipe.seed)
    state = build_state(resolved, weights, world)
    # Any id may stand for the one that begins a document: all are as rare in these rows.
    separator = 0 if resolved.recipe.data.packing == "documents" else None
    return state, build_training(resolved, state.model, RandomRows(resolved.model), world, separator)


class RandomRows:
    """Rows of random ids: they cost what a text's do."""

    def __init__(self, model: ModelConfig) -> None:
        self._model, self._generator = model, torch.Generator().manual_seed(0)

    def batch(self, _first_row: int, rows: int) -> Batch:
        """A batch on the CPU."""
        shape = (2, rows, self._model.context_length)
        ids, targets = torch.randint(self._model.vocabulary, shape, generator=self._generator)
        return Batch(ids, targets)


def _step(state: TrainState, setup: TrainSetup, micro_batches: int) -> float:
    """Seconds of one step of `overnight train` with so many micro-batches."""
    plan = setup.plan
    cut = constant_plan(plan.tokens_per_row, plan.micro_batch_size, micro_batches)
    return train_step(state, dataclasses.replace(setup, plan=cut)).seconds


def time_parts(state: TrainState, setup: TrainSetup, micro_batches: int) -> tuple[float, float]:
    """Seconds of a step's last micro-batch, and of its update: the one step that is not `train_step`'s."""
    plan, device = setup.plan, setup.world.device
    times = []
    for micro_batch in range(micro_batches):
        started_at = time.perf_counter()
        batch = setup.data.batch(*plan.rows(state.step, micro_batch))
        nats = setup.loss(batch.ids, batch.targets) / _tokens(plan) / micro_batches
        state.scaler.scale(nats).backward()  # type: ignore[no-untyped-call]
        synchronize(device)
        times.append(time.perf_counter() - started_at)
    started_at = time.perf_counter()
    state.scaler.unscale_(state.optimizer)
    norm = clip_gradients(list(state.model.parameters()), setup.max_grad_norm)
    step_if(state.optimizer, state.scaler, norm.isfinite(), setup.schedule.learning_rate(state.step))
    state.optimizer.zero_grad(set_to_none=True)
    synchronize(device)
    return times[-1], time.perf_counter() - started_at


def _time_evaluation(resolved: Resolved, model: GPT, trained_token_seconds: float) -> float:
    """Seconds to judge one token; 0 if the recipe evaluates nothing."""
    if resolved.recipe.evaluation.evaluate_every_steps is None:
        return 0.0
    row_seconds = FORWARD_SHARE * trained_token_seconds * model.config.context_length
    rows = max(1, min(evaluation_rows(model), int(SECONDS_OF_EVALUATION / row_seconds)))
    batch = RandomRows(model.config).batch(0, rows)
    token_bytes = [b" "] * model.vocab_size
    precision = resolved.compute.precision
    seconds = _seconds(lambda: evaluate_language_model(model, [batch], token_bytes, precision))
    return seconds / batch.targets.numel()


def _time_sampling(recipe: Recipe, model: GPT) -> float:
    """Seconds to write one token; 0 if the recipe samples nothing."""
    if recipe.samples.sample_every_steps is None:
        return 0.0
    decoding = Decoding(max_new_tokens=min(SAMPLED_TOKENS, recipe.samples.sample_tokens))
    prompts = [[0] for _ in recipe.samples.sample_prompts]
    seconds = _seconds(lambda: list(stream_ids(model, prompts, decoding)))
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
