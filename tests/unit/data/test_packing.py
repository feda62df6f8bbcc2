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
from overnight.data.permutation import Permutation, build_permutation
from overnight.data.shards import Manifest

END_OF_TEXT = 50_256  # that of the folders `prepared` writes
Prepare = Callable[..., Manifest]

some_lengths = st.lists(st.integers(1, 30), min_size=1, max_size=60)


def documents(lengths: list[int]) -> list[list[int]]:
    """Documents that can be told apart: an end-of-text id, then numbers that occur once."""
    following = itertools.count()
    return [[END_OF_TEXT, *itertools.islice(following, length - 1)] for length in lengths]


def naive_pack(lengths: list[int], order: Permutation, room_of_row: int) -> tuple[list[list[int]], int]:
    """Rows as lists of documents, and how many tokens are cut off: read from the description, no index."""
    upcoming = [order(place) for place in range(len(lengths))]
    buffer: list[int] = []
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


@given(lengths=some_lengths, room=st.integers(2, 20), seed=st.integers(0, 99), buffer=st.integers(1, 70))
def test_packing_equals_its_naive_twin(lengths: list[int], room: int, seed: int, buffer: int) -> None:
    order = build_permutation(len(lengths), seed, epoch=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "BUFFER_DOCUMENTS", buffer)
        patch.setattr(packing, "ORDERED_DOCUMENTS", 7)
        packed = pack(np.array(lengths), order, room)
        rows, cut = naive_pack(lengths, order, room)
    starts = packed.row_starts
    assert [packed.documents[a:b].tolist() for a, b in itertools.pairwise(starts)] == rows
    assert packed.rows == len(rows)
    assert packed.cut_tokens == cut


@settings(max_examples=40)
@given(data=st.data())
def test_rows_are_whole_documents_and_at_most_one_beginning_and_the_rest_is_counted(
    prepared: Prepare, data: st.DataObject
) -> None:
    lengths = data.draw(st.lists(st.integers(1, 30), min_size=2, max_size=60), "lengths")
    written = documents(lengths)
    flat = list(itertools.chain(*written))
    length = data.draw(st.integers(1, min(25, len(flat) - 1)), "tokens_per_row")
    epoch = data.draw(st.integers(0, 3), "epoch")
    with tempfile.TemporaryDirectory() as folder:
        prepared(Path(folder), flat, shard_tokens=data.draw(st.integers(3, 200), "shard_tokens"))
        stream = BestFitStream(folder, tokens_per_row=length, seed=data.draw(st.integers(0, 99), "seed"))
        before = sum(stream.epoch(each).rows for each in range(epoch))
        packed = stream.epoch(epoch)
        batch = stream.batch(before, packed.rows)
    assert (batch.ids[:, 0] == END_OF_TEXT).all()
    assert torch.equal(batch.ids[:, 1:], batch.targets[:, :-1])
    seen: Counter[int] = Counter()
    for first, ids in zip(batch.ids[:, 0].tolist(), batch.targets.tolist(), strict=True):
        row = [first, *ids]
        begins = [place for place, id in enumerate(row) if id == END_OF_TEXT]
        pieces = [tuple(row[a:b]) for a, b in itertools.pairwise([*begins, len(row)])]
        for index, piece in enumerate(pieces):
            whole = index < len(pieces) - 1
            assert any(list(piece) == (each if whole else each[: len(piece)]) for each in written)
        seen.update(row)
    assert seen.pop(END_OF_TEXT) <= len(written)
    assert set(seen.values()) <= {1}, "no document comes twice"
    assert packed.rows * (length + 1) + packed.cut_tokens == len(flat)


def folder_of(prepared: Prepare, folder: Path, shard_tokens: int = 100) -> Path:
    lengths = np.random.Generator(np.random.PCG64(0)).integers(1, 60, size=200).tolist()
    if not folder.exists():
        prepared(folder, list(itertools.chain(*documents(lengths))), shard_tokens=shard_tokens)
    return folder


