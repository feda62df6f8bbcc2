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
from overnight.model.gpt import GPT, init_weights, weight_shapes
from overnight.model.model_config import PRESETS, ModelConfig
from overnight.planning import network as network_module
from overnight.planning.network import (
    BETWEEN,
    PCIE,
    WITHIN,
    Cluster,
    Collective,
    Link,
    StepPrediction,
    collective_seconds,
    find_link_within,
    list_collectives,
    predict_step,
    sent_bytes,
)
from overnight.training.ownership import Sharding
from overnight.training.sharding import broadcast_updates, build_sharded_model, gradient_reduction

SIZES = ModelConfig(n_layer=3, n_head=4, n_embd=64, context_length=32, vocab_size=1000)  # all divides by 16
NATS_BYTES = 4  # of the loss, which is summed as well
PLAIN = Link(name="", bytes_per_second=100.0, message_seconds=0.0, start_seconds=0.0, source="")
SLOW = dataclasses.replace(PLAIN, bytes_per_second=10.0)
KINDS = {
    "allreduce_": "all-reduce",
    "broadcast_": "broadcast",
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
}


def cluster(machines: int, per_machine: int, **changes: Any) -> Cluster:
    parts = {"within": PLAIN, "between": SLOW, **changes}
    return Cluster(machines=machines, processes_per_machine=per_machine, **parts)


# ---------------------------------------------------------------- what is said, beside what really is


class Overheard(TorchDispatchMode):
    """Every collective that is called within: its kind, and the bytes of the largest tensor it has."""

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
def one_of() -> Iterator[Callable[[int, int], World]]:
    """This process as the first of so many, on machines of so many, to whom everything is said in vain."""

    def open_group(size: int, local_size: int) -> World:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)  # type: ignore[no-untyped-call]
        return World(rank=0, size=size, device="cpu", local_rank=0, local_size=local_size)

    yield open_group
    dist.destroy_process_group()


