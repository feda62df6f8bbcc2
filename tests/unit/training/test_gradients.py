from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from overnight.distributed.world import SINGLE_PROCESS, World
from overnight.training.sharding import accumulate_gradients_bitwise, accumulate_gradients_fsdp
from overnight.training.step import accumulate_gradients

SHAPES = [(3, 4), (5,)]
Leaf = list[Tensor]
"""A micro-batch's gradients and its nats."""


@dataclass(frozen=True)
class Overheard(World):
    """One of several processes, whose words go nowhere but into `said`."""

    said: list[tuple[str, int]] = field(default_factory=list)

    def sum(self, tensors: Sequence[Tensor]) -> None:
        self.said.append(("sum", len(tensors)))

    def tree_all_reduce(self, tensors: Sequence[Tensor]) -> None:
        self.said.append(("sum_in_tree", len(tensors)))


def draw_leaves(count: int) -> list[Leaf]:
    """Numbers of very different sizes, whose sums are rounded."""
    generator = torch.Generator().manual_seed(count)
    return [
        [torch.randn(shape, generator=generator) * 10 ** (number % 5) for shape in [*SHAPES, ()]]
        for number in range(count)
    ]


def build(leaves: list[Leaf]) -> tuple[list[torch.nn.Parameter], Callable[[int], Tensor]]:
    """Parameters, and the backward pass that adds a leaf's gradients to theirs as autograd does."""
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in SHAPES]

    def backward(number: int) -> Tensor:
        *gradients, nats = leaves[number]
        loss = sum((parameter * grad).sum() for parameter, grad in zip(parameters, gradients, strict=True))
        assert isinstance(loss, Tensor)
        loss.backward()  # type: ignore[no-untyped-call]
        return nats.clone()

    return parameters, backward


def add(one: Leaf, other: Leaf) -> Leaf:
    return [mine + theirs for mine, theirs in zip(one, other, strict=True)]


def halves(leaves: list[Leaf]) -> Leaf:
    """The tree as it is described: halves of halves."""
    if len(leaves) == 1:
        return leaves[0]
    half = len(leaves) // 2
    return add(halves(leaves[:half]), halves(leaves[half:]))


def in_order(leaves: list[Leaf]) -> Leaf:
    """One after the other."""
    total = leaves[0]
    for leaf in leaves[1:]:
        total = add(total, leaf)
    return total


def summed(
    way: Callable[..., Tensor], leaves: list[Leaf], part: range, world: World = SINGLE_PROCESS
) -> Leaf:
    """What a way of adding up leaves in the parameters, and the nats."""
    parameters, backward = build(leaves)
    nats = way(backward, part, parameters, world)
    return [parameter.grad.clone() for parameter in parameters if parameter.grad is not None] + [nats]


def are_equal(one: Leaf, other: Leaf) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


@given(st.integers(1, 40))
def test_micro_batches_are_added_one_after_the_other(count: int) -> None:
    leaves = draw_leaves(count)
    assert are_equal(summed(accumulate_gradients, leaves, range(count)), in_order(leaves))


@given(st.integers(1, 40))
def test_the_tree_is_made_of_halves_of_halves(count: int) -> None:
    leaves = draw_leaves(count)
    assert are_equal(summed(accumulate_gradients_bitwise, leaves, range(count)), halves(leaves))


@given(st.integers(0, 4), st.integers(1, 6))
def test_the_tree_does_not_depend_on_who_computes_its_branches(height: int, each: int) -> None:
    """2^height processes add up their shares; neighbours, then pairs of them, are added as the world does."""
    size = 2**height
    leaves = draw_leaves(size * each)
    sums = [
        summed(
            accumulate_gradients_bitwise,
            leaves,
            range(rank * each, (rank + 1) * each),
            Overheard(rank, size, "cpu"),
        )
        for rank in range(size)
    ]
    while len(sums) > 1:
        sums = [add(sums[place], sums[place + 1]) for place in range(0, len(sums), 2)]
    assert are_equal(sums[0], summed(accumulate_gradients_bitwise, leaves, range(size * each)))


def test_one_after_the_other_does_depend_on_it() -> None:
    """The negative control."""
    leaves = draw_leaves(12)
    shares = [in_order(leaves[:6]), in_order(leaves[6:])]
    assert not are_equal(add(*shares), in_order(leaves))
    assert not are_equal(halves(leaves), in_order(leaves))


@pytest.mark.parametrize(
    "way, depth",
    [(accumulate_gradients, lambda n: n), (accumulate_gradients_bitwise, lambda n: math.log2(n) + 1)],
)
def test_sums_are_as_near_to_float64_s_as_their_depth_allows(
    way: Callable[..., Tensor], depth: Callable[[int], float]
) -> None:
    """Higham 2002, Accuracy and Stability, 4.2: the error is at most depth x epsilon x the sum of sizes."""
    leaves = draw_leaves(37)
    for found, *terms in zip(summed(way, leaves, range(37)), *leaves, strict=True):
        exact = sum(term.double() for term in terms)
        sizes = sum(term.double().abs() for term in terms)
        assert ((found.double() - exact).abs() <= depth(37) * 2**-23 * sizes).all()


def test_a_tree_holds_no_more_sums_than_it_is_high() -> None:
    leaves = draw_leaves(64)
    parameters, plain = build(leaves)
    held: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0

    def backward(number: int) -> Tensor:
        nonlocal most
        nats = plain(number)
        gradient = parameters[0].grad
        assert gradient is not None
        held.add(gradient)
        most = max(most, len(held))
        return nats

    accumulate_gradients_bitwise(backward, range(64), parameters, SINGLE_PROCESS)
    assert most <= 6 + 1


def test_processes_talk_once_a_step() -> None:
    """All gradients and the nats go together; where torch has summed the gradients, only the nats."""
    for way, said in (
        (accumulate_gradients, ("sum", 3)),
        (accumulate_gradients_bitwise, ("sum_in_tree", 3)),
        (accumulate_gradients_fsdp, ("sum", 1)),
    ):
        world = Overheard(0, 2, "cpu")
        summed(way, draw_leaves(6), range(3), world)
        assert world.said == [said]


@pytest.mark.parametrize("way", [accumulate_gradients, accumulate_gradients_bitwise])
def test_a_parameter_without_a_gradient_is_noticed(way: Callable[..., Tensor]) -> None:
    parameters, backward = build(draw_leaves(2))
    forgotten = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(AssertionError, match="a parameter got no gradient"):
        way(backward, range(2), [*parameters, forgotten], SINGLE_PROCESS)
