"""What is divided, of what one process alone can show; several are in tests/distributed."""

from __future__ import annotations

import pytest
import torch

from overnight.distributed.world import SINGLE_PROCESS, World
from overnight.model.gpt import GPT, init_weights, initialize, weight_shapes
from overnight.model.model_config import ModelConfig
from overnight.training import OptimizerConfig
from overnight.training.sharding import (
    accumulate_gradients_bitwise,
    accumulate_gradients_fsdp,
    broadcast_updates,
    build_sharded_model,
    build_sharded_optimizer,
    gradient_reduction,
    reshard,
    unsupported_reasons,
)
from overnight.training.state import is_writer, local_shard, set_weights
from overnight.training.step import accumulate_gradients

SIZES = ModelConfig(n_layer=2, n_head=2, n_embd=16, context_length=8, vocab_size=50)


def one_of(size: int, rank: int = 0, local_size: int | None = None, *, is_distributed: bool = True) -> World:
    return World(rank, size, "cpu", rank % (local_size or size), local_size or size, is_distributed)


def drawn(seed: int = 1) -> dict[str, torch.Tensor]:
    return dict(init_weights(weight_shapes(SIZES), SIZES.n_layer, seed))


# ---------------------------------------------------------------- weights


def test_one_process_places_what_it_is_given() -> None:
    expected = GPT(SIZES)
    initialize(expected, seed=1)
    placed = build_sharded_model(SIZES, drawn().items(), SINGLE_PROCESS, "none")
    for (name, one), (other, two) in zip(placed.named_parameters(), expected.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(one, two), "and the padding of the vocabulary is zero"


def test_every_weight_has_to_be_given() -> None:
    weights = drawn()
    del weights["ln_f.bias"]
    with pytest.raises(AssertionError, match=r"nothing was given for ln_f\.bias"):
        set_weights(GPT(SIZES), weights.items())


def test_a_process_by_itself_has_and_writes_all_rows() -> None:
    tensor = torch.ones(3, 2)
    rows, first = local_shard(tensor)
    assert rows is tensor
    assert first == 0
    assert is_writer(tensor, is_owner=True)
    assert not is_writer(tensor, is_owner=False)


def test_nothing_is_put_back_that_was_never_gathered() -> None:
    reshard(GPT(SIZES))


# ---------------------------------------------------------------- who updates what


@pytest.mark.parametrize("size", [1, 2, 3, 4, 40])
def test_every_parameter_is_updated_by_exactly_one(size: int) -> None:
    """Also where there are more processes than parameters."""
    model = GPT(SIZES)
    updated: list[int] = []
    for rank in range(size):
        optimizer = build_sharded_optimizer(model, OptimizerConfig(), one_of(size, rank), "optimizer")
        updated += [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
        matrices, vectors = optimizer.param_groups
        assert all(parameter.dim() >= 2 for parameter in matrices["params"])
        assert matrices["weight_decay"] > vectors["weight_decay"] == 0
    assert sorted(updated) == sorted(id(parameter) for parameter in model.parameters())


@pytest.mark.parametrize("sharding", ["none", "full", "hybrid"])
def test_without_it_each_process_updates_all_it_holds(sharding: str) -> None:
    model = GPT(SIZES)
    optimizer = build_sharded_optimizer(model, OptimizerConfig(), one_of(4, 2), sharding)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


def test_updates_are_sent_by_their_owner_and_each_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = GPT(SIZES)
    sent: dict[int, list[int]] = {}

    def overhear(self: World, tensors: list[torch.Tensor], owner: int) -> None:
        sent.setdefault(owner, []).extend(tensor.data_ptr() for tensor in tensors)

    monkeypatch.setattr(World, "spread", overhear)
    broadcast_updates(model, one_of(3), "optimizer")()
    for rank in range(3):
        optimizer = build_sharded_optimizer(model, OptimizerConfig(), one_of(3, rank), "optimizer")
        owned = [parameter.data_ptr() for group in optimizer.param_groups for parameter in group["params"]]
        assert sorted(sent[rank]) == sorted(owned)
    sent.clear()
    for sharding in ("none", "full", "hybrid"):
        broadcast_updates(model, one_of(3), sharding)()
    assert sent == {}


# ---------------------------------------------------------------- what goes together


@pytest.mark.parametrize(
    "sharding, deterministic_reduce, expected",
    [
        ("none", False, accumulate_gradients),
        ("none", True, accumulate_gradients_bitwise),
        ("optimizer", False, accumulate_gradients),
        ("optimizer", True, accumulate_gradients_bitwise),
        ("full", False, accumulate_gradients_fsdp),
    ],
)
def test_gradients_are_added_up_by(sharding: str, deterministic_reduce: bool, expected: object) -> None:
    assert gradient_reduction(GPT(SIZES), sharding, deterministic_reduce=deterministic_reduce) is expected


def test_machines_are_crossed_once_a_step() -> None:
    """After the last micro-batch of this process; within a machine gradients are summed after each."""
    model, crossings = GPT(SIZES), []
    model.set_requires_all_reduce = crossings.append  # type: ignore[assignment]

    def backward(micro_batch: int) -> torch.Tensor:
        return torch.tensor(float(micro_batch))

    nats = gradient_reduction(model, "hybrid", deterministic_reduce=False)(
        backward, range(4, 8), [], SINGLE_PROCESS
    )
    assert crossings == [False, False, False, True]
    assert nats == 4 + 5 + 6 + 7


@pytest.mark.parametrize(
    "sharding, precision, world, deterministic_reduce, complaint",
    [
        ("full", "fp32", SINGLE_PROCESS, False, "sharding=fsdp is for processes that were started together"),
        ("optimizer", "fp16", one_of(2), False, "precision=fp16 scales gradients, which sharding=zero1"),
        ("full", "fp32", one_of(2), True, "choose sharding none or optimizer"),
        ("hybrid", "fp32", one_of(2), True, "choose sharding none or optimizer"),
        ("none", "fp32", one_of(3), True, "deterministic_reduce=True takes 1, 2, 4, 8, ... processes, not 3"),
        ("none", "fp32", one_of(6), True, "not 6"),
        ("hybrid", "fp32", one_of(6, local_size=4), False, "as many processes on each machine, not 6 in"),
    ],
)
def test_what_does_not_go_together_is_said(
    sharding: str, precision: str, world: World, deterministic_reduce: bool, complaint: str
) -> None:
    (found,) = unsupported_reasons(sharding, precision, world, deterministic_reduce=deterministic_reduce)
    assert complaint in found


@pytest.mark.parametrize(
    "sharding, precision, world, deterministic_reduce",
    [
        ("none", "fp32", SINGLE_PROCESS, True),
        ("none", "fp16", one_of(2), False),
        ("full", "bf16", one_of(3), False),
        ("full", "fp32", one_of(1), False),
        ("hybrid", "bf16", one_of(8, local_size=4), False),
        ("optimizer", "fp32", one_of(8), True),
    ],
)
def test_what_goes_together_is_not(
    sharding: str, precision: str, world: World, deterministic_reduce: bool
) -> None:
    assert unsupported_reasons(sharding, precision, world, deterministic_reduce=deterministic_reduce) == []
