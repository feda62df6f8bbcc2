"""One optimizer step, read from top to bottom: forward, backward, reduce, clip, update, publish."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from overnight.data.loader import BatchSource
from overnight.distributed.world import World
from overnight.training.batch import BatchPlan
from overnight.training.compute import NextTokenLoss
from overnight.training.guard import Limits
from overnight.training.moments import reserve_moments
from overnight.training.optim import clip_gradients, step_if
from overnight.training.schedule import Schedule
from overnight.training.sharding import FSDP, Replicated, ZeRO1
from overnight.training.state import TrainState


@dataclass(frozen=True, kw_only=True)
class TrainSetup:
    """Everything that a step needs except the state."""

    plan: BatchPlan
    data: BatchSource
    loss: NextTokenLoss
    schedule: Schedule
    sharing: Replicated | ZeRO1 | FSDP
    world: World
    seed: int
    max_grad_norm: float | None
    spike_sigma: float | None = None
    """See `GuardConfig`."""


class StepResult(NamedTuple):
    """What one optimizer step did."""

    step: int
    """Finished steps, this one included."""
    loss: float
    """Mean nats per token over all of the step's tokens, before the update."""
    grad_norm: float
    """Euclidean norm of all gradients together, before clipping."""
    learning_rate: float
    tokens: int
    seconds: float
    is_applied: bool = True
    """False if the update was skipped: it was not finite, or exceeded the limits of `GuardConfig`."""


def train_step(state: TrainState, setup: TrainSetup) -> StepResult:
    """One update from all tokens of the step; its division into micro-batches and processes is free."""
    started_at = time.perf_counter()
    plan, world, step = setup.plan, setup.world, state.step
    tokens, skipped_rows = plan.tokens(step), state.guard.skipped_rows(step)
    micro_batches = plan.share(step, world.rank, world.size)
    parameters = list(state.model.parameters())
    state.model.train()

    for number, micro_batch in enumerate(micro_batches):
        first_row, rows = plan.rows(step, micro_batch)
        batch = setup.data.batch(first_row + skipped_rows, rows)
        assert batch.targets.numel() * len(micro_batches) * world.size == tokens
        seed_dropout(state, setup.seed, micro_batch)
        loss = setup.loss(batch.ids, batch.targets)
        # Dividing by the tokens of the whole step makes the gradients add up to those of its mean loss.
        state.scaler.scale(loss / tokens).backward()  # type: ignore[no-untyped-call]
        nats = setup.sharing.reduce(loss.detach(), number, len(micro_batches))

    state.scaler.unscale_(state.optimizer)
    grad_norm = clip_gradients(parameters, setup.max_grad_norm)
    limits = state.guard.limits(setup.spike_sigma)
    is_sound = within_limits(nats / tokens, grad_norm, limits)
    is_applied = grad_norm.isfinite() if state.scaler.is_enabled() else is_sound
    learning_rate = setup.schedule.learning_rate(step)
    step_if(state.optimizer, state.scaler, is_sound, learning_rate)
    for parameter in parameters:
        parameter.grad = None
    setup.sharing.publish()

    state.step += 1
    mean, norm, applied = nats.item() / tokens, grad_norm.item(), bool(is_applied)  # waits for the device
    state.guard = state.guard.after(mean, norm, is_applied=applied, is_scaled=state.scaler.is_enabled())
    seconds = time.perf_counter() - started_at
    return StepResult(state.step, mean, norm, learning_rate, tokens, seconds, applied)


def within_limits(loss: Tensor, grad_norm: Tensor, limits: Limits) -> Tensor:
    """A boolean scalar: loss and gradient norm are finite and not above their limits. Stays on the device."""
    is_finite = grad_norm.isfinite() & loss.isfinite()
    return is_finite & (grad_norm <= limits.grad_norm) & (loss <= limits.loss)


def fits(state: TrainState, setup: TrainSetup) -> bool:
    """True if one micro-batch runs forward and backward in the device's memory; `state` is not changed.

    Always true on the CPU, where the operating system ends the process instead of raising an error.
    """
    if setup.world.device == "cpu":
        return True
    try:
        batch = setup.data.batch(*setup.plan.rows(state.step, 0))
        moments = reserve_moments(state.optimizer, state.model)
        setup.loss(batch.ids, batch.targets).backward()  # type: ignore[no-untyped-call]
        del moments  # the optimizer's; their memory was to be taken until now
    except torch.OutOfMemoryError:
        return False
    finally:
        state.optimizer.zero_grad(set_to_none=True)
    return True


def derive_seed(*parts: int) -> int:
    """A seed that is a pure function of these numbers, so that noise has no state to save."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def seed_dropout(state: TrainState, seed: int, micro_batch: int) -> None:
    """Make dropout a function of (seed, step, micro-batch): there is no random state to save."""
    if state.model.config.dropout > 0:
        torch.manual_seed(derive_seed(seed, state.step, micro_batch))
