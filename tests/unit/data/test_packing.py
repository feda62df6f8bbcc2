from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from overnight.data import packing
from overnight.data.loader import TokenStream
from overnight.data.packing import BestFitStream, pack
from overnight.data.permutation import build_permutation
from overnight.data.shards import Manifest

END_OF_TEXT = 50_256  # that of the folders `prepared` writes
Prepare = Callable[..., Manifest]


def documents(lengths: list[int]) -> list[list[int]]:
    """Documents that can be told apart: an end-of-text id, then numbers that occur once."""
    following = itertools.count()
    return [[END_OF_TEXT, *itertools.islice(following, length - 1)] for length in lengths]


def flat(lengths: list[int]) -> list[int]:
    return list(itertools.chain(*documents(lengths)))


def naive_pack(lengths: list[int], order: list[int], room_of_row: int) -> tuple[list[list[int]], int]:
    """Rows as lists of documents, and how many tokens are cut off: from the description, without an index."""
    upcoming, buffer = list(order), []
    rows: list[list[int]] = []
    row, room, cut = [], room_of_row, 0
    while upcoming or buffer:
        while upcoming and len(buffer) < packing.BUFFER_DOCUMENTS:
            buffer.append(upcoming.pop(0))
        fitting = [document for document in buffer if min(lengths[document], room_of_row) <= room]
        by_size = sorted(fitting or buffer, key=lambda document: min(lengths[document], room_of_row))
        chosen = by_size[-1 if fitting else 0]  # sorting keeps the order of those of one size
        buffer.remove(chosen)
        row.append(chosen)
        cut += max(0, lengths[chosen] - room)
        room -= min(lengths[chosen], room)
        if not room:
            rows.append(row)
            row, room = [], room_of_row
    return rows, cut + room_of_row - room


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_packed_rows_equal_naive_twin(prepared: Prepare, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 30), min_size=2, max_size=60), "lengths")
    length = data.draw(st.integers(1, min(25, sum(lengths) - 1)), "tokens_per_row")
    epoch, seed = data.draw(st.integers(0, 3), "epoch"), data.draw(st.integers(0, 99), "seed")
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "BUFFER_DOCUMENTS", data.draw(st.integers(1, 70), "buffer"))
        patch.setattr(packing, "ORDERED_DOCUMENTS", 7)
        patch.setattr(packing, "SCANNED_TOKENS", data.draw(st.integers(1, 100), "tokens scanned at a time"))
        prepared(Path(folder), flat(lengths), shard_tokens=data.draw(st.integers(1, 200), "shard_tokens"))
        stream = BestFitStream(folder, tokens_per_row=length, seed=seed)
        stream.batch(data.draw(st.integers(0, 200), "row before"), 2)
        before = sum(len(stream.epoch(each).rows) for each in range(epoch))
        packed = stream.epoch(epoch)
        batch = stream.batch(before, len(packed.rows))
        order = build_permutation(len(lengths), seed, epoch).at(0, len(lengths)).tolist()
        rows, cut = naive_pack(lengths, order, length + 1)
    assert packed.cut_tokens == cut
    shuffled = [rows[row] for row in build_permutation(len(rows), seed, epoch).at(0, len(rows))]
    written = documents(lengths)
    tokens = [[id for document in row for id in written[document]][: length + 1] for row in shuffled]
    assert torch.cat([batch.ids[:, :1], batch.targets], dim=1).tolist() == tokens
    assert torch.equal(batch.ids[:, 1:], batch.targets[:, :-1])
    assert batch.ids.dtype == torch.int64
    assert batch.ids.is_contiguous()
    assert (batch.ids[:, 0] == END_OF_TEXT).all()
    assert len(packed.rows) * (length + 1) + packed.cut_tokens == sum(lengths)


@pytest.fixture
def stream(tmp_path: Path, prepared: Prepare) -> BestFitStream:
    """Rows of 200 documents: 186 rows of 32 an epoch."""
    prepared(tmp_path, flat(np.random.Generator(np.random.PCG64(0)).integers(1, 60, size=200).tolist()))
    return BestFitStream(tmp_path, tokens_per_row=32, seed=1337)


def test_packed_row_order_is_pinned(stream: BestFitStream) -> None:
    """A resumed run must find the same rows, whatever version it began with."""
    targets = [stream.batch(row, 1).targets[0, 0].item() for row in (0, 1, 2, 500, 501)]
    assert targets == [4016, 3219, 5495, 4396, 132]


def test_packing_describes_what_is_cut_off(tmp_path: Path, prepared: Prepare) -> None:
    prepared(tmp_path, flat([4, 4, 4, 4, 9]))  # in rows of 8: two pairs, and a ninth token without a row
    stream = BestFitStream(tmp_path, tokens_per_row=7)
    assert stream.rows_per_epoch == 3
    assert stream.describe_loss().startswith("1 of 25 tokens (4.00%) cut off")


def test_best_fit_cuts_off_less_than_documents_in_order() -> None:
    lengths = np.random.Generator(np.random.PCG64(1)).lognormal(5, 1, size=4000).astype(np.int64) + 1
    order = build_permutation(lengths.size, 0, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "BUFFER_DOCUMENTS", 1)
        in_order = pack(lengths, order, 513).cut_tokens
    in_any_case = int(np.maximum(lengths - 513, 0).sum())
    assert pack(lengths, order, 513).cut_tokens - in_any_case < 0.1 * (in_order - in_any_case)


def test_packing_memory_is_a_few_bytes_a_document(stream: BestFitStream) -> None:
    assert stream.epoch(0).documents.nbytes <= 4 * 200
    assert stream.epoch(0).rows.nbytes == 16 * stream.rows_per_epoch
    for epoch in range(5):
        stream.epoch(epoch)
    assert len(stream._packed) == packing.EPOCHS_KEPT


def test_split_without_documents_or_shorter_than_a_row_is_refused(tmp_path: Path, prepared: Prepare) -> None:
    for name, ids in (("none", range(300)), ("late", [1, 2, END_OF_TEXT, *range(300)])):
        prepared(tmp_path / name, ids)
        with pytest.raises(ValueError, match="packing=stream"):
            BestFitStream(tmp_path / name, tokens_per_row=8)
    prepared(tmp_path / "short", [END_OF_TEXT, *range(63)])
    for kind in (TokenStream, BestFitStream):
        with pytest.raises(ValueError, match="a row of 64 tokens"):
            kind(tmp_path / "short", tokens_per_row=64)
    assert BestFitStream(tmp_path / "short", tokens_per_row=63).rows_per_epoch == 1