def step(model: GPT, here: World, sharding: Sharding, micro_batches: int) -> None:
    ids = torch.zeros(1, SIZES.context_length, dtype=torch.int64)

    def backward(_: int) -> torch.Tensor:
        logits = model.head(model.trunk(ids))
        nats = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="sum")
        nats.backward()  # type: ignore[no-untyped-call]
        return nats.detach()

    add_up = gradient_reduction(model, sharding, deterministic_reduce=False)
    add_up(backward, range(micro_batches), list(model.parameters()), here)
    broadcast_updates(model, here, sharding)()


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize(
    "sharding, size, local_size",
    [
        ("none", 4, 4),
        ("optimizer", 4, 4),
        ("full", 4, 4),
        ("full", 16, 2),
        ("hybrid", 8, 2),
        ("hybrid", 4, 4),
    ],
)
def test_what_is_listed_is_what_a_step_says(
    one_of: Callable[[int, int], World], sharding: Sharding, size: int, local_size: int, micro_batches: int
) -> None:
    """Every call of torch's, by kind, and all its bytes, in a step of the engine's own parts."""
    here = one_of(size, local_size)
    model = build_sharded_model(SIZES, init_weights(weight_shapes(SIZES), SIZES.n_layer, 0), here, sharding)
    step(model, here, sharding, micro_batches)
    with Overheard() as overheard:
        step(model, here, sharding, micro_batches)
    counts, sizes = Counter[str](), Counter[str]()
    for kind, count in overheard.calls:
        if count > NATS_BYTES:  # where these are not a bucket's last four
            counts[kind] += 1
            sizes[kind] += count
    if sharding in {"none", "optimizer"}:
        sizes["all-reduce"] -= NATS_BYTES
    listed = list_collectives(SIZES, sharding, cluster(size // local_size, local_size), micro_batches)
    assert {each.kind: each.calls for each in listed} == dict(counts)
    assert {each.kind: each.bytes for each in listed} == dict(sizes)


def test_gradients_are_summed_in_buckets(
    one_of: Callable[[int, int], World], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bucket ends with the parameter that fills it, so there are no more than are reckoned with."""
    for module in (world, network_module):
        monkeypatch.setattr(module, "BUCKET_BYTES", 20_000)
    here = one_of(4, 4)
    gradients = [torch.zeros(shape) for shape in SIZES.parameter_shapes().values()]
    with Overheard() as overheard:
        here.sum(gradients)
    (listed,) = list_collectives(SIZES, "none", cluster(1, 4), 1)
    assert 5 < len(overheard.calls) <= listed.calls
    assert sum(count for _, count in overheard.calls) == listed.bytes


def test_one_process_says_nothing() -> None:
    alone = cluster(1, 1)
    for sharding in ("none", "optimizer", "full", "hybrid"):
        assert list_collectives(SIZES, sharding, alone, 3) == []
    predicted = predict_step(SIZES, "full", alone, 3, 1.5)
    assert predicted.seconds_range == (1.5, 1.5)
    assert predicted.efficiency_range == (1.0, 1.0)


# ---------------------------------------------------------------- by hand


@pytest.mark.parametrize(
    "kind, sent",
    [("all-reduce", 1400.0), ("all-gather", 700.0), ("reduce-scatter", 700.0), ("broadcast", 800.0)],
)
def test_bytes_of_a_ring_of_eight(kind: Any, sent: float) -> None:
    """As doc/PERFORMANCE.md of nccl-tests has them: its "bus bandwidth" is what these make of a time."""
    assert sent_bytes(Collective(kind, "all", 1, 800), cluster(1, 8)) == pytest.approx(sent)
    assert collective_seconds(Collective(kind, "all", 1, 800), cluster(1, 8)) == pytest.approx(sent / 100)


def simulate_ring_all_reduce(processes: int, chunk: float, seconds_per_byte: float, message: float) -> float:
    """Pass chunks on, all at once, round after round, until everyone has the sum of every chunk."""
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
def test_an_all_reduce_takes_as_long_as_one_that_is_played_through(processes: int) -> None:
    link = dataclasses.replace(PLAIN, message_seconds=0.25)
    predicted = collective_seconds(
        Collective("all-reduce", "all", 1, 1000), cluster(1, processes, within=link)
    )
    assert predicted == pytest.approx(simulate_ring_all_reduce(processes, 1000 / processes, 1 / 100, 0.25))


def test_a_call_has_its_start_and_its_way_round() -> None:
    link = dataclasses.replace(PLAIN, message_seconds=2.0, start_seconds=50.0)
    network = dataclasses.replace(SLOW, message_seconds=1000.0)
    there = cluster(2, 4, within=link, between=network)
    assert collective_seconds(Collective("all-gather", "machine", 3, 0), there) == 3 * (50 + 3 * 2)
    assert collective_seconds(Collective("all-gather", "all", 1, 0), there) == 50 + 6 * 2 + 1000
    assert collective_seconds(Collective("all-reduce", "all", 1, 0), there) == 50 + 12 * 2 + 2000
    assert collective_seconds(Collective("all-reduce", "machines", 1, 0), there) == 50 + 2000


def test_the_slowest_link_is_waited_for_and_a_machine_s_network_is_shared() -> None:
    """8 processes on 2 machines, which send 10 bytes a second.

    Among all, 7 of 8 parts of 1,600 bytes leave each machine; in the hybrid way its four processes send a
    quarter each.
    """
    two = cluster(2, 4)
    assert collective_seconds(Collective("all-gather", "all", 1, 1600), two) == pytest.approx(1400 / 10)
    quarter = Collective("all-reduce", "machines", 1, 400)
    assert sent_bytes(quarter, two) == 400
    assert collective_seconds(quarter, two) == pytest.approx(4 * 400 / 10)
    fast = cluster(2, 4, between=dataclasses.replace(SLOW, bytes_per_second=1e9))
    assert collective_seconds(Collective("all-gather", "all", 1, 1600), fast) == pytest.approx(1400 / 100)


def test_copies_into_buffers_and_out_of_them_are_counted() -> None:
    bare, copying = cluster(1, 8), cluster(1, 8, memory_bytes_per_second=1000.0)
    for kind, passes in (("all-reduce", 4), ("broadcast", 4), ("all-gather", 2), ("reduce-scatter", 2)):
        each = Collective(kind, "all", 1, 800)  # type: ignore[arg-type]
        longer = collective_seconds(each, copying) - collective_seconds(each, bare)
        assert longer == pytest.approx(passes * 800 / 1000)


def test_gpt2_124m_on_eight_h100_counted_by_hand() -> None:
    """124,475,904 parameters: 498 MB go round at 370 GB/s, in five calls of 8.4 us and 14 hops each."""
    sizes, there = PRESETS["gpt2-124m"], cluster(1, 8, within=WITHIN["h100"])
    stored, others, message = 4 * 124_475_904, 4 * 39_421_440, 3.4e-6
    none = predict_step(sizes, "none", there, 4, 0.1)
    expected = 5 * (8.4e-6 + 14 * message) + 1.75 * stored / 370e9
    assert none.communication_seconds == pytest.approx(expected)
    assert none.communication_seconds == pytest.approx(2.63e-3, rel=0.01)
    optimizer = predict_step(sizes, "optimizer", there, 4, 0.1)
    assert optimizer.communication_seconds - expected == pytest.approx(
        8 * (8.4e-6 + 7 * message) + stored / 370e9
    )
    full = predict_step(sizes, "full", there, 4, 0.1)
    sent = 7 / 8 * 4 * (2 * stored - others + stored)
    assert full.communication_bytes == pytest.approx(sent)
    calls = 4 * (25 + 13)
    expected = calls * (8.4e-6 + 7 * message) + sent / 370e9
    assert full.communication_seconds == pytest.approx(expected)


def test_what_overlaps_lies_between_two_bounds() -> None:
    reduced = predict_step(SIZES, "none", cluster(1, 4), 2, 10.0)
    assert not reduced.overlaps
    best, worst = reduced.seconds_range
    assert best == worst == 10.0 + reduced.communication_seconds
    gathered = predict_step(SIZES, "full", cluster(1, 4), 2, 10.0)
    assert gathered.seconds_range == (
        max(10.0, gathered.communication_seconds),
        10.0 + gathered.communication_seconds,
    )
    few, most = gathered.efficiency_range
    assert few < most <= 1.0


def test_hidden_talk_costs_nothing_and_too_much_talk_can_t_be_hidden() -> None:
    def made(compute: float, said: float) -> StepPrediction:
        return StepPrediction(
            compute_seconds=compute, communication_seconds=said, communication_bytes=0.0, overlaps=True
        )

    assert made(3.0, 1.0).efficiency_range == (0.75, 1.0)
    assert made(1.0, 4.0).efficiency_range == (0.2, 0.25)


def test_dividing_weights_saves_talk_when_a_step_is_one_micro_batch_and_costs_it_when_many() -> None:
    """Rajbhandari et al. 2020, section 7: 3 times the model instead of 2; and that for every micro-batch."""
    sizes, there = PRESETS["gpt3-13b"], cluster(1, 8, within=WITHIN["h100"])
    whole = predict_step(sizes, "none", there, 1, 1.0).communication_bytes
    assert predict_step(sizes, "full", there, 1, 1.0).communication_bytes == pytest.approx(
        1.5 * whole, rel=0.02
    )
    assert predict_step(sizes, "full", there, 8, 1.0).communication_bytes == pytest.approx(
        12 * whole, rel=0.02
    )
    assert predict_step(sizes, "none", there, 8, 1.0).communication_bytes == whole


# ---------------------------------------------------------------- links


def test_a_link_reaches_less_than_its_maker_says() -> None:
    """NVIDIA's figures, copied a second time: both directions together, and adapters' bits."""
    both_ways = {"b200": 1800e9, "h200": 900e9, "h100": 900e9, "a100-80gb": 600e9, "v100-32gb": 300e9}
    for name, rate in both_ways.items():
        assert 0.75 * rate / 2 < WITHIN[name].bytes_per_second < 0.85 * rate / 2
        assert f"{rate / 2e9:.0f} GB/s by the maker" in WITHIN[name].source
    bits = {"100g": 100e9, "400g": 400e9, "8x400g": 8 * 400e9}
    assert bits.keys() == BETWEEN.keys()
    for name, rate in bits.items():
        assert 0.9 * rate / 8 < BETWEEN[name].bytes_per_second <= 0.96 * rate / 8


def test_a_network_is_slower_and_later_than_a_board() -> None:
    for board in WITHIN.values():
        for network in BETWEEN.values():
            assert network.message_seconds > PCIE.message_seconds > board.message_seconds
    assert all(link.source for link in (*WITHIN.values(), *BETWEEN.values(), PCIE))


def test_what_has_no_nvlink_talks_over_pcie() -> None:
    names = {device.name for device in DEVICES}
    assert WITHIN.keys() <= names
    for name in ("h100-pcie", "l40s", "rtx-4090", "t4", "h200-nvl"):
        assert name in names
        assert find_link_within(name) is PCIE
    assert find_link_within("h100").name == "NVLink 4"


@pytest.mark.parametrize("name", PRESETS)
def test_every_size_can_be_predicted(name: str) -> None:
    there = cluster(8, 8, within=WITHIN["h100"], between=BETWEEN["400g"])
    seconds = [
        predict_step(PRESETS[name], sharding, there, 2, 1.0).communication_seconds
        for sharding in ("none", "optimizer", "full", "hybrid")
    ]
    assert all(math.isfinite(each) and each > 0 for each in seconds)
    assert seconds[3] < seconds[2], "within machines more is said than between them"
