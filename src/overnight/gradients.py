"""How the gradients of a step are added up: over this process's micro-batches, then over all processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from overnight.world import World

Backward = Callable[[int], Tensor]
"""The number of a micro-batch -> its nats; adds its gradients to those that the parameters hold."""
AddUp = Callable[[Backward, range, Sequence[Tensor], World], Tensor]
"""(backward, this process's micro-batches, parameters, world): leaves in each parameter the sum of all
processes' gradients, and returns the sum of all their nats."""


def add_up(backward: Backward, micro_batches: range, parameters: Sequence[Tensor], world: World) -> Tensor:
    """Add each micro-batch's gradients to the sum of those before it, then, once, over all processes."""
    nats = _add_nats(backward, micro_batches)
    world.sum([*map(_gradient, parameters), nats])
    return nats


def add_up_shards(
    backward: Backward, micro_batches: range, _parameters: Sequence[Tensor], world: World
) -> Tensor:
    """The same where each backward pass sums its gradients over the processes by itself, as FSDP does."""
    nats = _add_nats(backward, micro_batches)
    world.sum([nats])
    return nats


def add_up_in_tree(
    backward: Backward, micro_batches: range, parameters: Sequence[Tensor], world: World
) -> Tensor:
    """Add up halves of halves: one binary tree over the step's micro-batches, whoever computes them.

    Every sum is rounded at the same places then, so that it is the same to the bit for 1, 2, 4, ...
    processes, whose number must divide that of the micro-batches. Holds as many sums as the tree is high.
    """

    def tree(part: range) -> list[Tensor]:
        if len(part) == 1:
            nats = backward(part[0])
            leaf = [*map(_gradient, parameters), nats]
            for parameter in parameters:
                parameter.grad = None
            return leaf
        half = len(part) // 2
        left, right = tree(part[:half]), tree(part[half:])
        torch._foreach_add_(left, right)
        return left

    *gradients, nats = tree(micro_batches)
    world.sum_in_tree([*gradients, nats])
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    return nats


def _add_nats(backward: Backward, micro_batches: range) -> Tensor:
    nats = backward(micro_batches[0])
    for number in micro_batches[1:]:
        nats = nats + backward(number)
    return nats


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None, "a parameter got no gradient"
    return parameter.grad
