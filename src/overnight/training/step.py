"""The loop: a plan that divides a step among micro-batches, one optimizer step, and `fit`."""

from __future__ import annotations

import hashlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import NamedTuple

import torch
from torch import Tensor

from overnight.data.loader import Batch
from overnight.distributed.launcher import is_launched
from overnight.distributed.world import SINGLE_PROCESS, World
from overnight.model.loss import LossSum
from overnight.training.batch import BatchPlan
from overnight.training.optim import apply_gradients
from overnight.training.state import TrainState

Backward = Callable[[int], Tensor]
"""The number of a micro-batch -> its nats; adds its gradients to those that the parameters hold."""


AddUp = Callable[[Backward, range, Sequence[Tensor], World], Tensor]
"""(backward, this process's micro-batches, parameters, world): leaves in each parameter the sum of all
processes' gradients, and returns the sum of all their nats."""


def accumulate_gradients(
    backward: Backward, micro_batches: range, parameters: Sequence[Tensor], world: World
) -> Tensor:
    """Add each micro-batch's gradients to the sum of those before it, then, once, over all processes."""
    nats = _add_nats(backward, micro_batches)
    world.all_reduce([*map(_gradient, parameters), nats])
    return nats


def _add_nats(backward: Backward, micro_batches: range) -> Tensor:
    nats = backward(micro_batches[0])
    for number in micro_batches[1:]:
        nats = nats + backward(number)
    return nats


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None, "a parameter got no gradient"
    return parameter.grad


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
    """False: the step has changed no weight, since it was not finite, or stood out (GuardConfig)."""


STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # USR1 is what Slurm can send before its limit
Hook = Callable[[StepResult], None]


@dataclass(frozen=True, kw_only=True)
class Training:
    """What the loop needs besides the state: where batches come from, what is minimised, and how fast."""

    batches: Callable[[int, int], Batch]
    """(first row, number of rows) -> Batch on `device`; rows are numbered from the start of the run."""
    loss: Callable[[Tensor, Tensor], Tensor]
    """(ids, targets) -> summed nats."""
    plan: BatchPlan
    learning_rate: Callable[[int], float]
    """Step, counted from 0 -> learning rate."""
    max_grad_norm: float | None
    seed: int
    device: str
    spike_sigma: float | None = None
    """See GuardConfig."""
    world: World = SINGLE_PROCESS
    add_up: AddUp = accumulate_gradients
    """What adds up gradients over micro-batches and processes."""
    after_update: Callable[[], None] = lambda: None
    """What makes all processes' weights alike again, where each has updated its own only."""
    go_back: Callable[[], bool] = lambda: False
    """After each step: makes the state an earlier one if too many steps were bad, and says whether it did."""


def fit(
    state: TrainState,
    training: Training,
    total_steps: int,
    hooks: Sequence[Hook],
    stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Train until `total_steps`, or until `stopped()` after a step; every hook sees every step, in order."""
    while state.step < total_steps and not stopped():
        result = train_step(state, training)
        if not training.go_back():
            for hook in hooks:
                hook(result)


def every(steps: int | None, function: Callable[[], None], total_steps: int) -> Hook:
    """A hook that calls `function` each `steps` steps and after the last; never if `steps` is None."""

    def hook(result: StepResult) -> None:
        if steps is not None and (result.step % steps == 0 or result.step == total_steps):
            function()

    return hook


def train_step(state: TrainState, training: Training) -> StepResult:
    """One update from all of the step's tokens, however they are divided into micro-batches."""
    started_at = time.perf_counter()
    plan = training.plan
    tokens = plan.tokens(state.step)
    state.model.train()
    world, parameters = training.world, list(state.model.parameters())
    mine = plan.share(state.step, world.rank, world.size)

    left_out = state.guard.skipped_rows(state.step)

    def backward(micro_batch: int) -> Tensor:
        first_row, rows = plan.rows(state.step, micro_batch)
        batch = training.batches(first_row + left_out, rows)
        assert batch.targets.numel() * len(mine) * world.size == tokens
        _seed_dropout(state, training.seed, micro_batch)
        nats = training.loss(batch.ids, batch.targets)
        state.scaler.scale(nats / tokens).backward()  # type: ignore[no-untyped-call]
        return nats.detach()

    total = LossSum(training.add_up(backward, mine, parameters, world), tokens)
    limits = state.guard.limits(training.spike_sigma)

    def accept(norm: Tensor) -> Tensor:
        is_finite = norm.isfinite() & total.nats.isfinite()
        return is_finite & (norm <= limits.grad_norm) & (total.nats <= limits.loss * tokens)

    learning_rate = training.learning_rate(state.step)
    grad_norm, is_applied = apply_gradients(
        state.optimizer, parameters, learning_rate, training.max_grad_norm, state.scaler, accept
    )
    training.after_update()
    state.step += 1
    loss, norm, done = total.per_token(), grad_norm.item(), bool(is_applied)  # waits: the clock is honest
    state.guard = state.guard.after(loss, norm, is_applied=done, is_scaled=state.scaler.is_enabled())
    seconds = time.perf_counter() - started_at
    return StepResult(state.step, loss, norm, learning_rate, total.tokens, seconds, done)


def fits(training: Training, state: TrainState) -> bool:
    """True if one micro-batch goes forward and backward in the device's memory; the state stays as it is.

    Always true of the CPU, whose operating system gives no answer but to end the process.
    """
    if training.device == "cpu":
        return True
    try:
        batch = training.batches(*training.plan.rows(state.step, 0))
        with _moments_held(state):
            training.loss(batch.ids, batch.targets).backward()  # type: ignore[no-untyped-call]
    except torch.OutOfMemoryError:
        return False
    finally:
        state.optimizer.zero_grad(set_to_none=True)
    return True


@contextmanager
def _moments_held(state: TrainState) -> Iterator[None]:
    """Within, as much memory is taken as AdamW's two moments are going to take."""
    parameters = () if state.optimizer.state else tuple(state.model.parameters())
    held = [torch.empty_like(parameter) for parameter in parameters for _ in range(2)]
    yield
    del held


def derive_seed(*parts: int) -> int:
    """One seed from several numbers, another one for other numbers: noise needs no state of its own."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _seed_dropout(state: TrainState, seed: int, micro_batch: int) -> None:
    """Make the noise a function of (seed, step, micro-batch), so that there is no random state to save."""
    if state.model.config.dropout > 0:
        torch.manual_seed(derive_seed(seed, state.step, micro_batch))


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Yields `stopped()`: True once Ctrl-C, SIGTERM or SIGUSR1 came. A second one interrupts at once.

    A process that a launcher has started may get one from whoever sends it to all, and one more from the
    launcher that hands it on: there the second one is ignored.
    """
    received: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        if received and not is_launched():
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, note) for number in STOPPING}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
