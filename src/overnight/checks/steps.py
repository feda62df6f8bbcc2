"""One step of a set-up, looked at closely: its loss, and the gradients that it updates with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from overnight import trainer
from overnight.checks.check import SetUp
from overnight.data.stream import Batch
from overnight.gradients import Backward
from overnight.world import World


class Step(NamedTuple):
    """What one step did."""

    loss: float
    """Nats per token."""
    grad_norm: float
    gradients: Mapping[str, Tensor | None]
    """By parameter, of the mean over the step's tokens, not clipped."""


def step_batch(setup: SetUp) -> Batch:
    """All rows of the step that a set-up is at, in one batch."""
    plan, step = setup.training.plan, setup.state.step
    first, rows = plan.rows(step, 0)
    return setup.training.batches(first, rows * plan.micro_batches(step))


def measure_step(setup: SetUp) -> Step:
    """Do the step, as a run does it."""
    caught: dict[str, Tensor | None] = {}

    def add_up(backward: Backward, mine: range, parameters: Sequence[Tensor], world: World) -> Tensor:
        nats = setup.training.add_up(backward, mine, parameters, world)
        caught.update(
            (name, None if each.grad is None else each.grad.clone())
            for name, each in setup.state.model.named_parameters()
        )
        return nats

    result = trainer.train_step(setup.state, dataclasses.replace(setup.training, add_up=add_up))
    return Step(result.loss, result.grad_norm, caught)


def compare_gradients(found: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None]) -> float:
    """The norm of the difference, all parameters together, as a share of the expected norm."""
    off = whole = 0.0
    for name, wanted in expected.items():
        given = found[name]
        wanted_or_zero = torch.zeros(()) if wanted is None else wanted.double()
        given_or_zero = torch.zeros(()) if given is None else given.double()
        off += float((given_or_zero - wanted_or_zero).square().sum())
        whole += float(wanted_or_zero.square().sum())
    return float((off / max(whole, 1e-300)) ** 0.5)


def measure_pass(setup: SetUp) -> Step:
    """One micro-batch forward and backward, and no update."""
    batch = setup.training.batches(*setup.training.plan.rows(setup.state.step, 0))
    nats, scaler = setup.training.loss(batch.ids, batch.targets), setup.state.scaler
    scaler.scale(nats / batch.targets.numel()).backward()  # type: ignore[no-untyped-call]
    gradients = {
        name: None if each.grad is None else each.grad / scaler.get_scale()
        for name, each in setup.state.model.named_parameters()
    }
    norms = [each.norm() for each in gradients.values() if each is not None]
    return Step(nats.item() / batch.targets.numel(), float(torch.stack(norms).norm()), gradients)
