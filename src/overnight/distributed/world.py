"""This process among others: its rank, its device, and the collectives between them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from overnight.distributed.launcher import (
    CollectiveValueError,
    LauncherEnv,
    PeerLostError,
    check_rendezvous,
    count_cores,
    is_launched,
    is_main_process,
    read_launcher_env,
)

Value = TypeVar("Value")
BUCKET_BYTES = 100_000_000  # per collective: large enough for full speed, small compared with the gradients


@dataclass(frozen=True)
class World:
    """Process `rank` of `size` on `device`; process `local_rank` of `local_size` on its machine.

    The collectives must be called by all processes, in the same order.
    """

    rank: int
    size: int
    device: str
    local_rank: int = 0
    local_size: int = 1
    is_distributed: bool = False
    """True for processes started by a launcher, even a single one."""

    @property
    def is_main(self) -> bool:
        """True for the one process that writes files and prints."""
        return self.rank == 0

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        """Sum each tensor over processes, in place (bucketed all-reduce); all of one dtype."""
        if self.size > 1:
            _in_buckets(tensors, dist.all_reduce)

    def tree_all_reduce(self, tensors: Sequence[Tensor]) -> None:
        """`all_reduce` in a binary tree over ranks: the result does not depend on the backend's algorithm.

        Pairs of ranks exchange first, then pairs of pairs, and so on; the world size must be a power of 2.
        """

        def exchange(flat: Tensor) -> None:
            distance = 1
            while distance < self.size:
                theirs, partner = torch.empty_like(flat), self.rank ^ distance
                pair = [
                    dist.P2POp(dist.isend, flat.clone(), partner),
                    dist.P2POp(dist.irecv, theirs, partner),
                ]
                for request in dist.batch_isend_irecv(pair):
                    request.wait()
                flat += theirs
                distance *= 2

        if self.size > 1:
            _in_buckets(tensors, exchange)

    def broadcast(self, tensors: Sequence[Tensor], owner: int) -> None:
        """Copy each tensor of rank `owner` to all processes, in place; all of one dtype."""
        if self.size > 1:
            _in_buckets(tensors, lambda flat: dist.broadcast(flat, owner))

    def any(self, flag: bool) -> bool:
        """True if `flag` is true in any process."""
        return any(self.all_gather_object(flag))

    def all_gather_object(self, value: Value) -> list[Value]:
        """The values of all processes, by rank."""
        if self.size == 1:
            return [value]
        values = [value] * self.size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait until every process has called it."""
        self.all_gather_object("here")

    @contextmanager
    def raise_together(self) -> Iterator[None]:
        """Context manager: a ValueError of one process is raised in all processes, with its rank."""
        refusal = ""
        try:
            yield
        except ValueError as error:
            if self.size == 1:
                raise
            refusal = str(error)
        refusals = self.all_gather_object(refusal)
        if any(refusals):
            raise CollectiveValueError(_describe_refusals(refusals))


SINGLE_PROCESS = World(rank=0, size=1, device="cpu")


def _in_buckets(tensors: Sequence[Tensor], collective: Callable[[Tensor], object]) -> None:
    """Apply `collective` in place to flat buckets of about BUCKET_BYTES, and copy the results back."""
    bucket: list[Tensor] = []
    held = 0
    for number, tensor in enumerate(tensors, 1):
        bucket.append(tensor)
        held += tensor.numel() * tensor.element_size()
        if held < BUCKET_BYTES and number < len(tensors):
            continue
        flat = torch.cat([each.reshape(-1) for each in bucket])
        collective(flat)
        for each, part in zip(bucket, torch.split(flat, [each.numel() for each in bucket]), strict=True):
            each.copy_(part.view_as(each))
        bucket, held = [], 0


def _describe_refusals(refusals: Sequence[str]) -> str:
    """One sentence if all processes have the same error, otherwise each error with its rank."""
    if len({*refusals}) == 1:
        return refusals[0]
    return "; ".join(f"rank {rank}: {refusal}" for rank, refusal in enumerate(refusals) if refusal)


def open_world(device: str | None) -> World:
    """A single process on `device` ("cpu", "cuda", "cuda:1", "mps"), or on the best device for None.

    torch computes with one thread for each core, unless OMP_NUM_THREADS is set. Raises ValueError for a
    device that this machine lacks, and under a launcher that starts several processes.
    """
    if is_launched() and not is_main_process():
        raise ValueError(
            "only `overnight train` and `evaluate` run in several processes: start this without torchrun"
        )
    return _open_single(device)


