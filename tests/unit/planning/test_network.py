from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from overnight.distributed import world
from overnight.distributed.world import World
from overnight.hardware import DEVICES
from overnight.model.gpt import init_weights
from overnight.model.model_config import ModelConfig, parameter_shapes
from overnight.model.presets import PRESETS
from overnight.planning import network
from overnight.planning.network import (
    BETWEEN,
    PCIE,
    WITHIN,
    Collective,
    Link,
    ParallelLayout,
    collective_seconds,
    list_collectives,
    predict_step,
)
from overnight.training import Sharding
from overnight.training.sharding import build_sharded_model, build_sharing

SIZES = ModelConfig(n_layer=3, n_head=4, n_embd=64, context_length=32, vocab_size=1000)  # all divides by 16
LOSS_BYTES = 4  # the loss is reduced as well
PLAIN = Link(name="", bytes_per_second=100.0, message_seconds=0.0, start_seconds=0.0, source="")
SLOW = dataclasses.replace(PLAIN, bytes_per_second=10.0)
KINDS = {
    "allreduce_": "all-reduce",
    "broadcast_": "broadcast",
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
}


def layout_of(machines: int, per_machine: int, sharding: Sharding = "none", **changes: Any) -> ParallelLayout:
    parts = {"within": PLAIN, "between": SLOW, **changes}
    return ParallelLayout(machines=machines, processes_per_machine=per_machine, sharding=sharding, **parts)


# Compared with the collectives that torch calls.


class CollectiveRecorder(TorchDispatchMode):
    """Records every collective: its kind, and the bytes of its largest tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensors = [each for each in tree_leaves(args) if isinstance(each, torch.Tensor)]
            name = func.overloadpacket.__name__
            self.calls.append((KINDS[name], max(tensor.nbytes for tensor in tensors)))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def fake_world() -> Iterator[Callable[[int, int], World]]:
    """This process as rank 0 of a group whose other members do not exist."""

    def open_group(size: int, local_size: int) -> World:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)  # type: ignore[no-untyped-call]
        return World(rank=0, size=size, device="cpu", local_rank=0, local_size=local_size)

    yield open_group
    dist.destroy_process_group()


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize(
    "sharding, size, local_size",
    [("none", 4, 4), ("zero1", 4, 4), ("fsdp", 4, 4), ("fsdp", 16, 2), ("hsdp", 8, 2), ("hsdp", 4, 4)],
)
def test_listed_collectives_are_those_of_a_step(
    fake_world: Callable[[int, int], World],
    sharding: Sharding,
    size: int,
    local_size: int,
    micro_batches: int,
) -> None:
    here = fake_world(size, local_size)
    model = build_sharded_model(SIZES, init_weights(SIZES, 0), here, sharding)
    sharing = build_sharing(model, here, sharding, deterministic=False)
    ids = torch.zeros(1, SIZES.context_length, dtype=torch.int64)

    def step() -> None:
        for number in range(micro_batches):
            logits = model.head(model.trunk(ids))
            nats = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="sum")
            nats.backward()  # type: ignore[no-untyped-call]
            sharing.reduce(nats.detach(), number, micro_batches)
        sharing.publish()

    step()  # FSDP's first step differs
    with CollectiveRecorder() as recorder:
        step()
    counts, sizes = Counter[str](), Counter[str]()
    for kind, count in recorder.calls:
        if count > LOSS_BYTES:  # a call for the loss alone is not modelled
            counts[kind] += 1
            sizes[kind] += count
    if sharding in {"none", "zero1"}:
        sizes["all-reduce"] -= LOSS_BYTES
    listed = list_collectives(SIZES, layout_of(size // local_size, local_size, sharding), micro_batches)
    assert {each.kind: (each.calls, each.bytes) for each in listed} == {
        kind: (counts[kind], sizes[kind]) for kind in counts
    }


def test_gradients_are_reduced_in_buckets(
    fake_world: Callable[[int, int], World], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bucket ends with the parameter that fills it, so there are no more than the model counts."""
    for module in (world, network):
        monkeypatch.setattr(module, "BUCKET_BYTES", 20_000)
    gradients = [torch.zeros(shape) for shape in parameter_shapes(SIZES).values()]
    here = fake_world(4, 4)
    with CollectiveRecorder() as recorder:
        here.all_reduce(gradients)
    (listed,) = list_collectives(SIZES, layout_of(1, 4), 1)
    assert 5 < len(recorder.calls) <= listed.calls
    assert sum(count for _, count in recorder.calls) == listed.bytes


# Computed by hand.


