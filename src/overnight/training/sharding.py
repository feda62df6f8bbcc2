"""Replicated training, ZeRO-1 and FSDP, applied to a built model: one class for each.

none: every process holds all weights, gradients and moments, and gradients are summed once a step.
zero1: each process keeps AdamW's moments of the parameters that it owns, updates these and sends them to the
others (Rajbhandari et al. 2020, ZeRO, stage 1). fsdp: each keeps rows of every weight, gradient and moment;
a block's weights are gathered while it computes (stage 3, torch's `fully_shard`). hsdp: fsdp among the
processes of each machine, and the machines hold the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.optim import AdamW

from overnight.distributed.world import World
from overnight.model.gpt import GPT, empty_model
from overnight.model.model_config import ModelConfig, weight_shapes
from overnight.training import Compute, OptimizerConfig, Sharding
from overnight.training.muon import Muon
from overnight.training.optim import build_optimizer
from overnight.training.state import set_weights

FULLY_SHARDED = ("fsdp", "hsdp")


class Replicated:
    """Every process holds the whole model and applies the same update."""

    def __init__(self, model: GPT, world: World, *, deterministic: bool = False) -> None:
        self.model, self.world = model, world
        self.parameters = list(model.parameters())
        self._tree = GradientTree() if deterministic else None
        self._nats = torch.zeros(())

    def reduce(self, nats: Tensor, number: int, count: int) -> Tensor:
        """Called after each backward pass with its loss; micro-batch `number` of this process's `count`.

        Gradients of micro-batches add up in `.grad`. After the last they are summed over processes, once.
        Returns the step's loss so far; after the last micro-batch, summed over all processes.
        """
        if self._tree is not None:
            return self._reduce_in_tree(self._tree, nats, number, count)
        self._nats = nats if number == 0 else self._nats + nats
        if number == count - 1:
            self.world.all_reduce([*map(_gradient, self.parameters), self._nats])
        return self._nats

    def publish(self) -> None:
        """Called after the update: nothing to send, since every process made the same update."""

    def _reduce_in_tree(self, tree: GradientTree, nats: Tensor, number: int, count: int) -> Tensor:
        tree.add([*map(_gradient, self.parameters), nats], number, count)
        for parameter in self.parameters:
            parameter.grad = None
        if number < count - 1:
            return nats
        *gradients, total = tree.take()
        self.world.tree_all_reduce([*gradients, total])
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        return total


class ZeRO1(Replicated):
    """As `Replicated`, but each parameter has one owner, which alone holds its moments and updates it."""

    def publish(self) -> None:
        """Called after the update: each owner broadcasts its parameters."""
        owners, named = parameter_owners(self.model, self.world), dict(self.model.named_parameters())
        for rank in range(self.world.size):
            owned = [named[name].detach() for name, owner in owners.items() if owner == rank]
            self.world.broadcast(owned, rank)


class FSDP:
    """Every process holds rows of every parameter; backward passes sum gradients over processes."""

    def __init__(self, model: GPT, world: World, *, machines: int = 1) -> None:
        self.model, self.world, self.machines = model, world, machines
        self._nats = torch.zeros(())

    def reduce(self, nats: Tensor, number: int, count: int) -> Tensor:
        """As `Replicated.reduce`; only the loss is left to sum. Between machines, gradients cross once."""
        if self.machines > 1:
            # The flag concerns the next backward pass. A step whose first pass has it set although others
            # follow (the run's first, and where a batch ramp leaves 1) is summed once more, to the same sum.
            sharded: Any = self.model
            sharded.set_requires_all_reduce(count == 1 or number + 2 == count)
        self._nats = nats if number == 0 else self._nats + nats
        if number == count - 1:
            self.world.all_reduce([self._nats])
        return self._nats

    def publish(self) -> None:
        """Called after the update: nothing to send, since weights are gathered when they are used."""


class GradientTree:
    """Sums of gradients in one fixed binary tree over a step's micro-batches, on any process.

    Every sum is then rounded in the same way for 1, 2, 4, ... processes, whose number must divide that of
    the micro-batches. Holds one sum for each level of the tree.
    """

    def __init__(self) -> None:
        self._sums: list[list[Tensor]] = []

    def add(self, leaf: list[Tensor], number: int, count: int) -> None:
        """Add the tensors of leaf `number` of `count`, in order; merges every subtree that it completes."""
        self._sums.append(leaf)
        for _ in range(completed_subtrees(number, count)):
            right = self._sums.pop()
            torch._foreach_add_(self._sums[-1], right)

    def take(self) -> list[Tensor]:
        """The sum over all leaves."""
        (total,) = self._sums
        self._sums = []
        return total


def completed_subtrees(number: int, count: int) -> int:
    """How many inner nodes end with leaf `number`, in the tree that halves `count` leaves recursively."""
    first, end, completed = 0, count, 0
    while end - first > 1:
        completed += number == end - 1
        half = first + (end - first) // 2
        first, end = (first, half) if number < half else (half, end)
    return completed


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None, "a parameter got no gradient"
    return parameter.grad


def build_sharing(
    model: GPT, world: World, sharding: Sharding, *, deterministic: bool
) -> Replicated | ZeRO1 | FSDP:
    """The sharing of `model`'s training among the processes of `world`."""
    if sharding in FULLY_SHARDED:
        sharers = count_sharers(sharding, world.size, world.local_size)
        return FSDP(model, world, machines=world.size // sharers)
    kind = ZeRO1 if sharding == "zero1" else Replicated
    return kind(model, world, deterministic=deterministic)


def build_sharded_model(
    config: ModelConfig, weights: Iterable[tuple[str, Tensor]] | None, world: World, sharding: Sharding
) -> GPT:
    """A model on the world's device with these weights or, sharded, with this process's rows of them.

    Weights are taken one at a time, so that no process ever holds a whole sharded model. None leaves them
    uninitialised, to be loaded.
    """
    if sharding in FULLY_SHARDED:
        with torch.device("meta"):
            model = GPT(config)
        _shard(model, world, sharding)
        model.to_empty(device=world.device)
        if weights is not None:
            set_weights(model, weights)
        return model
    model = empty_model(config)
    if weights is not None:
        set_weights(model, weights)
    model.to(world.device)
    world.broadcast([parameter.detach() for parameter in model.parameters()], owner=0)
    return model


def count_sharers(sharding: Sharding, processes: int, processes_per_machine: int) -> int:
    """Number of processes that hold one copy of the weights together."""
    return {"fsdp": processes, "hsdp": processes_per_machine}.get(sharding, 1)


def _shard(model: GPT, world: World, sharding: Sharding) -> None:
    """Apply FSDP2 to each block, and to the parameters outside of blocks."""
    kind, sharers = world.device.partition(":")[0], count_sharers(sharding, world.size, world.local_size)
    machines = world.size // sharers
    if machines > 1:
        mesh = init_device_mesh(kind, (machines, sharers), mesh_dim_names=("machines", "processes"))
    else:
        mesh = init_device_mesh(kind, (world.size,), mesh_dim_names=("processes",))
    for block in model.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "trunk")
    for module in (model, *model.h):
        sharded: Any = module
        sharded.set_gradient_divide_factor(1.0)  # sums, not means
        sharded.set_force_sum_reduction_for_comms(True)  # gloo has no sum that divides