def _open_single(device: str | None) -> World:
    chosen = choose_device(device)
    if "OMP_NUM_THREADS" not in os.environ:
        compute_with_threads(count_cores())
    return World(rank=0, size=1, device=chosen)


@contextmanager
def join_world(device: str | None, timeout_seconds: int) -> Iterator[World]:
    """This process among those of a launcher, or a single one; on one GPU each, or all on the CPU.

    A collective fails after twice `timeout_seconds`. Raises ValueError for a device that this machine lacks,
    and if the rendezvous fails; PeerLostError, then or later, if other processes end.
    """
    env = read_launcher_env(os.environ)
    if env is None:
        yield _open_single(device)
        return
    world = _find_device(env, device)
    if env.address is None:
        check_rendezvous(os.environ)
    if "OMP_NUM_THREADS" not in os.environ:
        compute_with_threads(max(1, (count_cores() or 1) // world.local_size))
    try:
        # Twice the time, so that the watchdog prints the stacks before a collective times out.
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if world.device.startswith("cuda") else "gloo",
            init_method=f"tcp://{env.address}" if env.address else "env://",
            rank=env.rank,
            world_size=env.size,
            timeout=timedelta(seconds=2 * timeout_seconds),
        )
    except dist.DistNetworkError as error:
        address = env.address or f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ValueError(
            f"the rendezvous at {address} failed ({str(error).splitlines()[0]}): if its port is in use, "
            "give the launcher another one"
        ) from None
    except RuntimeError as error:
        raise _lost(env.rank, error) from None
    try:
        yield world
        world.barrier()
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise _lost(env.rank, error) from None
    finally:
        dist.destroy_process_group()


def _lost(rank: int, error: Exception) -> PeerLostError:
    """A PeerLostError with torch's reason, without its source file and advice."""
    reason = re.sub(r"^\[\S+\] ", "", str(error).splitlines()[0]).partition(". ")[0]
    return PeerLostError(f"rank {rank} lost the other processes ({reason})")


def count_processes(asked: int | str, device: str | None) -> int:
    """Number of processes to start: `asked`, or for "auto" one for each GPU.

    Raises ValueError for more processes than GPUs, and for a device that processes can't share.
    """
    chosen = choose_device(device)
    gpus = torch.cuda.device_count() if chosen == "cuda" else None
    if asked == "auto":
        return gpus or 1
    count = int(asked)
    if count < 1 or (gpus is not None and count > gpus):
        at_most = f", and at most {gpus}, a GPU for each" if gpus is not None else ""
        raise ValueError(f"processes={count} must be at least 1{at_most}")
    _check_shared(chosen, count)
    return count


def _check_shared(device: str, processes: int) -> None:
    if device != "cpu" and not device.startswith("cuda"):
        raise ValueError(f"several processes need the CPU or NVIDIA GPUs, not on {device}")
    if device.startswith("cuda:"):
        raise ValueError(f"device={device} is one device, but processes={processes}: give cuda")


def _find_device(env: LauncherEnv, device: str | None) -> World:
    """The world of this process, with its own device."""
    chosen = choose_device(device)
    _check_shared(chosen, env.size)
    if chosen == "cuda":
        if env.local_size > (count := torch.cuda.device_count()):
            raise ValueError(
                f"{env.local_size} processes on this machine are more than its {count} GPUs: start {count}"
            )
        if not dist.is_nccl_available():
            raise ValueError(
                "this torch has no NCCL, which GPUs need to communicate: install torch's CUDA build, or give "
                "--device cpu"
            )
        chosen = f"cuda:{env.local_rank}"
        torch.cuda.set_device(env.local_rank)
    return World(env.rank, env.size, chosen, env.local_rank, env.local_size, is_distributed=True)


def choose_device(device: str | None) -> str:
    """`device`, or the best one for None. Raises ValueError for a device that this machine lacks."""
    is_here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    best = next(kind for kind in is_here if is_here[kind])
    if not device:
        return best
    if not re.fullmatch(r"cpu|cuda(:[0-9]+)?|mps", device):
        raise ValueError(f"device={device} is unknown: use cpu, cuda, cuda:1 (or another index) or mps")
    kind, _, index = device.partition(":")
    if not is_here[kind]:
        raise ValueError(f"device={device}: this machine has no such device; use --device {best}")
    if index and int(index) >= torch.cuda.device_count():
        raise ValueError(f"device={device}: this machine has cuda:0 to cuda:{torch.cuda.device_count() - 1}")
    return device


def compute_with_threads(threads: int | None) -> None:
    """Let torch compute with at most `threads` threads on the CPU."""
    if threads is not None and threads < torch.get_num_threads():
        torch.set_num_threads(threads)
