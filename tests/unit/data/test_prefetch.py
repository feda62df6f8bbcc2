from __future__ import annotations

import threading

import pytest
import torch

from overnight.data.loader import Batch, prefetch


def numbered(first_row: int, rows: int) -> Batch:
    ids = torch.arange(first_row, first_row + rows)[:, None]
    return Batch(ids, ids + 1)


def test_the_batches_are_the_same_in_any_order() -> None:
    batches = prefetch(numbered, "meta")
    for first, rows in [(0, 2), (2, 2), (4, 2), (0, 2), (2, 4), (6, 4), (7, 1)]:
        assert batches(first, rows).ids.shape == (rows, 1)
        assert batches(first, rows).ids.device.type == "meta"


def test_the_rows_that_follow_are_read_while_nobody_waits() -> None:
    read: list[tuple[int, int]] = []
    next_is_read = threading.Event()

    def batches(first_row: int, rows: int) -> Batch:
        read.append((first_row, rows))
        if first_row == 3:
            next_is_read.set()
        return numbered(first_row, rows)

    ahead = prefetch(batches, "meta")
    ahead(0, 3)
    assert next_is_read.wait(timeout=30)
    ahead(3, 3)
    assert read.count((3, 3)) == 1, "what was read ahead was read again"


def test_an_error_is_raised_where_its_rows_are_asked_for() -> None:
    def batches(first_row: int, rows: int) -> Batch:
        if first_row == 1:
            raise ValueError("row 1 is damaged")
        return numbered(first_row, rows)

    ahead = prefetch(batches, "meta")
    ahead(0, 1)
    with pytest.raises(ValueError, match="row 1"):
        ahead(1, 1)


def test_on_the_cpu_nothing_stands_between() -> None:
    assert prefetch(numbered, "cpu") is numbered
