"""Rows read while the text is still being prepared are the rows of the finished folder."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from overnight.data import incremental
from overnight.data.atomic_folder import exclusive, staging_path
from overnight.data.incremental import IncrementalFolder, IncrementalStream, open_incremental
from overnight.data.loader import BatchSource, TokenStream
from overnight.data.shards import SO_FAR, Manifest, is_being_prepared, open_tokens, read_manifest, verify
from overnight.preparation import prepare as prepare_module
from overnight.preparation.prepare import prepare_shards
from overnight.preparation.prepare_config import PrepareConfig

Prepare = Callable[..., Manifest]
AfterEachWave = Callable[[Callable[[], object]], None]
Interrupt = Callable[..., Path]
ROW = 16
WINDOW = 2000


def same_rows(one: BatchSource, other: BatchSource, first_row: int, rows: int) -> bool:
    ours, theirs = one.batch(first_row, rows), other.batch(first_row, rows)
    return torch.equal(ours.ids, theirs.ids) and torch.equal(ours.targets, theirs.targets)


# Rows within shuffle windows


@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_rows_stay_the_same_when_the_text_grows(prepared: Prepare, data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 30), "tokens_per_row")
    window = data.draw(st.integers(length + 1, 90), "shuffle_window")
    known = data.draw(st.integers(length + 1, 300), "tokens so far")
    whole = known + data.draw(st.integers(0, 300), "more tokens")
    seed = data.draw(st.integers(0, 2**32), "seed")
    with tempfile.TemporaryDirectory() as folder:
        for n in (known, whole):
            prepared(Path(folder, f"{n}"), range(n), shard_tokens=70)
        beginning, complete = (
            TokenStream(f"{folder}/{n}", tokens_per_row=length, seed=seed, shuffle_window=window)
            for n in (known, whole)
        )
        ready = beginning.rows_before_last_window
        assert ready == max(0, known // window - 1) * math.ceil(window / length)
        assert same_rows(beginning, complete, 0, ready)


def test_rows_change_with_the_text_without_shuffle_window(tmp_path: Path, prepared: Prepare) -> None:
    """The negative control: this is what `shuffle_window` is for."""
    for n in (500, 900):
        prepared(tmp_path / f"{n}", range(n))
    beginning, whole = (TokenStream(tmp_path / f"{n}", tokens_per_row=10) for n in (500, 900))
    assert not same_rows(beginning, whole, 0, 10)


# Shards that are published early


@pytest.fixture
def config(config_of_waves: Callable[..., PrepareConfig]) -> PrepareConfig:
    """A text of about 40 units in six waves, some of its documents twice."""
    return config_of_waves(lambda n: f"Document {n % 550} of them: " + "word " * (n % 37))


@pytest.fixture
def interrupt(config: PrepareConfig, after_each_wave: AfterEachWave) -> Interrupt:
    """`interrupt(wave, error)`: prepare until shards are published for that time; returns the folder."""

    def prepare_in_part(wave: int = 1, error: type[BaseException] = KeyboardInterrupt) -> Path:
        after_each_wave(Mock(side_effect=[None] * (wave - 1) + [error]))
        with pytest.raises(error):
            prepare_shards(config)
        after_each_wave(lambda: None)
        return Path(config.out or "")

    return prepare_in_part


@pytest.fixture
def folder(interrupt: Interrupt) -> Path:
    """A folder whose preparation was interrupted after the first wave."""
    return interrupt()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_early_shards_stay_the_same(
    config: PrepareConfig, after_each_wave: AfterEachWave, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(config.out or "")
    shown: list[tuple[Manifest, dict[str, bytes]]] = []
    staging = staging_path(folder)
    after_each_wave(lambda: shown.append((read_manifest(staging, SO_FAR), contents(staging))))
    prepare_shards(config)
    final, whole = verify(folder), contents(folder)
    held_out = [open_tokens(folder / shard.name) for shard in final.validation]
    assert len(shown) >= 2
    for manifest, files in shown:
        assert manifest.train == final.train[: len(manifest.train)]
        assert manifest.request == final.request
        *complete, growing = manifest.validation
        assert growing.is_growing
        for shard in (*manifest.train, *complete):
            assert files[shard.name] == whole[shard.name]
        beginning = held_out[len(complete)][: growing.tokens].tobytes()
        assert files[growing.name][1024:] == beginning
    counts = [len(manifest.train) for manifest, _ in shown]
    assert counts == sorted(counts)
    monkeypatch.setattr(prepare_module, "EARLY_BYTES", 10**9)
    prepare_shards(dataclasses.replace(config, out=f"{folder}-at-once"))
    assert contents(Path(f"{folder}-at-once")) == whole


def test_interrupted_preparation_keeps_its_shards(
    config: PrepareConfig, folder: Path, interrupt: Interrupt
) -> None:
    assert not folder.exists()
    assert is_being_prepared(folder)
    shards = {path.name: path.stat().st_ino for path in staging_path(folder).glob("train-*.bin")}
    assert shards
    for error in (ValueError, KeyboardInterrupt):  # also if it is refused
        interrupt(2, error)
        assert {name: (staging_path(folder) / name).stat().st_ino for name in shards} == shards
    prepare_shards(config)
    assert {name: (folder / name).stat().st_ino for name in shards} == shards
    prepare_shards(dataclasses.replace(config, out=f"{folder}-undisturbed"))
    assert contents(Path(f"{folder}-undisturbed")) == contents(folder)


def test_near_duplicates_publish_no_early_shards(
    config: PrepareConfig, after_each_wave: AfterEachWave
) -> None:
    after_each_wave(lambda: pytest.fail("shown too early"))
    assert prepare_shards(dataclasses.replace(config, near_duplicates="drop"))


# Reading them


def test_rows_are_read_as_they_become_ready(
    config: PrepareConfig, folder: Path, interrupt: Interrupt
) -> None:
    growing = open_incremental(folder, WINDOW)
    stream = IncrementalStream(growing, tokens_per_row=ROW, seed=5, shuffle_window=WINDOW)
    validation = TokenStream(growing, "validation", tokens_per_row=ROW)
    evaluated = next(validation.evaluation_batches(4, 64))
    ready = next(rows for rows in range(10_000) if not stream.is_ready(rows + 1))
    assert ready > 3
    first = stream.batch(0, ready)
    with pytest.raises(ValueError, match=f"row {ready + 1} "):
        stream.batch(ready, 1)
    assert not stream.wait_for(ready + 1)  # no process prepares
    with exclusive(folder):
        assert not stream.wait_for(ready + 1, lambda: True)  # stopped
    interrupt(2)
    assert stream.wait_for(ready + 1)
    prepare_shards(config)
    assert stream.wait_for(10**6)
    assert growing.is_complete
    final = TokenStream(folder, tokens_per_row=ROW, seed=5, shuffle_window=WINDOW)
    assert torch.equal(first.ids, final.batch(0, ready).ids)
    assert all(same_rows(stream, final, row, 6) for row in (0, ready - 3, final.rows_per_epoch, 10**5))
    assert (stream.tokens, stream.rows_per_epoch) == (final.tokens, final.rows_per_epoch)
    finished = TokenStream(folder, "validation", tokens_per_row=ROW)
    for again in (validation, finished):  # the first reads a growing shard that has been deleted
        assert torch.equal(next(again.evaluation_batches(4, 64)).ids, evaluated.ids)


def test_opening_waits_for_the_first_window(
    config: PrepareConfig, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=r"shuffle_window=100000 .* 200,000"):
        open_incremental(folder, 100_000)

    def meanwhile(seconds: float) -> None:
        monkeypatch.setattr(incremental, "is_locked_folder", lambda folder: False)
        prepare_shards(config)

    monkeypatch.setattr(incremental, "is_locked_folder", lambda folder: True)
    monkeypatch.setattr(incremental.time, "sleep", meanwhile)
    assert open_incremental(folder, 100_000).is_complete
    assert "waiting" in capsys.readouterr().err


def test_damaged_early_shard_is_refused(folder: Path) -> None:
    shard = staging_path(folder) / "train-00001.bin"
    damaged = bytearray(shard.read_bytes())
    damaged[-1] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"train-00001\.bin was changed"):
        IncrementalFolder(folder)


def test_shards_renamed_while_reading_are_found(
    config: PrepareConfig, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    growing = IncrementalFolder(folder)
    real = incremental.read_manifest

    def rename_first(place: Path, name: str) -> Manifest:
        monkeypatch.setattr(incremental, "read_manifest", real)
        prepare_shards(config)
        return real(place, name)

    monkeypatch.setattr(incremental, "read_manifest", rename_first)
    growing.refresh()
    assert not growing.is_complete
    growing.refresh()
    assert growing.is_complete
    assert growing.manifest == read_manifest(folder)