@pytest.mark.parametrize("parts", [[400], [1] * 400, [5, 1, 94, 200, 100]])
def test_rows_do_not_depend_on_how_they_are_fetched(
    tmp_path: Path, prepared: Prepare, parts: list[int]
) -> None:
    folder = folder_of(prepared, tmp_path / "data")
    whole = BestFitStream(folder, tokens_per_row=32, seed=3).batch(0, 400)
    resumed = BestFitStream(folder, tokens_per_row=32, seed=3)
    assert resumed.windows_per_epoch < 250  # so that the rows cross epochs
    firsts = list(itertools.accumulate(parts, initial=0))
    pieces = [resumed.batch(first, rows) for first, rows in zip(firsts, parts, strict=False)]
    assert torch.equal(torch.cat([piece.ids for piece in pieces]), whole.ids)
    assert torch.equal(torch.cat([piece.targets for piece in pieces]), whole.targets)
    # And not on what was fetched before, an epoch or more away.
    assert torch.equal(resumed.batch(7, 3).ids, whole.ids[7:10])
    late = BestFitStream(folder, tokens_per_row=32, seed=3).batch(1000, 2)
    assert torch.equal(resumed.batch(1000, 2).ids, late.ids)


def test_rows_do_not_depend_on_shards_and_do_on_seed_and_epoch(tmp_path: Path, prepared: Prepare) -> None:
    one = BestFitStream(folder_of(prepared, tmp_path / "one", 10**6), tokens_per_row=32)
    many = BestFitStream(folder_of(prepared, tmp_path / "many", 7), tokens_per_row=32)
    other = BestFitStream(folder_of(prepared, tmp_path / "one"), tokens_per_row=32, seed=1)
    rows = one.windows_per_epoch
    first = one.batch(0, rows).ids
    assert torch.equal(many.batch(0, rows).ids, first)
    assert not torch.equal(other.batch(0, rows).ids, first)
    second = one.batch(rows, rows).ids
    assert not torch.equal(second, first)
    assert sorted(second.tolist()) != sorted(first.tolist()), "documents are put together anew"


def test_a_batch_is_two_contiguous_int64_tensors(tmp_path: Path, prepared: Prepare) -> None:
    batch = BestFitStream(folder_of(prepared, tmp_path / "data"), tokens_per_row=32).batch(0, 3)
    for tensor in (batch.ids, batch.targets):
        assert tensor.shape == (3, 32)
        assert tensor.dtype == torch.int64
        assert tensor.is_contiguous()


def test_what_is_cut_off_is_said(tmp_path: Path, prepared: Prepare) -> None:
    lengths = [4, 4, 4, 4, 9]  # in rows of 8: two pairs, and a ninth token that finds no place
    prepared(tmp_path, list(itertools.chain(*documents(lengths))))
    stream = BestFitStream(tmp_path, tokens_per_row=7)
    assert stream.windows_per_epoch == 3
    assert stream.describe_loss() == (
        "1 of 25 tokens (4.00%) cut off in an epoch, 1 of them from documents longer than a row"
    )


def test_best_fit_cuts_off_less_than_taking_documents_as_they_come() -> None:
    lengths = np.random.Generator(np.random.PCG64(1)).lognormal(5, 1, size=4000).astype(np.int64) + 1
    order = build_permutation(lengths.size, 0, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "BUFFER_DOCUMENTS", 1)
        as_they_come = pack(lengths, order, 513).cut_tokens
    in_any_case = int(np.maximum(lengths - 513, 0).sum())
    assert pack(lengths, order, 513).cut_tokens - in_any_case < 0.1 * (as_they_come - in_any_case)


def test_memory_is_some_bytes_a_document(tmp_path: Path, prepared: Prepare) -> None:
    stream = BestFitStream(folder_of(prepared, tmp_path / "data"), tokens_per_row=32)
    packed = stream.epoch(0)
    assert packed.documents.nbytes <= 4 * 200
    assert packed.row_starts.nbytes == 8 * (stream.windows_per_epoch + 1)
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


def test_a_split_that_does_not_begin_with_a_document_is_refused(tmp_path: Path, prepared: Prepare) -> None:
    prepared(tmp_path / "none", range(300))
    prepared(tmp_path / "rest", [1, 2, END_OF_TEXT, *range(300)])
    for name in ("none", "rest"):
        with pytest.raises(ValueError, match="choose packing=stream, or prepare the text again"):
            BestFitStream(tmp_path / name, tokens_per_row=8)


def test_a_row_longer_than_the_data_is_refused_as_by_the_stream(tmp_path: Path, prepared: Prepare) -> None:
    prepared(tmp_path, [END_OF_TEXT, *range(63)])
    messages = []
    for kind in (TokenStream, BestFitStream):
        with pytest.raises(ValueError, match="do not fit") as refused:
            kind(tmp_path, tokens_per_row=64)
        messages.append(str(refused.value))
    assert messages[0] == messages[1]
    assert BestFitStream(tmp_path, tokens_per_row=63).windows_per_epoch == 1
