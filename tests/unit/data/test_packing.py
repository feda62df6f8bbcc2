from __future__ import annotations

import itertools
import tempfile
from collections import Counter
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


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=60),
    room=st.integers(2, 20),
    seed=st.integers(0, 99),
    buffer=st.integers(1, 70),
)
def test_packing_equals_naive_twin(lengths: list[int], room: int, seed: int, buffer: int) -> None:
    order = build_permutation(len(lengths), seed, epoch=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "BUFFER_DOCUMENTS", buffer)
        patch.setattr(packing, "ORDERED_DOCUMENTS", 7)
        packed = pack(np.array(lengths), order, room)
        rows, cut = naive_pack(lengths, order.at(0, len(lengths)).tolist(), room)
    assert [packed.documents[a:b].tolist() for a, b in packed.rows] == rows
    assert packed.cut_tokens == cut


@settings(max_examples=40)
@given(data=st.data())
def test_rows_are_whole_documents_and_one_cut_one(prepared: Prepare, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 30), min_size=2, max_size=60), "lengths")
    written = documents(lengths)
    length = data.draw(st.integers(1, min(25, sum(lengths) - 1)), "tokens_per_row")
    epoch = data.draw(st.integers(0, 3), "epoch")
    with tempfile.TemporaryDirectory() as folder:
        prepared(Path(folder), flat(lengths), shard_tokens=data.draw(st.integers(3, 200), "shard_tokens"))
        stream = BestFitStream(folder, tokens_per_row=length, seed=data.draw(st.integers(0, 99), "seed"))
        before = sum(len(stream.epoch(each).rows) for each in range(epoch))
        packed = stream.epoch(epoch)
        batch = stream.batch(before, len(packed.rows))
    assert (batch.ids[:, 0] == END_OF_TEXT).all()
    assert torch.equal(batch.ids[:, 1:], batch.targets[:, :-1])
    seen: Counter[int] = Counter()
    for row in torch.cat([batch.ids[:, :1], batch.targets], dim=1).tolist():
        begins = [index for index, id in enumerate(row) if id == END_OF_TEXT]
        *whole, last = [row[a:b] for a, b in itertools.pairwise([*begins, len(row)])]
        assert all(piece in written for piece in whole)
        assert any(last == each[: len(last)] for each in written)
        seen.update(row)
    assert seen.pop(END_OF_TEXT) <= len(written)
    assert set(seen.values()) <= {1}, "no document comes twice"
    assert len(packed.rows) * (length + 1) + packed.cut_tokens == sum(lengths)


def folder_of(prepared: Prepare, folder: Path, shard_tokens: int = 100) -> Path:
    lengths = np.random.Generator(np.random.PCG64(0)).integers(1, 60, size=200).tolist()
    if not folder.exists():
        prepared(folder, flat(lengths), shard_tokens=shard_tokens)
    return folder


@pytest.mark.parametrize("parts", [[400], [1] * 400, [5, 1, 94, 200, 100]])
def test_packed_rows_do_not_depend_on_batches(tmp_path: Path, prepared: Prepare, parts: list[int]) -> None:
    folder = folder_of(prepared, tmp_path / "data")
    whole = BestFitStream(folder, tokens_per_row=32, seed=3).batch(0, 400)
    resumed = BestFitStream(folder, tokens_per_row=32, seed=3)
    assert resumed.rows_per_epoch < 250  # so that the rows cross epochs
    firsts = itertools.accumulate(parts, initial=0)
    pieces = [resumed.batch(first, rows) for first, rows in zip(firsts, parts, strict=False)]
    for name in ("ids", "targets"):
        assert torch.equal(torch.cat([getattr(piece, name) for piece in pieces]), getattr(whole, name))
        assert getattr(whole, name).dtype == torch.int64
        assert getattr(whole, name).is_contiguous()
    # And not on what was fetched before, an epoch or more away.
    assert torch.equal(resumed.batch(7, 3).ids, whole.ids[7:10])
    late = BestFitStream(folder, tokens_per_row=32, seed=3).batch(1000, 2)
    assert torch.equal(resumed.batch(1000, 2).ids, late.ids)


def test_packed_rows_depend_on_seed_and_epoch_not_shards(tmp_path: Path, prepared: Prepare) -> None:
    one = BestFitStream(folder_of(prepared, tmp_path / "one", 10**6), tokens_per_row=32)
    many = BestFitStream(folder_of(prepared, tmp_path / "many", 7), tokens_per_row=32)
    other = BestFitStream(folder_of(prepared, tmp_path / "one"), tokens_per_row=32, seed=1)
    rows = one.rows_per_epoch
    first, second = one.batch(0, rows).ids, one.batch(rows, rows).ids
    assert torch.equal(many.batch(0, rows).ids, first)
    assert not torch.equal(other.batch(0, rows).ids, first)
    assert sorted(second.tolist()) != sorted(first.tolist()), "documents are combined anew"


def test_packed_row_order_is_pinned(tmp_path: Path, prepared: Prepare) -> None:
    """A resumed run must find the same rows, whatever version it began with."""
    stream = BestFitStream(folder_of(prepared, tmp_path / "data"), tokens_per_row=32, seed=1337)
    assert [stream.batch(row, 1).targets[0, 0].item() for row in (0, 1, 2, 500, 501)] == [
        4016,
        3219,
        5495,
        4396,
        132,
    ]


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


def test_packing_memory_is_a_few_bytes_a_document(tmp_path: Path, prepared: Prepare) -> None:
    stream = BestFitStream(folder_of(prepared, tmp_path / "data"), tokens_per_row=32)
    assert stream.epoch(0).documents.nbytes <= 4 * 200
    assert stream.epoch(0).rows.nbytes == 16 * stream.rows_per_epoch
    for epoch in range(5):
        stream.epoch(epoch)
    assert len(stream._packed) == packing.EPOCHS_KEPT


@pytest.mark.parametrize("scanned", [1, 3, 1 << 22])
@pytest.mark.parametrize("shard_tokens", [1, 4, 100])
def test_documents_are_found_across_shards(
    tmp_path: Path, prepared: Prepare, monkeypatch: pytest.MonkeyPatch, scanned: int, shard_tokens: int
) -> None:
    monkeypatch.setattr(packing, "SCANNED_TOKENS", scanned)
    E = END_OF_TEXT
    prepared(tmp_path, [E, 1, 2, E, 3, E, E, 4], shard_tokens=shard_tokens)
    assert BestFitStream(tmp_path, tokens_per_row=3)._starts.tolist() == [0, 3, 5, 6, 8]


@pytest.mark.parametrize("ids", [range(300), [1, 2, END_OF_TEXT, *range(300)]])
def test_split_that_does_not_begin_with_a_document_is_refused(
    tmp_path: Path, prepared: Prepare, ids: list[int]
) -> None:
    prepared(tmp_path, ids)
    with pytest.raises(ValueError, match="packing=stream"):
        BestFitStream(tmp_path, tokens_per_row=8)


def test_row_longer_than_data_is_refused_as_by_the_stream(tmp_path: Path, prepared: Prepare) -> None:
    prepared(tmp_path, [END_OF_TEXT, *range(63)])
    for kind in (TokenStream, BestFitStream):
        with pytest.raises(ValueError, match="a row of 64 tokens"):
            kind(tmp_path, tokens_per_row=64)
    assert BestFitStream(tmp_path, tokens_per_row=63).rows_per_epoch == 1
