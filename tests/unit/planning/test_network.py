from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, get_args

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
from overnight.model.gpt import init_weights, parameter_shapes, weight_shapes
from overnight.model.model_config import PRESETS, ModelConfig
from overnight.planning import network as network_module
from overnight.planning.network import (
    BETWEEN,
    PCIE,
    WITHIN,
    Cluster,
    Collective,
    Link,
    collective_seconds,
    find_link_within,
    list_collectives,
    predict_step,
    sent_bytes,
)
from overnight.training import Sharding
from overnight.training.sharding import build_sharded_model, build_sharing

SIZES = ModelConfig(n_layer=3, n_head=4, n_embd=64, context_length=32, vocab_size=1000)  # all divides by 16
LOSS_BYTES = 4  # the loss is reduced as well
PLAIN = Link(name="", bytes_per_second=100.0, message_seconds=0.0, start_seconds=0.0, source="")
SLOW = dataclasses.replace(PLAIN, bytes_per_second=10.0)
SHARDINGS: tuple[Sharding, ...] = get_args(Sharding)
KINDS = {
    "allreduce_": "all-reduce",
    "broadcast_": "broadcast",
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
}


def cluster(machines: int, per_machine: int, **changes: Any) -> Cluster:
    parts = {"within": PLAIN, "between": SLOW, **changes}
    return Cluster(machines=machines, processes_per_machine=per_machine, **parts)


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
    model = build_sharded_model(SIZES, init_weights(weight_shapes(SIZES), SIZES.n_layer, 0), here, sharding)
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
    listed = list_collectives(SIZES, sharding, cluster(size // local_size, local_size), micro_batches)
    assert {each.kind: each.calls for each in listed} == dict(counts)
    assert {each.kind: each.bytes for each in listed} == dict(sizes)


def test_gradients_are_reduced_in_buckets(
    fake_world: Callable[[int, int], World], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bucket ends with the parameter that fills it, so there are no more than the model counts."""
    for module in (world, network_module):
        monkeypatch.setattr(module, "BUCKET_BYTES", 20_000)
    gradients = [torch.zeros(shape) for shape in parameter_shapes(SIZES).values()]
    here = fake_world(4, 4)
    with CollectiveRecorder() as recorder:
        here.all_reduce(gradients)
    (listed,) = list_collectives(SIZES, "none", cluster(1, 4), 1)
    assert 5 < len(recorder.calls) <= listed.calls
    assert sum(count for _, count in recorder.calls) == listed.bytes


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_single_process_has_no_collectives(sharding: Sharding) -> None:
    assert list_collectives(SIZES, sharding, cluster(1, 1), 3) == []
    predicted = predict_step(SIZES, sharding, cluster(1, 1), 3, 1.5)
    assert (predicted.seconds_range, predicted.efficiency_range) == ((1.5, 1.5), (1.0, 1.0))


# Computed by hand.


@pytest.mark.parametrize(
    "kind, sent",
    [("all-reduce", 1400.0), ("all-gather", 700.0), ("reduce-scatter", 700.0), ("broadcast", 800.0)],
)
def test_bytes_of_a_ring_of_eight(kind: Any, sent: float) -> None:
    """As in doc/PERFORMANCE.md of nccl-tests, by which its "bus bandwidth" is defined."""
    assert sent_bytes(Collective(kind, "all", 1, 800), cluster(1, 8)) == pytest.approx(sent)
    assert collective_seconds(Collective(kind, "all", 1, 800), cluster(1, 8)) == pytest.approx(sent / 100)


def simulate_ring_all_reduce(processes: int, chunk: float, seconds_per_byte: float, message: float) -> float:
    """Pass chunks on, all at once, round after round, until every process has the sum of every chunk."""
    has = [[{(rank, part)} for part in range(processes)] for rank in range(processes)]
    clock = 0.0
    for number in range(2 * (processes - 1)):
        sent = [(rank - number) % processes for rank in range(processes)]
        passed = [set(has[rank][sent[rank]]) for rank in range(processes)]
        for rank in range(processes):
            has[(rank + 1) % processes][sent[rank]] |= passed[rank]
        clock += message + chunk * seconds_per_byte
    assert all(len(part) == processes for parts in has for part in parts)
    return clock


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_all_reduce_takes_as_long_as_a_simulated_ring(processes: int) -> None:
    link = dataclasses.replace(PLAIN, message_seconds=0.25)
    collective = Collective("all-reduce", "all", 1, 1000)
    predicted = collective_seconds(collective, cluster(1, processes, within=link))
    assert predicted == pytest.approx(simulate_ring_all_reduce(processes, 1000 / processes, 1 / 100, 0.25))


@pytest.mark.parametrize(
    "kind, among, calls, seconds",
    [
        ("all-gather", "machine", 3, 3 * (50 + 3 * 2)),
        ("all-gather", "all", 1, 50 + 6 * 2 + 1000),
        ("all-reduce", "all", 1, 50 + 12 * 2 + 2000),
        ("all-reduce", "machines", 1, 50 + 2000),
    ],
)
def test_latency_is_the_launch_and_the_hops(kind: Any, among: Any, calls: int, seconds: float) -> None:
    link = dataclasses.replace(PLAIN, message_seconds=2.0, start_seconds=50.0)
    slow = dataclasses.replace(SLOW, message_seconds=1000.0)
    two = cluster(2, 4, within=link, between=slow)
    assert collective_seconds(Collective(kind, among, calls, 0), two) == seconds


def test_slowest_link_decides_and_a_machine_s_network_is_shared() -> None:
    """8 processes on 2 machines with 10 bytes a second between them.

    Among all, 7 of 8 parts of 1,600 bytes leave each machine; with hsdp its four processes send a quarter
    each.
    """
    two = cluster(2, 4)
    assert collective_seconds(Collective("all-gather", "all", 1, 1600), two) == pytest.approx(1400 / 10)
    quarter = Collective("all-reduce", "machines", 1, 400)
    assert sent_bytes(quarter, two) == 400
    assert collective_seconds(quarter, two) == pytest.approx(4 * 400 / 10)
    fast = cluster(2, 4, between=dataclasses.replace(SLOW, bytes_per_second=1e9))
    assert collective_seconds(Collective("all-gather", "all", 1, 1600), fast) == pytest.approx(1400 / 100)


@pytest.mark.parametrize(
    "kind, passes", [("all-reduce", 4), ("broadcast", 4), ("all-gather", 2), ("reduce-scatter", 2)]
)
def test_copies_into_and_out_of_buffers_are_counted(kind: Any, passes: int) -> None:
    collective = Collective(kind, "all", 1, 800)
    with_copies = collective_seconds(collective, cluster(1, 8, memory_bytes_per_second=1000.0))
    assert with_copies - collective_seconds(collective, cluster(1, 8)) == pytest.approx(passes * 800 / 1000)


def test_gpt2_124m_on_eight_h100_counted_by_hand() -> None:
    """124,475,904 parameters: 498 MB at 370 GB/s, in five calls of 8.4 us and 14 hops each."""
    sizes, there = PRESETS["gpt2-124m"], cluster(1, 8, within=WITHIN["h100"])
    stored, outside, message = 4 * 124_475_904, 4 * 39_421_440, 3.4e-6
    none = predict_step(sizes, "none", there, 4, 0.1)
    expected = 5 * (8.4e-6 + 14 * message) + 1.75 * stored / 370e9
    assert none.communication_seconds == pytest.approx(expected)
    assert none.communication_seconds == pytest.approx(2.63e-3, rel=0.01)
    zero1 = predict_step(sizes, "zero1", there, 4, 0.1)
    broadcasts = 8 * (8.4e-6 + 7 * message) + stored / 370e9
    assert zero1.communication_seconds - expected == pytest.approx(broadcasts)
    fsdp = predict_step(sizes, "fsdp", there, 4, 0.1)
    sent = 7 / 8 * 4 * (2 * stored - outside + stored)
    assert fsdp.communication_bytes == pytest.approx(sent)
    calls = 4 * (25 + 13)
    assert fsdp.communication_seconds == pytest.approx(calls * (8.4e-6 + 7 * message) + sent / 370e9)


def test_only_fsdp_overlaps_communication() -> None:
    replicated = predict_step(SIZES, "none", cluster(1, 4), 2, 10.0)
    assert replicated.seconds_range == (10.0 + replicated.communication_seconds,) * 2
    fsdp = predict_step(SIZES, "fsdp", cluster(1, 4), 2, 10.0)
    for compute, communication, efficiency in ((3.0, 1.0, (0.75, 1.0)), (1.0, 4.0, (0.2, 0.25))):
        step = dataclasses.replace(fsdp, compute_seconds=compute, communication_seconds=communication)
        assert step.seconds_range == (max(compute, communication), compute + communication)
        assert step.efficiency_range == efficiency


def test_fsdp_sends_more_with_many_micro_batches() -> None:
    """Rajbhandari et al. 2020, section 7: 3 times the model instead of 2; and that for every micro-batch."""
    sizes, there = PRESETS["gpt3-13b"], cluster(1, 8, within=WITHIN["h100"])
    whole = predict_step(sizes, "none", there, 1, 1.0).communication_bytes
    for micro_batches, factor in ((1, 1.5), (8, 12)):
        sent = predict_step(sizes, "fsdp", there, micro_batches, 1.0).communication_bytes
        assert sent == pytest.approx(factor * whole, rel=0.02)
    assert predict_step(sizes, "none", there, 8, 1.0).communication_bytes == whole


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


def test_network_has_more_latency_than_a_board() -> None:
    for board in WITHIN.values():
        for network in BETWEEN.values():
            assert network.message_seconds > PCIE.message_seconds > board.message_seconds
    assert all(link.source for link in (*WITHIN.values(), *BETWEEN.values(), PCIE))


def test_devices_without_nvlink_use_pcie() -> None:
    names = {device.name for device in DEVICES}
    assert WITHIN.keys() <= names
    for name in ("h100-pcie", "l40s", "rtx-4090", "t4", "h200-nvl"):
        assert name in names
        assert find_link_within(name) is PCIE
    assert find_link_within("h100").name == "NVLink 4"


@pytest.mark.parametrize("name", PRESETS)
def test_every_size_can_be_predicted(name: str) -> None:
    there = cluster(8, 8, within=WITHIN["h100"], between=BETWEEN["400g"])
    seconds = {
        sharding: predict_step(PRESETS[name], sharding, there, 2, 1.0).communication_seconds
        for sharding in SHARDINGS
    }
    assert all(math.isfinite(each) and each > 0 for each in seconds.values())
    assert seconds["hsdp"] < seconds["fsdp"], "machines communicate more within than between them"
