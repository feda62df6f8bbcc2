"""Batches on a device, the next one read while the device works on the last."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from overnight.data.stream import Batch

Batches = Callable[[int, int], Batch]


def read_ahead(batches: Batches, device: str, following: Callable[[int], int] | None = None) -> Batches:
    """`batches` on `device`. While one is worked on, a thread reads, pins and sends the next one.

    `following` says which row that begins with, from the first row of this one; the row after its last if
    left out. On the CPU nothing would be won: there it is `batches` itself.
    """
    if device == "cpu":
        return batches

    def read(first_row: int, rows: int) -> Batch:
        batch = batches(first_row, rows)
        return Batch(_send(batch.ids, device), _send(batch.targets, device))

    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")
    waiting: dict[tuple[int, int], Future[Batch]] = {}

    def next_batch(first_row: int, rows: int) -> Batch:
        found = waiting.pop((first_row, rows), None)
        is_read = found is not None and found.exception() is None  # rows may not have been prepared then
        batch = found.result() if found is not None and is_read else read(first_row, rows)
        waiting.clear()
        after = first_row + rows if following is None else following(first_row)
        waiting[after, rows] = pool.submit(read, after, rows)
        return batch

    return next_batch


def _send(ids: Tensor, device: str) -> Tensor:
    """A copy on the device, not waited for: only pinned memory can be copied while the device computes."""
    pinned = ids.pin_memory() if device.startswith("cuda") else ids
    return pinned.to(device, non_blocking=True)
