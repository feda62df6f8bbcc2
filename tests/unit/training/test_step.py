from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from overnight.data.loader import Batch
from overnight.model.gpt import GPT, initialize
from overnight.model.loss import cross_entropy_nats
from overnight.model.model_config import ModelConfig
from overnight.training import OptimizerConfig
from overnight.training.batch import BatchConfig, plan_batches
from overnight.training.optim import build_optimizer
from overnight.training.state import TrainState
from overnight.training.step import StepResult, Training, every, fit, fits, stop_on_signal, train_step

ROWS, T = 8, 16


def row(number: int) -> Tensor:
    return torch.randint(50, (T + 1,), generator=torch.Generator().manual_seed(number))


def batches(first_row: int, rows: int) -> Batch:
    stretch = torch.stack([row(first_row + number) for number in range(rows)])
    return Batch(stretch[:, :-1], stretch[:, 1:])


def build(
    rows_at_once: int, dropout: float = 0.0, max_grad_norm: float | None = 1.0
) -> tuple[TrainState, Training]:
    model = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=16, context_length=T, vocab_size=50, dropout=dropout))
    initialize(model, seed=0)
    training = Training(
        batches=batches,
        loss=lambda ids, targets: cross_entropy_nats(model(ids), targets),
        plan=plan_batches(BatchConfig(tokens_per_step=ROWS * T, micro_batch_size=rows_at_once), T, 64),
        learning_rate=lambda step: 1e-2,
        max_grad_norm=max_grad_norm,
        seed=7,
        device="cpu",
    )
    return TrainState(model, build_optimizer(model, OptimizerConfig())), training


def run(rows_at_once: int, steps: int, dropout: float = 0.0) -> tuple[TrainState, list[StepResult]]:
    state, training = build(rows_at_once, dropout)
    results: list[StepResult] = []
    fit(state, training, steps, [results.append])
    return state, results


@pytest.mark.parametrize("rows_at_once", [1, 2, 4])
def test_a_step_is_the_same_however_it_is_divided(rows_at_once: int) -> None:
    whole_state, whole = run(ROWS, steps=3)
    state, divided = run(rows_at_once, steps=3)
    for one, other in zip(whole, divided, strict=True):
        assert other.loss == pytest.approx(one.loss, abs=1e-6)
        assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-5)
    for a, b in zip(whole_state.model.parameters(), state.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_the_loss_is_the_mean_over_all_of_the_steps_tokens() -> None:
    state, training = build(rows_at_once=2)
    batch = batches(0, ROWS)
    with torch.no_grad():
        logits = state.model(batch.ids)
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()).item()
    result = train_step(state, training)
    assert result.loss == pytest.approx(expected, abs=1e-6)
    assert (result.step, result.tokens, result.learning_rate) == (1, ROWS * T, 1e-2)


def test_the_last_micro_batchs_loss_would_not_pass_for_it() -> None:
    """The negative control of the test above."""
    state, _ = build(rows_at_once=2)
    batch = batches(0, ROWS)
    with torch.no_grad():
        nats = cross_entropy_nats(state.model(batch.ids), batch.targets).item() / (ROWS * T)
        last = cross_entropy_nats(state.model(batch.ids[-2:]), batch.targets[-2:]).item() / (2 * T)
    assert last != pytest.approx(nats, abs=1e-6)


def test_gradients_are_those_of_an_independent_loop() -> None:
    state, training = build(rows_at_once=4, max_grad_norm=None)
    twin, _ = build(rows_at_once=4)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in twin.model.parameters() if p.dim() >= 2], "weight_decay": 0.1},
            {"params": [p for p in twin.model.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=1e-2,
        betas=(0.9, 0.95),
        foreach=False,
    )
    for step in range(4):
        batch = batches(step * ROWS, ROWS)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(
            twin.model(batch.ids).flatten(0, 1), batch.targets.flatten()
        ).backward()
        optimizer.step()
        train_step(state, training)
    for ours, theirs in zip(state.model.parameters(), twin.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def test_dropout_is_a_function_of_seed_and_step() -> None:
    _, first = run(4, steps=3, dropout=0.3)
    torch.manual_seed(999)
    _, second = run(4, steps=3, dropout=0.3)
    _, without = run(4, steps=3)
    assert [result.loss for result in first] == [result.loss for result in second]
    assert [result.loss for result in first] != [result.loss for result in without]


def test_each_step_and_micro_batch_drops_something_else() -> None:
    state, training = build(4, dropout=0.5)
    drawn = []

    def noise(ids: Tensor, targets: Tensor) -> Tensor:
        drawn.append(torch.rand(1).item())
        return cross_entropy_nats(state.model(ids), targets)

    noisy = Training(**{**vars(training), "loss": noise})
    fit(state, noisy, 3, [])
    assert len(set(drawn)) == 6


def test_hooks_see_every_step_in_order_and_a_stop_comes_after_a_step() -> None:
    state, training = build(ROWS)
    seen: list[str] = []
    hooks = [lambda result: seen.append(f"a{result.step}"), lambda result: seen.append(f"b{result.step}")]
    fit(state, training, 10, hooks, stopped=lambda: state.step >= 2)
    assert seen == ["a1", "b1", "a2", "b2"]


@pytest.mark.parametrize("interval, expected", [(3, [3, 6, 7]), (1, [1, 2, 3, 4, 5, 6, 7]), (None, [])])
def test_every(interval: int | None, expected: list[int]) -> None:
    called: list[int] = []
    step = 0
    hook = every(interval, lambda: called.append(step), total_steps=7)
    for step in range(1, 8):  # noqa: B007  # the hook's function reads it
        hook(StepResult(step, 0.0, 0.0, 0.0, 0, 0.0))
    assert called == expected


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_the_first_signal_asks_and_the_second_insists(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_on_signal() as stopped:
        assert not stopped()
        os.kill(os.getpid(), number)
        assert stopped()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def on_a_gpu(training: Training, loss: Callable[[Tensor, Tensor], Tensor]) -> Training:
    """Anything but "cpu": what is tried does not look at the device itself."""
    return dataclasses.replace(training, device="a GPU", loss=loss)


def test_trying_a_micro_batch_leaves_the_state_as_it_was() -> None:
    state, training = build(rows_at_once=2, dropout=0.5)
    before = {name: weight.clone() for name, weight in state.model.weights().items()}
    assert fits(on_a_gpu(training, training.loss), state)
    assert all(torch.equal(weight, before[name]) for name, weight in state.model.weights().items())
    assert all(parameter.grad is None for parameter in state.model.parameters())
    assert (state.step, len(state.optimizer.state)) == (0, 0)


def test_a_micro_batch_that_runs_out_of_memory_does_not_fit() -> None:
    state, training = build(rows_at_once=2)

    def out_of_memory(ids: Tensor, targets: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert not fits(on_a_gpu(training, out_of_memory), state)
    assert fits(dataclasses.replace(training, loss=out_of_memory), state), "a CPU is not tried"


def test_what_else_goes_wrong_while_trying_is_not_swallowed() -> None:
    state, training = build(rows_at_once=2)

    def wrong(ids: Tensor, targets: Tensor) -> Tensor:
        raise RuntimeError("device-side assert")

    with pytest.raises(RuntimeError, match="device-side assert"):
        fits(on_a_gpu(training, wrong), state)
