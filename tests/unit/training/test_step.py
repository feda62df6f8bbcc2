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
from overnight.training.step import StepResult, TrainSetup, fits, train_step, within_limits

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


def run(micro_batch_size: int, steps: int, dropout: float = 0.0) -> tuple[TrainState, list[StepResult]]:
    state, setup = build(micro_batch_size, dropout)
    return state, [train_step(state, setup) for _ in range(steps)]


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_step_does_not_depend_on_the_micro_batch(micro_batch_size):
    whole_state, whole = run(ROWS, steps=3)
    state, divided = run(micro_batch_size, steps=3)
    for one, other in zip(whole, divided, strict=True):
        assert other.loss == pytest.approx(one.loss, abs=1e-6)
        assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-5)
    for a, b in zip(whole_state.model.parameters(), state.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_loss_is_the_mean_over_all_tokens_of_the_step():
    """The negative control: the last micro-batch's mean differs."""
    state, setup = build(micro_batch_size=2)
    batch = RandomRows().batch(0, ROWS)
    with torch.no_grad():
        logits = state.model(batch.ids)
        expected = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()).item()
        last = F.cross_entropy(logits[-2:].flatten(0, 1), batch.targets[-2:].flatten()).item()
    result = train_step(state, setup)
    assert result.loss == pytest.approx(expected, abs=1e-6) != pytest.approx(last, abs=1e-6)
    assert (result.step, result.tokens, result.learning_rate) == (1, ROWS * T, 1e-2)


def test_steps_are_those_of_an_independent_loop():
    state, setup = build(micro_batch_size=4, max_grad_norm=None)
    twin = build(micro_batch_size=4)[0].model
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
        F.cross_entropy(twin(batch.ids).flatten(0, 1), batch.targets.flatten()).backward()
        optimizer.step()
        train_step(state, setup)
    for ours, theirs in zip(state.model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def test_dropout_is_a_function_of_seed_and_step():
    _, first = run(4, steps=3, dropout=0.3)
    torch.manual_seed(999)
    _, second = run(4, steps=3, dropout=0.3)
    _, without = run(4, steps=3)
    assert [result.loss for result in first] == [result.loss for result in second]
    assert [result.loss for result in first] != [result.loss for result in without]


def test_dropout_differs_between_steps_and_micro_batches():
    state, setup = build(4, dropout=0.5)
    drawn = []

    def noise(ids, targets):
        drawn.append(torch.rand(1).item())
        return setup.loss(ids, targets)

    for _ in range(3):
        train_step(state, replace_loss(setup, noise))
    assert len(set(drawn)) == 6


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


@pytest.mark.parametrize("device, expected", [("a GPU", False), ("cpu", True)])  # a CPU is not tried
def test_micro_batch_that_runs_out_of_memory_does_not_fit(device, expected):
    state, setup = build(micro_batch_size=2)

    def out_of_memory(ids, targets):
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert fits(state, replace_loss(setup, out_of_memory, device)) == expected


def test_other_errors_of_a_trial_are_raised():
    state, setup = build(micro_batch_size=2)

    def wrong(ids, targets):
        raise RuntimeError("device-side assert")

    with pytest.raises(RuntimeError, match="device-side assert"):
        fits(state, replace_loss(setup, wrong, "a GPU"))


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
