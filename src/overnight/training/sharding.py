"""What several processes divide among them, applied from outside to a finished model.

none: nothing; each has all weights, gradients and moments, and gradients are summed once a step. optimizer:
each keeps AdamW's moments of whole parameters that it owns, updates these and sends them to the others
(Rajbhandari et al. 2020, ZeRO, stage 1). full: each keeps rows of every weight, gradient and moment, and a
block's weights are gathered while it computes (stage 3, torch's `fully_shard`). hybrid: that among the
processes of each machine, and the machines hold the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.optim import AdamW

from overnight.distributed.world import World
from overnight.model.gpt import GPT, empty_model, weight_shapes
from overnight.model.model_config import ModelConfig
from overnight.training import OptimizerConfig
from overnight.training.optim import build_optimizer
from overnight.training.ownership import Sharding, assign_parameters
from overnight.training.state import set_weights
from overnight.training.step import AddUp, Backward, _add_nats, _gradient, accumulate_gradients

SHARDS = ("fsdp", "hsdp")


def build_sharded_model(
    config: ModelConfig, weights: Iterable[tuple[str, Tensor]] | None, world: World, sharding: Sharding
) -> GPT:
    """A model on the world's device with these weights, or, sharded, with this process's rows of them.

    They are taken one at a time, so that a model that is sharded never is in one piece anywhere. With None
    the weights are whatever memory held.
    """
    if sharding in SHARDS:
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


def _shard(model: GPT, world: World, sharding: Sharding) -> None:
    """Let each block, and what is outside of them, be gathered when it is used, and not before."""
    kind = world.device.partition(":")[0]
    machines = world.size // world.local_size if sharding == "hsdp" else 1
    if machines > 1:
        mesh = init_device_mesh(kind, (machines, world.local_size), mesh_dim_names=("machines", "processes"))
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


def build_sharded_optimizer(model: GPT, config: OptimizerConfig, world: World, sharding: Sharding) -> AdamW:
    """AdamW over what this process updates."""
    names = None
    if sharding == "zero1":
        names = {name for name, owner in parameter_owners(model, world).items() if owner == world.rank}
    return build_optimizer(model, config, names=names)


def parameter_owners(model: GPT, world: World) -> dict[str, int]:
    """The rank that updates each parameter, where every one has its owner."""
    return assign_parameters(
        {name: parameter.numel() for name, parameter in model.named_parameters()}, world.size
    )


def gradient_reduction(model: GPT, sharding: Sharding, *, deterministic_reduce: bool) -> AddUp:
    """What adds up a step's gradients."""
    if sharding == "hsdp":
        return functools.partial(_add_up_within_machines, model)
    if sharding == "fsdp":
        return accumulate_gradients_fsdp
    return accumulate_gradients_bitwise if deterministic_reduce else accumulate_gradients


def _add_up_within_machines(
    model: GPT, backward: Backward, micro_batches: range, parameters: Sequence[Tensor], world: World
) -> Tensor:
    """`accumulate_gradients_fsdp` that crosses from machine to machine once a step, after the last micro-batch."""
    sharded: Any = model

    def once(micro_batch: int) -> Tensor:
        sharded.set_requires_all_reduce(micro_batch == micro_batches[-1])
        return backward(micro_batch)

    return accumulate_gradients_fsdp(once, micro_batches, parameters, world)


def broadcast_updates(model: GPT, world: World, sharding: Sharding) -> Callable[[], None]:
    """What is done after each update: owners send their parameters to all others."""
    if sharding != "zero1":
        return lambda: None
    owners, named = parameter_owners(model, world), dict(model.named_parameters())

    def spread() -> None:
        for rank in range(world.size):
            world.broadcast([named[name].detach() for name, owner in owners.items() if owner == rank], rank)

    return spread


def reshard(model: GPT) -> None:
    """Give back what was gathered for the last forward pass, if anything was: there was no backward pass."""
    put_back: Callable[[], None] | None = getattr(model, "reshard", None)
    if put_back is not None:
        put_back()


@torch.no_grad()
def gather_model(model: GPT, world: World) -> GPT | None:
    """The whole model where there are shards of it, on the main process; None on the others."""
    whole = empty_model(model.config) if world.is_main else None
    shapes = weight_shapes(model.config)
    own = dict(whole.named_parameters()) if whole is not None else {}
    for name, parameter in model.named_parameters():
        full: Tensor = parameter.full_tensor()  # type: ignore[attr-defined]
        if whole is not None:
            own[name].zero_()[: shapes[name][0]].copy_(full[: shapes[name][0]])
    return whole.to(world.device).eval() if whole is not None else None


def unsupported_reasons(
    sharding: Sharding, precision: str | None, world: World, *, deterministic_reduce: bool
) -> list[str]:
    """What the processes can't do, one plain sentence each; [] if nothing."""
    found = []
    if sharding != "none" and not world.is_distributed:
        found.append(
            f"sharding={sharding} is for processes that were started together: give --processes 1 or more"
        )
    if precision == "fp16" and sharding != "none":
        found.append(f"precision=fp16 scales gradients, which sharding={sharding} can't: choose bf16")
    if deterministic_reduce and sharding in SHARDS:
        found.append(
            f"deterministic_reduce=True adds gradients up in a tree, sharding={sharding} in torch's own way: choose "
            "sharding none or optimizer"
        )
    if deterministic_reduce and world.size & (world.size - 1):
        found.append(f"deterministic_reduce=True takes 1, 2, 4, 8, ... processes, not {world.size}")
    if sharding == "hsdp" and world.size % world.local_size:
        found.append(f"sharding=hsdp takes as many processes on each machine, not {world.size} in all")
    return found


# ---------------------------------------------------------------- how the gradients of a step are added up


def accumulate_gradients_fsdp(
    backward: Backward, micro_batches: range, _parameters: Sequence[Tensor], world: World
) -> Tensor:
    """The same where each backward pass sums its gradients over the processes by itself, as FSDP does."""
    nats = _add_nats(backward, micro_batches)
    world.all_reduce([nats])
    return nats


def accumulate_gradients_bitwise(
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
    world.tree_all_reduce([*gradients, nats])
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    return nats