@pytest.mark.parametrize(
    "kind, among, calls, size, seconds",
    [
        ("all-gather", "machine", 3, 0, 3 * (50 + 3 * 2)),  # the launch and three hops
        ("all-gather", "all", 1, 0, 50 + 6 * 2 + 1000),  # one of seven hops is between the machines
        ("all-reduce", "all", 1, 0, 50 + 12 * 2 + 2000),
        ("all-reduce", "machines", 1, 0, 50 + 2000),
        ("all-gather", "machine", 0, 800, 600 / 100 + 2 * 800 / 1000),  # and copied one way
        ("reduce-scatter", "machine", 0, 800, 600 / 100 + 2 * 800 / 1000),
        ("broadcast", "machine", 0, 800, 800 / 100 + 4 * 800 / 1000),
        ("all-gather", "all", 0, 1600, 1400 / 10 + 2 * 1600 / 1000),  # the slowest link decides
        ("all-reduce", "machines", 0, 400, 4 * 400 / 10 + 4 * 400 / 1000),  # four rings share the network
    ],
)
def test_collective_on_two_machines_counted_by_hand(
    kind: Any, among: Any, calls: int, size: int, seconds: float
) -> None:
    """Four processes on each, 100 bytes a second within a machine, 10 between them, 1000 for copies."""
    within = dataclasses.replace(PLAIN, message_seconds=2.0, start_seconds=50.0)
    between = dataclasses.replace(SLOW, message_seconds=1000.0)
    layout = layout_of(2, 4, within=within, between=between, memory_bytes_per_second=1000.0)
    assert collective_seconds(Collective(kind, among, calls, size), layout) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "sharding, calls, hops, sent_share",
    [
        ("none", 5, 14, 7 / 4),
        ("zero1", 5 + 8, (5 * 14 + 8 * 7) / 13, 7 / 4 + 1),
        ("fsdp", 4 * (25 + 13), 7, 4 * 7 / 8 * (3 - 39_421_440 / 124_475_904)),
    ],
)
def test_gpt2_124m_on_eight_h100_counted_by_hand(
    sharding: Sharding, calls: int, hops: float, sent_share: float
) -> None:
    """124,475,904 parameters, 39,421,440 outside of blocks: 498 MB at 370 GB/s, 8.4 us and 3.4 us a hop.

    An all-reduce sends 7/4 of its bytes, a gather 7/8: doc/PERFORMANCE.md of nccl-tests.
    """
    step = predict_step(PRESETS["gpt2-124m"], layout_of(1, 8, sharding, within=WITHIN["h100"]), 4, 0.1)
    sent = sent_share * 4 * 124_475_904
    assert step.communication_bytes_per_step == pytest.approx(sent)
    seconds = calls * (8.4e-6 + hops * 3.4e-6) + sent / 370e9
    assert step.communication_seconds_per_step == pytest.approx(seconds)


@pytest.mark.parametrize(
    "sharding, compute, communication, best, efficiency",
    [
        ("fsdp", 3.0, 1.0, 3.0, (0.75, 1.0)),
        ("hsdp", 1.0, 4.0, 4.0, (0.2, 0.25)),
        ("zero1", 1.0, 4.0, 5.0, (0.2, 0.2)),
        ("none", 1.0, 4.0, 5.0, (0.2, 0.2)),
    ],
)
def test_only_fsdp_overlaps_communication(
    sharding: Sharding, compute: float, communication: float, best: float, efficiency: tuple[float, float]
) -> None:
    predicted = predict_step(SIZES, layout_of(1, 4, sharding), 2, compute)
    step = dataclasses.replace(predicted, communication_seconds_per_step=communication)
    assert (step.seconds_range, step.efficiency_range) == ((best, compute + communication), efficiency)


def test_fsdp_sends_more_with_many_micro_batches() -> None:
    """Rajbhandari et al. 2020, section 7: 3 times the model instead of 2; and that for every micro-batch."""

    def sent(sharding: Sharding, micro_batches: int) -> float:
        layout = layout_of(1, 8, sharding)
        return predict_step(PRESETS["gpt3-13b"], layout, micro_batches, 1.0).communication_bytes_per_step

    assert sent("fsdp", 1) == pytest.approx(1.5 * sent("none", 1), rel=0.02)
    assert sent("fsdp", 8) == pytest.approx(12 * sent("none", 1), rel=0.02)
    assert sent("none", 8) == sent("none", 1)


# Links.


def test_links_reach_less_than_their_makers_state() -> None:
    """NVIDIA's figures, copied a second time: both directions together, and adapters' bits."""
    both_ways = {"b200": 1800e9, "h200": 900e9, "h100": 900e9, "a100-80gb": 600e9, "v100-32gb": 300e9}
    for name, rate in both_ways.items():
        assert 0.75 * rate / 2 < WITHIN[name].bytes_per_second < 0.85 * rate / 2
        assert f"{rate / 2e9:.0f} GB/s by the maker" in WITHIN[name].source
    bits = {"100g": 100e9, "400g": 400e9, "8x400g": 8 * 400e9}
    assert bits.keys() == BETWEEN.keys()
    for name, rate in bits.items():
        assert 0.9 * rate / 8 < BETWEEN[name].bytes_per_second <= 0.96 * rate / 8
        assert BETWEEN[name].message_seconds > PCIE.message_seconds > WITHIN["h100"].message_seconds
    assert WITHIN.keys() <= {device.name for device in DEVICES}


@pytest.mark.parametrize("name", PRESETS)
def test_hsdp_communicates_less_between_machines(name: str) -> None:
    links = {"within": WITHIN["h100"], "between": BETWEEN["400g"]}
    hsdp, fsdp = (
        predict_step(PRESETS[name], layout_of(8, 8, sharding, **links), 2, 1.0)
        for sharding in ("hsdp", "fsdp")
    )
    assert 0 < hsdp.communication_seconds_per_step < fsdp.communication_seconds_per_step < math.inf
