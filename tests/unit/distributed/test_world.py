"""Devices and collectives, as far as one process can show them."""

from __future__ import annotations

import pytest
import torch

from overnight.distributed import world
from overnight.distributed.world import SINGLE_PROCESS, World, count_processes, join_world, open_world


@pytest.fixture
def set_gpus(monkeypatch):
    """`set_gpus(count)`: a machine with this number of NVIDIA GPUs."""

    def set_count(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return set_count


@pytest.mark.parametrize("gpus, mps, expected", [(1, True, "cuda"), (0, True, "mps"), (0, False, "cpu")])
def test_best_device_is_found(set_gpus, monkeypatch, gpus, mps, expected):
    set_gpus(gpus)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    found = open_world(None)
    assert (found.rank, found.size, found.device, found.is_main) == (0, 1, expected, True)


@pytest.mark.parametrize(
    "device, gpus",
    [*((device, 2) for device in ("gpu", "cuda:x", "cuda:", "cpu:0", "mps:0", "cuda:2")), ("cuda", 0)],
)
def test_unknown_or_missing_device_is_refused(set_gpus, device, gpus):
    set_gpus(gpus)
    with pytest.raises(ValueError, match=f"device={device}"):
        open_world(device)
    if gpus:
        assert open_world("cuda:1").device == "cuda:1"


@pytest.fixture
def launched(monkeypatch):
    """The environment of one of eight processes, four on this machine."""
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("launched")
def test_command_for_one_process_refuses_several():
    with pytest.raises(ValueError, match="torchrun"):
        open_world("cpu")


@pytest.mark.parametrize(
    "device, gpus, nccl, named",
    [
        ("cuda", 2, True, "start 2"),
        ("cuda", 8, False, "NCCL.* --device cpu"),
        ("cuda:1", 8, True, "device=cuda:1.* processes=8"),
        ("mps", 0, True, "not on mps"),
        ("gpu", 8, True, "device=gpu"),
    ],
)
@pytest.mark.usefixtures("launched")
def test_device_that_processes_cannot_share_is_refused(set_gpus, monkeypatch, device, gpus, nccl, named):
    set_gpus(gpus)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: nccl)
    with pytest.raises(ValueError, match=named), join_world(device, 5):
        pass


@pytest.mark.parametrize(
    "asked, device, gpus, count",
    [
        *[("auto", None, 4, 4), ("auto", "cpu", 4, 1), ("auto", None, 0, 1)],
        *[(3, None, 4, 3), (7, "cpu", 0, 7)],
        *[(0, "cpu", 4, "processes=0"), (0, "cuda", 4, "processes=0.* 4"), (5, "cuda", 4, "processes=5.* 4")],
        *[(5, None, 4, "processes=5.* 4"), (2, "cuda:1", 4, "device=cuda:1.* processes=2")],
        (2, "mps", 4, "device=mps"),
    ],
)
def test_processes_are_counted_or_refused(set_gpus, asked, device, gpus, count):
    set_gpus(gpus)
    if isinstance(count, int):
        assert count_processes(asked, device) == count
    else:
        with pytest.raises(ValueError, match=count):
            count_processes(asked, device)


def test_collectives_of_a_single_process_change_nothing():
    tensors = [torch.ones(2), torch.ones(3)]
    SINGLE_PROCESS.all_reduce(tensors)
    SINGLE_PROCESS.tree_all_reduce(tensors)
    SINGLE_PROCESS.broadcast(tensors, 0)
    SINGLE_PROCESS.barrier()
    assert all(tensor.eq(1).all() for tensor in tensors)
    assert (SINGLE_PROCESS.any(True), SINGLE_PROCESS.any(False)) == (True, False)
    assert SINGLE_PROCESS.all_gather_object("word") == ["word"]
    error = ValueError("too large")
    with pytest.raises(ValueError, match="too large") as raised, SINGLE_PROCESS.raise_together():
        raise error
    assert raised.value is error


def test_other_errors_are_not_shared(monkeypatch):
    """The others are not asked: they will lose this process."""
    monkeypatch.setattr(World, "all_gather_object", lambda self, word: pytest.fail("asked"))
    with pytest.raises(KeyError), World(0, 2, "cpu").raise_together():
        raise KeyError("ours")


@pytest.mark.parametrize("sizes, buckets", [([10, 10, 10], [30]), ([40, 1], [40, 1]), ([39, 1, 5], [40, 5])])
def test_bucket_ends_with_the_tensor_that_fills_it(monkeypatch, sizes, buckets):
    monkeypatch.setattr(world, "BUCKET_BYTES", 160)
    sent: list[int] = []

    def double(flat):
        sent.append(len(flat))
        flat *= 2

    monkeypatch.setattr(torch.distributed, "all_reduce", double)
    tensors = [torch.full((size,), float(number)) for number, size in enumerate(sizes)]
    World(0, 2, "cpu").all_reduce(tensors)
    assert sent == buckets
    assert all(tensor.eq(2 * number).all() for number, tensor in enumerate(tensors))
