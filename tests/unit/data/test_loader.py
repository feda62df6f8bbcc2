from __future__ import annotations

import itertools
import math
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from overnight.data import shards
from overnight.data.loader import Batch, TokenStream
from overnight.data.permutation import build_permutation, derive_keys
from overnight.data.shards import Manifest

Prepare = Callable[..., Manifest]


@pytest.fixture
def stream_of(tmp_path: Path, prepared: Prepare) -> Callable[..., TokenStream]:
    """A stream over the ids 0, 1, ... n - 1: an id is its own place."""

    def build(n: int, tokens_per_row: int, *, shard_tokens: int = 100, seed: int = 0) -> TokenStream:
        folder = tmp_path / f"{n}-{shard_tokens}"
        if not folder.exists():
            prepared(folder, range(n), range(n), shard_tokens)
        return TokenStream(folder, tokens_per_row=tokens_per_row, seed=seed)

    return build


def rows_of(batches: list[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat([batch.ids for batch in batches]), torch.cat([batch.targets for batch in batches])


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_an_epoch_has_every_window_once_and_every_token_as_a_target(
    prepared: Prepare, data: st.DataObject
) -> None:
    n = data.draw(st.integers(2, 400), "tokens")
    length = data.draw(st.integers(1, n - 1), "tokens_per_row")
    shard_tokens = data.draw(st.integers(1, n + 5) if n < 50 else st.integers(20, n + 5), "shard_tokens")
    seed = data.draw(st.integers(0, 2**32), "seed")
    epoch = data.draw(st.integers(0, 3), "epoch")
    with tempfile.TemporaryDirectory() as folder:
        prepared(Path(folder), range(n), shard_tokens=shard_tokens)
        stream = TokenStream(folder, tokens_per_row=length, seed=seed)
        windows = stream.windows_per_epoch
        batch = stream.batch(epoch * windows, windows)
    assert windows == math.ceil(n / length)
    # Ids are their own places: each row must be consecutive around the circle, targets one further on.
    assert torch.equal(batch.ids, (batch.ids[:, :1] + torch.arange(length)) % n)
    assert torch.equal(batch.targets, (batch.ids + 1) % n)
    starts = sorted(batch.ids[:, 0].tolist())
    assert len(set(starts)) == windows
    counts = Counter(batch.targets.flatten().tolist())
    assert set(counts) == set(range(n))
    assert set(counts.values()) <= {1, 2}
    assert sum(count == 2 for count in counts.values()) == windows * length - n < length


def test_epochs_differ_in_order_and_in_boundaries(stream_of: Callable[..., TokenStream]) -> None:
    stream = stream_of(3000, 16)
    windows = stream.windows_per_epoch
    starts = [stream.batch(epoch * windows, windows).ids[:, 0] for epoch in range(4)]
    assert len({tuple(each.tolist()) for each in starts}) == 4
    assert len({int(each[0]) % 16 for each in starts}) > 1
    assert len({tuple(sorted(each.tolist())) for each in starts}) == 4
    other = stream_of(3000, 16, seed=1).batch(0, windows).ids[:, 0]
    assert not torch.equal(other, starts[0])


def test_an_epoch_is_shuffled(stream_of: Callable[..., TokenStream]) -> None:
    stream = stream_of(3000, 16)
    starts = stream.batch(0, stream.windows_per_epoch).ids[:, 0]
    follows = (starts[1:] - starts[:-1]) % 3000 == 16
    assert follows.sum() < 10


@pytest.mark.parametrize("parts", [[48], [1] * 48, [5, 1, 30, 12], [24, 24]])
def test_rows_do_not_depend_on_how_they_are_fetched(
    stream_of: Callable[..., TokenStream], parts: list[int]
) -> None:
    stream = stream_of(500, 32)  # 16 windows an epoch: 48 rows from row 7 on cross epochs
    whole = stream.batch(7, 48)
    firsts = [7 + done for done in itertools.accumulate(parts, initial=0)]
    pieces = [stream.batch(first, rows) for first, rows in zip(firsts, parts, strict=False)]
    ids, targets = rows_of(pieces)
    assert torch.equal(ids, whole.ids)
    assert torch.equal(targets, whole.targets)


def test_rows_do_not_depend_on_the_past_or_on_shards(stream_of: Callable[..., TokenStream]) -> None:
    one = stream_of(500, 32, shard_tokens=1000)
    many = stream_of(500, 32, shard_tokens=7)
    expected = one.batch(100, 8)
    for row in (0, 10**12, 3):
        many.batch(row, 2)
    assert torch.equal(many.batch(100, 8).ids, expected.ids)
    assert torch.equal(many.batch(100, 8).targets, expected.targets)


def naive_rows(ids: list[int], length: int, seed: int, rows: range) -> list[list[int]]:
    """Row by row and index by index: the order that every run so far was trained in."""
    n, found = len(ids), []
    windows = -(-n // length)
    for row in rows:
        epoch, place = divmod(row, windows)
        (shift,) = derive_keys(seed, epoch, "shift", 1)
        start = shift % n + build_permutation(windows, seed, epoch)(place) * length
        found.append([ids[(start + offset) % n] for offset in range(length + 1)])
    return found


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_the_order_of_the_rows_is_the_naive_one(prepared: Prepare, data: st.DataObject) -> None:
    n = data.draw(st.integers(2, 20_000), "tokens")
    length = data.draw(st.integers(1, min(n - 1, 64)), "tokens_per_row")
    seed = data.draw(st.integers(0, 2**63 - 1), "seed")
    first = data.draw(st.integers(0, 5 * n), "first_row")
    ids = np.random.default_rng(seed).integers(0, 50_257, n).tolist()
    with tempfile.TemporaryDirectory() as folder:
        prepared(Path(folder), ids, shard_tokens=data.draw(st.integers(max(1, n // 40), n), "shard_tokens"))
        batch = TokenStream(folder, tokens_per_row=length, seed=seed).batch(first, 40)
    expected = naive_rows(ids, length, seed, range(first, first + 40))
    assert batch.ids.tolist() == [row[:-1] for row in expected]
    assert batch.targets.tolist() == [row[1:] for row in expected]


def test_the_order_of_the_rows_is_pinned(tmp_path: Path, prepared: Prepare) -> None:
    """A resumed run must find the same rows, whatever version it began with."""
    prepared(tmp_path, [place % 50_000 for place in range(100_000)], shard_tokens=30_000)
    stream = TokenStream(tmp_path, tokens_per_row=16, seed=1337)
    assert [stream.window_start(row) for row in range(4)] == [38_410, 19_834, 7_706, 11_562]
    later = [stream.window_start(10**9 + row) for row in range(4)]
    assert later == [19_189, 9_285, 98_597, 74_693]


def test_a_shard_cut_short_meanwhile_is_refused(tmp_path: Path, prepared: Prepare) -> None:
    prepared(tmp_path, range(300), shard_tokens=1000)
    stream = TokenStream(tmp_path, tokens_per_row=200)
    os.truncate(tmp_path / "train-00000.bin", 1024 + 300)
    with pytest.raises(ValueError, match=r"train-00000\.bin is damaged|was cut short while it was read"):
        list(stream.evaluation_batches(1))
    stream = TokenStream(tmp_path, "validation", tokens_per_row=1)
    next(stream.evaluation_batches(1))
    os.truncate(tmp_path / "validation-00000.bin", 1024 + 1)
    with pytest.raises(ValueError, match="was cut short while it was read"):
        stream.batch(0, 1)


def test_more_shards_than_a_process_may_open(
    tmp_path: Path, prepared: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared(tmp_path, range(3000), shard_tokens=10)
    monkeypatch.setattr(shards, "files_at_once", lambda: 16)
    before = len(os.listdir("/dev/fd"))
    stream = TokenStream(tmp_path, tokens_per_row=16)
    batch = stream.batch(0, stream.windows_per_epoch)
    assert set(batch.targets.flatten().tolist()) == set(range(3000))
    assert len(os.listdir("/dev/fd")) - before == 16
    del stream
    assert len(os.listdir("/dev/fd")) == before


def test_a_batch_is_two_contiguous_int64_tensors(stream_of: Callable[..., TokenStream]) -> None:
    batch = stream_of(500, 32).batch(0, 3)
    for tensor in (batch.ids, batch.targets):
        assert tensor.shape == (3, 32)
        assert tensor.dtype == torch.int64
        assert tensor.is_contiguous()


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(3, 200),
    length=st.integers(1, 64),
    rows=st.integers(1, 9),
    limit=st.none() | st.integers(1, 300),
)
def test_evaluation_takes_every_target_once_and_in_order(
    prepared: Prepare, n: int, length: int, rows: int, limit: int | None
) -> None:
    length = min(length, n - 1)
    with tempfile.TemporaryDirectory() as folder:
        prepared(Path(folder), [0, 1, 2] * 30, range(n), shard_tokens=17)
        stream = TokenStream(folder, "validation", tokens_per_row=length)
        batches = list(stream.evaluation_batches(rows, limit))
    targets = torch.cat([batch.targets.flatten() for batch in batches]).tolist()
    assert targets == list(range(1, n))[:limit]
    assert torch.cat([batch.ids.flatten() for batch in batches]).tolist() == [
        target - 1 for target in targets
    ]
    shapes = [tuple(batch.ids.shape) for batch in batches]
    full = [shape for shape in shapes if shape == (rows, length)]
    assert len(shapes) - len(full) <= 2  # one with fewer rows, one shorter


def test_a_row_longer_than_the_data_is_refused(tmp_path: Path, prepared: Prepare) -> None:
    prepared(tmp_path, range(64), range(8))
    with pytest.raises(
        ValueError, match=r"64 tokens and its targets do not fit in the 64 of the train split"
    ):
        TokenStream(tmp_path, tokens_per_row=64)
    with pytest.raises(ValueError, match="the validation split"):
        TokenStream(tmp_path, "validation", tokens_per_row=8)
    assert TokenStream(tmp_path, tokens_per_row=63).windows_per_epoch == 2


def test_an_unknown_split_is_refused(tmp_path: Path, prepared: Prepare) -> None:
    prepared(tmp_path, range(64))
    with pytest.raises(ValueError, match="split='test' must be train or validation"):
        TokenStream(tmp_path, "test", tokens_per_row=8)


def test_opening_reads_every_shard(tmp_path: Path, prepared: Prepare) -> None:
    prepared(tmp_path, range(300))
    path = tmp_path / "train-00002.bin"
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"train-00002\.bin was changed since it was written"):
        TokenStream(tmp_path, tokens_per_row=8)
    # The other split is sound, and does not read this one.
    assert TokenStream(tmp_path, "validation", tokens_per_row=1).tokens == 2
