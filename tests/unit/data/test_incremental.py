"""Rows read while the text is still being prepared are the rows of the finished folder."""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from overnight.data import incremental
from overnight.data.atomic_folder import exclusive, is_locked_folder, staging_path
from overnight.data.incremental import (
    IncrementalFolder,
    IncrementalStream,
    is_being_prepared,
    open_incremental,
)
from overnight.data.loader import TokenStream
from overnight.data.shards import SO_FAR, Manifest, open_tokens, read_manifest, verify
from overnight.preparation import prepare as prepare_module
from overnight.preparation.prepare import prepare
from overnight.preparation.prepare_config import PrepareConfig

Prepare = Callable[..., Manifest]
ROW = 16
PORTION = 2000


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PrepareConfig:
    """A text of about 40 units in six waves, some of its documents twice."""
    lines = [f"Document {number % 550} of them: " + "word " * (number % 37) for number in range(600)]
    source = tmp_path / "texts"
    source.mkdir()
    for number in range(20):
        part = lines[number * 30 : number * 30 + 30]
        (source / f"{number:02}.jsonl").write_text(
            "".join(json.dumps({"text": line}) + "\n" for line in part)
        )
    monkeypatch.setattr(prepare_module, "UNIT_BYTES", 2000)
    monkeypatch.setattr(prepare_module, "EARLY_BYTES", 12_000)
    return PrepareConfig(
        source=str(source),
        out=str(tmp_path / "out"),
        tokenizer="characters",
        validation_fraction=0.2,
        shard_tokens=1500,
        workers=1,
    )


