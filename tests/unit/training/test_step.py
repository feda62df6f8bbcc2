"""One step: the same for every division into micro-batches, and that of an independent loop."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from overnight.data.loader import Batch
from overnight.distributed.world import SINGLE_PROCESS, World
from overnight.model.gpt import GPT
from overnight.model.loss import cross_entropy_nats
from overnight.model.model_config import ModelConfig
from overnight.training import OptimizerConfig
from overnight.training.batch import BatchConfig, plan_batches
from overnight.training.guard import Limits
from overnight.training.optim import build_optimizer
from overnight.training.schedule import Schedule, ScheduleConfig
from overnight.training.sharding import Replicated
from overnight.training.state import TrainState
from overnight.training.step import TrainSetup, fits, train_step, within_limits

ROWS, T = 8, 16
CONSTANT = ScheduleConfig(total_steps=10, learning_rate_decay="constant")


class RandomRows:
    """A batch source whose every row is a function of its number."""

    def batch(self, first_row: int, rows: int) -> Batch:
        drawn = [
            torch.randint(50, (T + 1,), generator=torch.Generator().manual_seed(first_row + number))
            for number in range(rows)
        ]
        rows_BT = torch.stack(drawn)
        return Batch(rows_BT[:, :-1], rows_BT[:, 1:])


def build(
    micro_batch_size: int, dropout: float = 0.0, max_grad_norm: float | None = 1.0
) -> tuple[TrainState, TrainSetup]:
    model = GPT(
        ModelConfig(n_layer=2, n_head=2, n_embd=16, context_length=T, vocab_size=50, dropout=dropout), seed=0
    )
    plan = plan_batches(BatchConfig(tokens_per_step=ROWS * T, micro_batch_size=micro_batch_size), T, 64)
    loss: Any = lambda ids, targets: cross_entropy_nats(model(ids), targets)  # noqa: E731
    setup = TrainSetup(
        plan=plan,
        data=RandomRows(),
        loss=loss,
        schedule=Schedule(CONSTANT, 1e-2, plan, 10),
        sharing=Replicated(model, SINGLE_PROCESS),
        world=SINGLE_PROCESS,
        seed=7,
        max_grad_norm=max_grad_norm,
    )
    return TrainState(model, build_optimizer(model, OptimizerConfig())), setup


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4, ROWS])
def test_steps_are_those_of_an_independent_loop_whatever_the_micro_batch(micro_batch_size):
    """Loss, norm before clipping, and weights, of torch's own AdamW on the undivided batch."""
    state, setup = build(micro_batch_size, max_grad_norm=0.1)
    twin = build(micro_batch_size)[0].model
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in twin.parameters() if p.dim() >= 2], "weight_decay": 0.1},
            {"params": [p for p in twin.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=1e-2,
        betas=(0.9, 0.95),
        foreach=False,
    )
    for step in range(4):
        batch = RandomRows().batch(step * ROWS, ROWS)
        optimizer.zero_grad()
        logits = twin(batch.ids)
        loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        optimizer.step()
        result = train_step(state, setup)
        assert (result.step, result.tokens, result.learning_rate) == (step + 1, ROWS * T, 1e-2)
        assert result.loss == pytest.approx(loss.item(), abs=1e-6)
        assert result.grad_norm == pytest.approx(norm.item(), rel=1e-5)
        last = F.cross_entropy(logits[-1:].flatten(0, 1), batch.targets[-1:].flatten())
        assert result.loss != pytest.approx(last.item(), abs=1e-6), "the negative control"
    for ours, theirs in zip(state.model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def test_dropout_is_a_function_of_seed_step_and_micro_batch():
    noise, losses = [], []
    for dropout in (0.5, 0.5, 0.0):
        state, setup = build(4, dropout)
        torch.manual_seed(len(losses))

        def noted(ids, targets, setup=setup):
            noise.append(torch.rand(1).item())
            return setup.loss(ids, targets)

        losses.append([train_step(state, replace_loss(setup, noted)).loss for _ in range(3)])
    assert losses[0] == losses[1] != losses[2]
    assert noise[:6] == noise[6:12]
    assert len(set(noise[:6])) == 6


def replace_loss(
    setup: TrainSetup, loss: Callable[[Tensor, Tensor], Tensor], device: str = "cpu"
) -> TrainSetup:
    """`fits` does not look at the device itself, only whether it is "cpu"."""
    changed: Any = loss
    return dataclasses.replace(setup, loss=changed, world=World(0, 1, device))


def test_trying_a_micro_batch_leaves_the_state_as_it_was():
    state, setup = build(micro_batch_size=2, dropout=0.5)
    before = {name: weight.clone() for name, weight in state.model.weights().items()}
    assert fits(state, replace_loss(setup, setup.loss, "a GPU"))
    assert all(torch.equal(weight, before[name]) for name, weight in state.model.weights().items())
    assert all(parameter.grad is None for parameter in state.model.parameters())
    assert (state.step, len(state.optimizer.state)) == (0, 0)


def test_micro_batch_that_runs_out_of_memory_does_not_fit_and_other_errors_are_raised():
    state, setup = build(micro_batch_size=2)
    error: RuntimeError = torch.OutOfMemoryError("CUDA out of memory")

    def fail(ids, targets):
        raise error

    assert not fits(state, replace_loss(setup, fail, "a GPU"))
    assert fits(state, replace_loss(setup, fail, "cpu")), "a CPU is not tried"
    error = RuntimeError("device-side assert")
    with pytest.raises(RuntimeError, match="device-side assert"):
        fits(state, replace_loss(setup, fail, "a GPU"))


@pytest.mark.parametrize(
    "loss, grad_norm, expected",
    [(3.0, 1.0, True), (3.1, 1.0, False), (3.0, 1.1, False)]
    + [(value, 1.0, False) for value in (math.nan, math.inf, -math.inf)]
    + [(3.0, value, False) for value in (math.nan, math.inf)],
)
def test_step_is_sound_within_its_limits(loss, grad_norm, expected):
    found = within_limits(torch.tensor(loss), torch.tensor(grad_norm), Limits(3.0, 1.0))
    assert bool(found) == expected
    if not math.isfinite(loss + grad_norm):
        assert not within_limits(torch.tensor(loss), torch.tensor(grad_norm), Limits())
