from __future__ import annotations

import itertools
import math
import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from overnight.data import token_reader
from overnight.data.loader import Batch, TokenStream, prefetch
from overnight.data.permutation import build_permutation, derive_keys
from overnight.data.shards import Manifest

Prepare = Callable[..., Manifest]


# The order of the rows


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_epoch_has_every_window_once_and_every_token_as_target(
    prepared: Prepare, data: st.DataObject
) -> None:
    n = data.draw(st.integers(2, 400), "tokens")
    length = data.draw(st.integers(1, n - 1), "tokens_per_row")
    shard_tokens = data.draw(st.integers(1, n + 5) if n < 50 else st.integers(20, n + 5), "shard_tokens")
    epoch = data.draw(st.integers(0, 3), "epoch")
    with tempfile.TemporaryDirectory() as folder:
        prepared(Path(folder), range(n), shard_tokens=shard_tokens)
        stream = TokenStream(folder, tokens_per_row=length, seed=data.draw(st.integers(0, 2**32), "seed"))
        rows = stream.rows_per_epoch
        batch = stream.batch(epoch * rows, rows)
    assert rows == math.ceil(n / length)
    # Each row is consecutive around the ring, its targets one further on.
    assert torch.equal(batch.ids, (batch.ids[:, :1] + torch.arange(length)) % n)
    assert torch.equal(batch.targets, (batch.ids + 1) % n)
    assert len(set(batch.ids[:, 0].tolist())) == rows
    counts = Counter(batch.targets.flatten().tolist())
    assert set(counts) == set(range(n))
    assert set(counts.values()) <= {1, 2}
    assert sum(count == 2 for count in counts.values()) == rows * length - n < length


def test_epochs_and_seeds_differ_in_order_and_boundaries(tmp_path: Path, prepared: Prepare) -> None:
    prepared(tmp_path, range(3000))
    stream, other = (TokenStream(tmp_path, tokens_per_row=16, seed=seed) for seed in (0, 1))
    rows = stream.rows_per_epoch
    starts = [tuple(map(stream.row_start, range(epoch * rows, epoch * rows + rows))) for epoch in range(4)]
    starts.append(tuple(map(other.row_start, range(rows))))
    assert len(set(starts)) == len({tuple(sorted(each)) for each in starts}) == 5
    assert sum(second - first == 16 for first, second in itertools.pairwise(starts[0])) < 10


