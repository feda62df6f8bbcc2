"""What processes share, as far as one process can show it; several are in tests/distributed."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from overnight.distributed.world import SINGLE_PROCESS, World
from overnight.model.gpt import GPT, init_weights
from overnight.model.model_config import ModelConfig, parameter_shapes
from overnight.model.presets import PRESETS
from overnight.training import Compute, OptimizerConfig
from overnight.training.sharding import (
    FSDP,
    GradientTree,
    Replicated,
    ZeRO1,
    assign_parameters,
    build_sharded_model,
    build_sharded_optimizer,
    build_sharing,
    largest_share,
    unsupported_reasons,
)

CONFIG = ModelConfig(n_layer=2, n_head=2, n_embd=16, context_length=8, vocab_size=50)
COMPUTE = Compute(device="cpu", precision="fp32", compile=False, attention="fused", loss="full")
SHAPES = [(3, 4), (5,)]
Leaf = list[Tensor]
"""A micro-batch's gradients and its nats."""


@dataclass(frozen=True)
class Recorder(World):
    """One of several processes; what it sends goes nowhere but into `sent`."""

    sent: list[tuple[str, int]] = field(default_factory=list)

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        self.sent.append(("all_reduce", len(tensors)))

    def tree_all_reduce(self, tensors: Sequence[Tensor]) -> None:
        self.sent.append(("tree_all_reduce", len(tensors)))


def one_of(size: int, rank: int = 0, local_size: int | None = None) -> World:
    return World(rank, size, "cpu", rank % (local_size or size), local_size or size, is_distributed=True)


def draw_leaves(count: int) -> list[Leaf]:
    """Numbers of very different sizes, whose sums are rounded."""
    generator = torch.Generator().manual_seed(count)
    return [
        [torch.randn(shape, generator=generator) * 10 ** (number % 5) for shape in [*SHAPES, ()]]
        for number in range(count)
    ]


def add(one: Leaf, other: Leaf) -> Leaf:
    return [mine + theirs for mine, theirs in zip(one, other, strict=True)]


def add_halves(leaves: list[Leaf]) -> Leaf:
    """The tree as it is described: halves of halves."""
    if len(leaves) == 1:
        return leaves[0]
    half = len(leaves) // 2
    return add(add_halves(leaves[:half]), add_halves(leaves[half:]))


def reduce(leaves: list[Leaf], world: World = SINGLE_PROCESS, *, deterministic: bool) -> Leaf:
    """What a process leaves in its gradients after a step of these micro-batches, and the nats."""
    model: Any = torch.nn.ParameterList([torch.zeros(shape) for shape in SHAPES])
    sharing = Replicated(model, world, deterministic=deterministic)
    nats = torch.zeros(())
    for number, (*gradients, own_nats) in enumerate(leaves):
        sum((p * grad).sum() for p, grad in zip(model, gradients, strict=True)).backward()
        nats = sharing.reduce(own_nats.clone(), number, len(leaves))
    return [parameter.grad for parameter in model] + [nats]


def are_equal(one: Leaf, other: Leaf) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


@given(st.integers(1, 40))
def test_micro_batches_add_up_in_order_or_as_a_tree_of_halves(count):
    leaves, tree, most = draw_leaves(count), GradientTree(), 0
    for number, leaf in enumerate(leaves):
        tree.add([tensor.clone() for tensor in leaf], number, count)
        most = max(most, len(tree._sums))
    assert are_equal(tree.take(), add_halves(leaves))
    assert most <= math.ceil(math.log2(count)) + 1, "one sum for each level of the tree"
    assert are_equal(reduce(leaves, deterministic=True), add_halves(leaves))
    assert are_equal(reduce(leaves, deterministic=False), functools.reduce(add, leaves))


@given(st.integers(0, 4), st.integers(1, 6))
def test_tree_does_not_depend_on_the_number_of_processes(height, each):
    """2^height processes sum their shares; neighbours, then pairs of them, are added as `World` does."""
    size = 2**height
    leaves = draw_leaves(size * each)
    sums = [
        reduce(leaves[rank * each : (rank + 1) * each], Recorder(rank, size, "cpu"), deterministic=True)
        for rank in range(size)
    ]
    while len(sums) > 1:
        sums = [add(sums[index], sums[index + 1]) for index in range(0, len(sums), 2)]
    assert are_equal(sums[0], reduce(leaves, deterministic=True))


def test_sums_in_order_depend_on_the_number_of_processes():
    """The negative control."""
    leaves = draw_leaves(12)
    first, second, everything = (functools.reduce(add, each) for each in (leaves[:6], leaves[6:], leaves))
    assert not are_equal(add(first, second), everything)
    assert not are_equal(add_halves(leaves), everything)


def test_processes_communicate_once_a_step():
    """All gradients and the nats together; FSDP's backward pass has summed the gradients already."""
    worlds = [Recorder(0, 2, "cpu") for _ in range(3)]
    reduce(draw_leaves(3), worlds[0], deterministic=False)
    reduce(draw_leaves(3), worlds[1], deterministic=True)
    sharded = FSDP(GPT(CONFIG), worlds[2])
    for number in range(3):
        nats = sharded.reduce(torch.tensor(1.0 + number), number, 3)
    assert [world.sent for world in worlds] == [
        [("all_reduce", 3)],
        [("tree_all_reduce", 3)],
        [("all_reduce", 1)],
    ]
    assert nats == 1 + 2 + 3


def test_hsdp_crosses_machines_once_a_step():
    """In the last backward pass of a step; the flag concerns the pass that follows."""
    model, flags = GPT(CONFIG), []
    model.set_requires_all_reduce = flags.append
    sharing = FSDP(model, SINGLE_PROCESS, machines=2)
    for _ in range(2):
        for number in range(4):
            sharing.reduce(torch.zeros(()), number, 4)
    assert flags == [False, False, True, False] * 2
    sharing.reduce(torch.zeros(()), 0, 1)
    assert flags[-1] is True