def folder_of(config: PrepareConfig) -> Path:
    return Path(config.out or "")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stop_at_wave(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupt a preparation right after it has shown its shards for the `number`-th time."""
    real, waves = prepare_module.show_so_far, 0

    def show(place: Path) -> None:
        nonlocal waves
        real(place)
        waves += 1
        if waves == number:
            raise KeyboardInterrupt

    monkeypatch.setattr(prepare_module, "show_so_far", show)


def interrupted(config: PrepareConfig, monkeypatch: pytest.MonkeyPatch, wave: int = 1) -> Path:
    """The folder of a preparation that was interrupted."""
    with monkeypatch.context() as patch:
        stop_at_wave(wave, patch)
        with pytest.raises(KeyboardInterrupt):
            prepare(config)
    return folder_of(config)


# ---------------------------------------------------------------- rows in portions


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_a_beginning_has_the_rows_of_the_whole(prepared: Prepare, data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 30), "tokens_per_row")
    portion = data.draw(st.integers(length + 1, 90), "shuffle_window")
    known = data.draw(st.integers(length + 1, 300), "tokens so far")
    seed = data.draw(st.integers(0, 2**32), "seed")
    whole = known + data.draw(st.integers(0, 300), "more tokens")
    streams = []
    with tempfile.TemporaryDirectory() as folder:
        for n in (known, whole):
            prepared(Path(folder, f"{n}"), range(n), shard_tokens=70)
            path = Path(folder, f"{n}")
            streams.append(TokenStream(path, tokens_per_row=length, seed=seed, shuffle_window=portion))
        beginning, complete = streams
        ready = beginning.rows_before_last_portion
        assert ready == max(0, known // portion - 1) * math.ceil(portion / length)
        assert torch.equal(beginning.batch(0, ready).ids, complete.batch(0, ready).ids)
        assert torch.equal(beginning.batch(0, ready).targets, complete.batch(0, ready).targets)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_an_epoch_goes_through_each_portion_once(prepared: Prepare, data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 30), "tokens_per_row")
    portion = data.draw(st.integers(length + 1, 120), "shuffle_window")
    n = data.draw(st.integers(length + 1, 400), "tokens")
    epoch = data.draw(st.integers(0, 3), "epoch")
    with tempfile.TemporaryDirectory() as folder:
        prepared(Path(folder), range(n), shard_tokens=70)
        stream = TokenStream(folder, tokens_per_row=length, shuffle_window=portion)
        batch = stream.batch(epoch * stream.windows_per_epoch, stream.windows_per_epoch)
    starts = list(range(0, n, portion))[: max(1, n // portion)]
    ends = [*starts[1:], n]
    row = 0
    for start, end in zip(starts, ends, strict=True):
        rows = math.ceil((end - start) / length)
        ids, targets = batch.ids[row : row + rows], batch.targets[row : row + rows]
        around = start + (ids[:, :1] - start + torch.arange(length)) % (end - start)
        assert torch.equal(ids, around)
        assert torch.equal(targets, start + (ids - start + 1) % (end - start))
        assert set(targets.flatten().tolist()) == set(range(start, end))
        row += rows
    assert row == stream.windows_per_epoch


def test_portions_and_epochs_have_orders_of_their_own(tmp_path: Path, prepared: Prepare) -> None:
    prepared(tmp_path, range(3000), shard_tokens=700)
    stream = TokenStream(tmp_path, tokens_per_row=10, shuffle_window=1000)
    orders = [
        tuple((stream.window_start(100 * block + row) % 1000) // 10 for row in range(100))
        for block in range(6)
    ]
    assert len(set(orders)) == 6
    assert orders[0] != tuple(sorted(orders[0]))


def test_shuffled_as_a_whole_a_beginning_has_other_rows(tmp_path: Path, prepared: Prepare) -> None:
    """The negative control: this is what `shuffle_window` is for."""
    for n in (500, 900):
        prepared(tmp_path / f"{n}", range(n))
    beginning, whole = (TokenStream(tmp_path / f"{n}", tokens_per_row=10) for n in (500, 900))
    assert not torch.equal(beginning.batch(0, 10).ids, whole.batch(0, 10).ids)


def test_what_is_shuffled_at_a_time_is_longer_than_a_row(tmp_path: Path, prepared: Prepare) -> None:
    prepared(tmp_path, range(500))
    with pytest.raises(ValueError, match=r"shuffle_window=10 is no more than a row of 10: give a thousand"):
        TokenStream(tmp_path, tokens_per_row=10, shuffle_window=10)


# ---------------------------------------------------------------- shards that are shown early


def test_what_is_shown_early_stays_as_it_is(config: PrepareConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[Manifest, dict[str, bytes]]] = []
    real = prepare_module.show_so_far

    def show(place: Path) -> None:
        real(place)
        manifest = read_manifest(place, SO_FAR)
        names = [shard.name for shard in (*manifest.train, *manifest.validation)]
        shown.append((manifest, {name: (place / name).read_bytes() for name in names}))

    monkeypatch.setattr(prepare_module, "show_so_far", show)
    prepare(config)
    final = verify(folder_of(config))
    whole = contents(folder_of(config))
    held_out = [open_tokens(folder_of(config) / shard.name) for shard in final.validation]
    assert len(shown) >= 2
    for manifest, files in shown:
        assert manifest.train == final.train[: len(manifest.train)]
        assert manifest.request == final.request
        for shard in (*manifest.train, *manifest.validation):
            if not shard.is_growing:
                assert files[shard.name] == whole[shard.name]
        (growing,) = (shard for shard in manifest.validation if shard.is_growing)
        before = len(manifest.validation) - 1
        beginning = held_out[before][: growing.tokens].tobytes()
        assert files[growing.name][1024:] == beginning
    assert [len(manifest.train) for manifest, _ in shown] == sorted(len(each.train) for each, _ in shown)
    at_once = dataclasses.replace(config, out=str(folder_of(config)) + "-at-once")
    monkeypatch.setattr(prepare_module, "EARLY_BYTES", 10**9)
    prepare(at_once)
    assert contents(folder_of(at_once)) == whole


def test_an_interrupted_preparation_keeps_what_it_has_shown(
    config: PrepareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = interrupted(config, monkeypatch)
    assert not folder.exists()
    assert is_being_prepared(folder)
    place = staging_path(folder)
    shards = {path.name: path.stat().st_ino for path in place.glob("train-*.bin")}
    assert shards
    interrupted(config, monkeypatch, wave=2)
    assert {name: (place / name).stat().st_ino for name in shards} == shards
    prepare(config)
    assert {name: (folder / name).stat().st_ino for name in shards} == shards
    other = dataclasses.replace(config, out=str(folder) + "-undisturbed")
    prepare(other)
    assert contents(folder_of(other)) == contents(folder)


def test_a_refusal_keeps_what_was_begun_before(
    config: PrepareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = interrupted(config, monkeypatch)

    def refuse(place: Path) -> None:
        raise ValueError("no")

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "decide_all", refuse)
        with pytest.raises(ValueError, match="no"):
            prepare(config)
    assert IncrementalFolder(folder).manifest.train


def test_near_duplicates_are_known_at_the_end_only(
    config: PrepareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "show_so_far", lambda place: pytest.fail("shown too early"))
    assert prepare(dataclasses.replace(config, near_duplicates="drop"))


# ---------------------------------------------------------------- reading them


def test_rows_are_read_as_they_become_ready(
    config: PrepareConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = interrupted(config, monkeypatch)
    growing = open_incremental(folder, PORTION)
    stream = IncrementalStream(growing, tokens_per_row=ROW, seed=5, shuffle_window=PORTION)
    validation = TokenStream(growing, "validation", tokens_per_row=ROW)
    judged = next(validation.evaluation_batches(4, 64))
    ready = next(rows for rows in range(10_000) if not stream.is_ready(rows + 1))
    assert ready > 3
    first = stream.batch(0, ready)
    with pytest.raises(ValueError, match=f"row {ready + 1} is not prepared yet"):
        stream.batch(ready, 1)
    assert not stream.wait_for(ready + 1)
    assert "nobody prepares" in capsys.readouterr().err
    with exclusive(folder):
        assert is_locked_folder(folder)
        assert not stream.wait_for(ready + 1, lambda: True)
    interrupted(config, monkeypatch, wave=2)
    assert stream.wait_for(ready + 1)
    prepare(config)
    assert stream.wait_for(10**6)
    assert growing.is_complete
    final = TokenStream(folder, tokens_per_row=ROW, seed=5, shuffle_window=PORTION)
    assert torch.equal(first.ids, final.batch(0, ready).ids)
    for row in (0, ready - 3, ready, final.windows_per_epoch, 10**5):
        assert torch.equal(stream.batch(row, 6).ids, final.batch(row, 6).ids)
        assert torch.equal(stream.batch(row, 6).targets, final.batch(row, 6).targets)
    assert (stream.tokens, stream.windows_per_epoch) == (final.tokens, final.windows_per_epoch)
    again = next(validation.evaluation_batches(4, 64))  # of a beginning that is gone by now
    assert torch.equal(again.ids, judged.ids)
    assert torch.equal(
        judged.ids, next(TokenStream(folder, "validation", tokens_per_row=ROW).evaluation_batches(4, 64)).ids
    )


def test_opening_waits_for_the_first_portion(
    config: PrepareConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = interrupted(config, monkeypatch)
    with pytest.raises(ValueError, match=r"has not the 200,000 training tokens yet .* nobody prepares it"):
        open_incremental(folder, 100_000)

    def meanwhile(seconds: float) -> None:
        monkeypatch.setattr(incremental, "is_locked_folder", lambda folder: False)
        prepare(config)

    monkeypatch.setattr(incremental, "is_locked_folder", lambda folder: True)
    monkeypatch.setattr(incremental.time, "sleep", meanwhile)
    assert open_incremental(folder, 100_000).is_complete
    assert "waiting for the first 200,000 training tokens" in capsys.readouterr().err


def test_a_shard_that_is_not_as_it_was_written_is_refused(
    config: PrepareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = interrupted(config, monkeypatch)
    shard = staging_path(folder) / "train-00001.bin"
    damaged = bytearray(shard.read_bytes())
    damaged[-1] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"train-00001\.bin was changed since it was written"):
        IncrementalFolder(folder)


def test_shards_that_move_while_they_are_looked_at_are_found(
    config: PrepareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = interrupted(config, monkeypatch)
    growing = IncrementalFolder(folder)
    real = incremental.read_manifest

    def move_first(place: Path, name: str) -> Manifest:
        monkeypatch.setattr(incremental, "read_manifest", real)
        prepare(config)
        return real(place, name)

    monkeypatch.setattr(incremental, "read_manifest", move_first)
    growing.refresh()
    assert growing.is_complete
    assert growing.manifest == read_manifest(folder)