def build_sharded_optimizer(
    model: GPT, config: OptimizerConfig, world: World, compute: Compute
) -> AdamW | Muon:
    """The optimizer of the parameters that this process updates."""
    names = None
    if compute.sharding == "zero1":
        names = {name for name, owner in parameter_owners(model, world).items() if owner == world.rank}
    return build_optimizer(model, config, names=names, stacked=not compute.deterministic_reduce)


def parameter_owners(model: GPT, world: World) -> dict[str, int]:
    """The rank that updates each parameter under zero1."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return assign_parameters(sizes, world.size)


def reshard(model: GPT) -> None:
    """Free the weights that a forward pass without a backward pass left gathered."""
    if hasattr(model, "reshard"):
        model.reshard()  # type: ignore[operator]


@torch.no_grad()
def gather_model(model: GPT, world: World) -> GPT | None:
    """The gathered model on the main process; None on the others."""
    whole = empty_model(model.config) if world.is_main else None
    shapes = weight_shapes(model.config)
    own = dict(whole.named_parameters()) if whole is not None else {}
    for name, parameter in model.named_parameters():
        full: Tensor = parameter.full_tensor()  # type: ignore[attr-defined]
        if whole is not None:
            own[name].zero_()[: shapes[name][0]].copy_(full[: shapes[name][0]])
    return whole.to(world.device).eval() if whole is not None else None


def unsupported_reasons(compute: Compute, world: World) -> Sequence[str]:
    """Unsupported combinations, one sentence each; [] if there are none."""
    sharding, precision, deterministic = compute.sharding, compute.precision, compute.deterministic_reduce
    found = []
    if sharding != "none" and not world.is_distributed:
        found.append(f"sharding={sharding} needs processes started together: give --processes 1 or more")
    if precision == "fp16" and sharding != "none":
        found.append(f"precision=fp16 scales gradients, which sharding={sharding} can't do: choose bf16")
    if deterministic and sharding in FULLY_SHARDED:
        found.append(
            f"deterministic_reduce=True sums gradients in a tree, sharding={sharding} in torch's own way: "
            "choose sharding none or zero1"
        )
    if deterministic and world.size & (world.size - 1):
        found.append(f"deterministic_reduce=True takes 1, 2, 4, 8, ... processes, not {world.size}")
    if sharding == "hsdp" and world.size % world.local_size:
        found.append(
            f"sharding=hsdp takes the same number of processes on each machine, not {world.size} in all"
        )
    return found


def assign_parameters(sizes: Mapping[str, int], ranks: int) -> dict[str, int]:
    """The rank that owns each parameter, by name, in the order of `sizes`.

    The largest parameter first, each to the rank that owns least so far; ties go to the first name and the
    lowest rank. Every process computes the same, from names, sizes and their order. No rank owns more than a
    1/`ranks` share plus one parameter (Graham 1969, Bounds on Multiprocessing Timing Anomalies). Raises
    ValueError if `ranks` is less than 1.
    """
    if ranks < 1:
        raise ValueError(f"ranks={ranks} must be at least 1")
    taken = [0] * ranks
    owner = dict.fromkeys(sizes, 0)
    for name in sorted(sizes, key=lambda name: -sizes[name]):  # stable: ties stay in order
        rank = taken.index(min(taken))
        owner[name] = rank
        taken[rank] += sizes[name]
    return owner


def largest_share(sizes: Mapping[str, int], ranks: int) -> int:
    """The size owned by the rank that owns most, in the unit of `sizes`."""
    owned = [0] * ranks
    for name, rank in assign_parameters(sizes, ranks).items():
        owned[rank] += sizes[name]
    return max(owned)