def naive_rows(ids: list[int], length: int, seed: int, rows: range, window: int | None) -> list[list[int]]:
    """Row by row and index by index: the order that every run so far was trained in."""
    n, found = len(ids), []
    window = min(window or n, n)
    starts = list(range(0, n, window))[: n // window]
    sizes = [end - start for start, end in itertools.pairwise([*starts, n])]
    counts = [math.ceil(size / length) for size in sizes]
    for row in rows:
        (epoch, index), number = divmod(row, sum(counts)), 0
        while index >= counts[number]:
            index, number = index - counts[number], number + 1
        suffix = f" of portion {number}" if number else ""
        (offset,) = derive_keys(seed, epoch, f"shift{suffix}", 1)
        order = build_permutation(counts[number], seed, epoch, f"order{suffix}")
        start = offset % sizes[number] + int(order.at(index, 1)[0]) * length
        found.append([ids[starts[number] + (start + step) % sizes[number]] for step in range(length + 1)])
    return found


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_rows_equal_naive_twin_whatever_was_read_before(prepared: Prepare, data: st.DataObject) -> None:
    n = data.draw(st.integers(2, 20_000), "tokens")
    length = data.draw(st.integers(1, min(n - 1, 64)), "tokens_per_row")
    window = data.draw(st.none() | st.integers(length + 1, n + 9), "shuffle_window")
    seed = data.draw(st.integers(0, 2**63 - 1), "seed")
    first = data.draw(st.integers(0, 5 * n), "first_row")
    parts = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=4), "batches")
    ids = np.random.default_rng(seed).integers(0, 50_257, n).tolist()
    with tempfile.TemporaryDirectory() as folder:
        prepared(Path(folder), ids, shard_tokens=data.draw(st.integers(max(1, n // 40), n), "shard_tokens"))
        stream = TokenStream(folder, tokens_per_row=length, seed=seed, shuffle_window=window)
        stream.batch(data.draw(st.integers(0, 10**12), "row before"), 2)
        starts = itertools.accumulate(parts, initial=first)
        batches = [stream.batch(start, rows) for start, rows in zip(starts, parts, strict=False)]
    expected = naive_rows(ids, length, seed, range(first, first + sum(parts)), window)
    assert [row for batch in batches for row in batch.ids.tolist()] == [row[:-1] for row in expected]
    assert [row for batch in batches for row in batch.targets.tolist()] == [row[1:] for row in expected]
    for tensor in (batches[0].ids, batches[0].targets):
        assert tensor.dtype == torch.int64
        assert tensor.is_contiguous()


def test_row_order_is_pinned(tmp_path: Path, prepared: Prepare) -> None:
    """A resumed run must find the same rows, whatever version it began with."""
    prepared(tmp_path, [index % 50_000 for index in range(100_000)], shard_tokens=30_000)
    stream = TokenStream(tmp_path, tokens_per_row=16, seed=1337)
    assert [stream.row_start(row) for row in range(4)] == [38_410, 19_834, 7_706, 11_562]
    assert [stream.row_start(10**9 + row) for row in range(4)] == [19_189, 9_285, 98_597, 74_693]
    windows = TokenStream(tmp_path, tokens_per_row=16, seed=1337, shuffle_window=10_000)
    assert [windows.row_start(row) for row in (0, 1, 625, 626, 10**9)] == [2202, 5610, 19387, 12107, 933]


# Reading


def test_shard_cut_short_while_reading_is_refused(tmp_path: Path, prepared: Prepare) -> None:
    prepared(tmp_path, range(300), shard_tokens=1000)
    stream = TokenStream(tmp_path, tokens_per_row=200)
    os.truncate(tmp_path / "train-00000.bin", 1024 + 300)
    with pytest.raises(ValueError, match=r"train-00000\.bin"):
        list(stream.evaluation_batches(1))
    stream = TokenStream(tmp_path, "validation", tokens_per_row=1)
    next(stream.evaluation_batches(1))  # the file is open now
    os.truncate(tmp_path / "validation-00000.bin", 1024 + 1)
    with pytest.raises(ValueError, match=r"validation-00000\.bin"):
        stream.batch(0, 1)


def test_open_files_are_limited_and_closed(
    tmp_path: Path, prepared: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared(tmp_path, range(3000), shard_tokens=10)
    monkeypatch.setattr(token_reader, "files_at_once", lambda: 16)
    before = len(os.listdir("/dev/fd"))
    stream = TokenStream(tmp_path, tokens_per_row=16)
    batch = stream.batch(0, stream.rows_per_epoch)
    assert set(batch.targets.flatten().tolist()) == set(range(3000))
    assert len(os.listdir("/dev/fd")) - before == 16
    del stream
    assert len(os.listdir("/dev/fd")) == before


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(3, 200),
    length=st.integers(1, 64),
    rows=st.integers(1, 9),
    limit=st.none() | st.integers(1, 300),
)
def test_evaluation_has_every_target_once_in_order(
    prepared: Prepare, n: int, length: int, rows: int, limit: int | None
) -> None:
    length = min(length, n - 1)
    with tempfile.TemporaryDirectory() as folder:
        prepared(Path(folder), [0, 1, 2] * 30, range(n), shard_tokens=17)
        stream = TokenStream(folder, "validation", tokens_per_row=length)
        batches = list(stream.evaluation_batches(rows, limit))
    targets = torch.cat([batch.targets.flatten() for batch in batches])
    assert targets.tolist() == list(range(1, n))[:limit]
    assert torch.equal(torch.cat([batch.ids.flatten() for batch in batches]), targets - 1)
    shapes = [tuple(batch.ids.shape) for batch in batches]
    assert sum(shape != (rows, length) for shape in shapes) <= 2  # one with fewer rows, one shorter


def test_rows_longer_than_data_or_shuffle_window_are_refused(tmp_path: Path, prepared: Prepare) -> None:
    prepared(tmp_path, range(64), range(8))
    assert TokenStream(tmp_path, tokens_per_row=63).rows_per_epoch == 2
    for split, settings_of_stream, match in (
        ("train", {"tokens_per_row": 64}, "64 tokens .* the 64 of the train split"),
        ("validation", {"tokens_per_row": 8}, "the validation split"),
        ("train", {"tokens_per_row": 10, "shuffle_window": 10}, "shuffle_window=10 .* a row of 10"),
        ("test", {"tokens_per_row": 8}, "split='test'"),
    ):
        with pytest.raises(ValueError, match=match):
            TokenStream(tmp_path, split, **settings_of_stream)


# Prefetching


class Numbered:
    """Row n is the id n. Records what is read, and fails at one row if asked to."""

    def __init__(self, damaged_row: int | None = None) -> None:
        self.damaged_row = damaged_row
        self.read: list[tuple[int, int]] = []
        self.is_next_read = threading.Event()

    def batch(self, first_row: int, rows: int) -> Batch:
        self.read.append((first_row, rows))
        if first_row == self.damaged_row:
            raise ValueError("row is damaged")
        if first_row:
            self.is_next_read.set()
        ids = torch.arange(first_row, first_row + rows)[:, None]
        return Batch(ids, ids + 1)


@pytest.mark.parametrize("next_row", [None, lambda first_row: first_row + 7])
def test_next_batch_is_read_ahead_and_once(next_row: Callable[[int], int] | None) -> None:
    source = Numbered()
    loader = prefetch(source, "meta", next_row)
    loader.batch(0, 3)
    assert source.is_next_read.wait(timeout=60)
    following = 3 if next_row is None else 7
    loader.batch(following, 3)
    assert source.read.count((following, 3)) == 1
    for first, rows in [(4, 2), (0, 2), (2, 4), (6, 4), (7, 1)]:  # not the rows that were read ahead
        batch = loader.batch(first, rows)
        assert (batch.ids.shape, batch.ids.device.type) == ((rows, 1), "meta")
    assert prefetch(source, "cpu") is source


def test_failed_prefetch_is_tried_again_where_its_rows_are_asked_for() -> None:
    source = Numbered(damaged_row=1)
    loader = prefetch(source, "meta")
    loader.batch(0, 1)
    with pytest.raises(ValueError, match="damaged"):
        loader.batch(1, 1)
    assert source.read.count((1, 1)) == 2
    loader.batch(0, 1)
    while source.read.count((1, 1)) < 3:
        time.sleep(0.01)
    time.sleep(0.05)  # until it has failed
    source.damaged_row = None  # the row exists now
    assert loader.batch(1, 1).ids.shape == (1, 1)