@pytest.mark.parametrize("deterministic", [False, True])
def test_parameter_without_gradient_is_noticed(deterministic):
    sharing = Replicated(GPT(CONFIG), SINGLE_PROCESS, deterministic=deterministic)
    with pytest.raises(AssertionError, match="no gradient"):
        sharing.reduce(torch.zeros(()), 0, 1)


@pytest.mark.parametrize(
    "sharding, expected, machines",
    [("none", Replicated, None), ("zero1", ZeRO1, None), ("fsdp", FSDP, 1), ("hsdp", FSDP, 2)],
)
def test_sharing_of_each_sharding(sharding, expected, machines):
    sharing = build_sharing(GPT(CONFIG), one_of(8, local_size=4), sharding, deterministic=False)
    assert type(sharing) is expected
    assert getattr(sharing, "machines", None) == machines


def test_model_is_built_of_all_given_weights():
    weights = dict(init_weights(CONFIG, 1))
    built = build_sharded_model(CONFIG, weights.items(), SINGLE_PROCESS, "none")
    for one, two in zip(built.parameters(), GPT(CONFIG, seed=1).parameters(), strict=True):
        assert torch.equal(one, two), "and the padding of the vocabulary is zero"
    del weights["ln_f.bias"]
    with pytest.raises(AssertionError, match=r"ln_f\.bias"):
        build_sharded_model(CONFIG, weights.items(), SINGLE_PROCESS, "none")


def updated_by(model: GPT, size: int, rank: int, sharding: Any) -> list[int]:
    """The addresses of the parameters that a process updates."""
    compute = replace(COMPUTE, sharding=sharding)
    matrices, vectors = build_sharded_optimizer(
        model, OptimizerConfig(), one_of(size, rank), compute
    ).param_groups
    assert all(parameter.dim() >= 2 for parameter in matrices["params"])
    assert matrices["weight_decay"] > vectors["weight_decay"] == 0
    return [parameter.data_ptr() for group in (matrices, vectors) for parameter in group["params"]]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 40])
def test_zero1_updates_every_parameter_in_exactly_one_process(size):
    """Also where there are more processes than parameters."""
    model = GPT(CONFIG)
    everyone = sorted(parameter.data_ptr() for parameter in model.parameters())
    assert sorted(p for rank in range(size) for p in updated_by(model, size, rank, "zero1")) == everyone
    assert sorted(updated_by(model, size, size - 1, "none")) == everyone
    assert sorted(updated_by(model, size, size - 1, "fsdp")) == everyone


@pytest.mark.parametrize(
    "sharding, precision, world, deterministic, named",
    [
        ("fsdp", "fp32", SINGLE_PROCESS, False, "sharding=fsdp"),
        ("zero1", "fp16", one_of(2), False, "precision=fp16"),
        ("fsdp", "fp32", one_of(2), True, "deterministic_reduce=True"),
        ("hsdp", "fp32", one_of(2), True, "deterministic_reduce=True"),
        ("none", "fp32", one_of(3), True, "not 3"),
        ("none", "fp32", one_of(6), True, "not 6"),
        ("hsdp", "fp32", one_of(6, local_size=4), False, "sharding=hsdp"),
        ("none", "fp32", SINGLE_PROCESS, True, None),
        ("none", "fp16", one_of(2), False, None),
        ("fsdp", "bf16", one_of(3), False, None),
        ("fsdp", "fp32", one_of(1), False, None),
        ("hsdp", "bf16", one_of(8, local_size=4), False, None),
        ("zero1", "fp32", one_of(8), True, None),
    ],
)
def test_unsupported_combination_is_named(sharding, precision, world, deterministic, named):
    compute = replace(COMPUTE, sharding=sharding, precision=precision, deterministic_reduce=deterministic)
    found = unsupported_reasons(compute, world)
    assert len(found) == (named is not None)
    assert named is None or named in found[0]


def assign_naively(sizes: dict[str, int], ranks: int) -> dict[str, int]:
    """While any is left: the first of the largest goes to the rank that owns least."""
    left, owned, owner = dict(sizes), [0] * ranks, {}
    while left:
        largest = max(left, key=left.__getitem__)
        owner[largest] = owned.index(min(owned))
        owned[owner[largest]] += left.pop(largest)
    return owner


@given(st.dictionaries(st.text(max_size=3), st.integers(0, 1000), min_size=1, max_size=12), st.integers(1, 5))
def test_owners_of_parameters_are_those_of_a_naive_twin(sizes, ranks):
    owners = assign_parameters(sizes, ranks)
    assert owners == assign_naively(sizes, ranks)
    assert list(owners) == list(sizes), "in their order"
    most, even = largest_share(sizes, ranks), sum(sizes.values()) / ranks
    assert most == largest_share(dict(reversed(sizes.items())), ranks)
    assert even <= most <= even + max(sizes.values())
    with pytest.raises(ValueError, match="ranks=0"):
        assign_parameters(sizes, 0)


@pytest.mark.parametrize("ranks", [2, 8, 64])
@pytest.mark.parametrize("name", ["gpt2-124m", "gpt2-1558m", "gpt3-13b"])
def test_gpt2_parameters_are_divided_evenly(name, ranks):
    """Within a tenth, unless one parameter, the embedding, is larger than a share."""
    sizes = {each: math.prod(shape) for each, shape in parameter_shapes(PRESETS[name]).items()}
    assert largest_share(sizes, ranks) <= max(1.1 * sum(sizes.values()) / ranks, *sizes.values())
