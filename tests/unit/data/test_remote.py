from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from filelock import FileLock

from overnight.data import remote
from overnight.data.loader import TokenStream
from overnight.data.remote import RemoteFolder, is_prepared_elsewhere
from overnight.data.shards import HEADER_BYTES, Manifest

Prepare = Callable[..., Manifest]

SHARD_BYTES = HEADER_BYTES + 2 * 100  # the folders here have shards of 100 tokens
ADDRESS = "memory://bucket/folder"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "overnight" / "shards"


@pytest.fixture
def local(tmp_path: Path, prepared: Prepare) -> Path:
    """A prepared folder of five shards of training tokens and one of validation."""
    prepared(tmp_path / "local", range(500), range(40))
    (tmp_path / "local" / "tokenizer").mkdir()
    (tmp_path / "local" / "tokenizer" / "tokenizer.json").write_text("{}")
    return tmp_path / "local"


@pytest.fixture
def bucket(local: Path, cache: Path) -> Iterator[fsspec.AbstractFileSystem]:
    """An object store that holds a copy of it."""
    system = fsspec.filesystem("memory")
    system.put(str(local), "/bucket/folder", recursive=True)
    yield system
    system.rm("/bucket", recursive=True)


@pytest.fixture
def fetched(bucket: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the shards that are downloaded whole. Pieces are small here: a shard has several."""
    names: list[str] = []
    get_file = bucket.get_file

    def record(source: str, target: str) -> None:
        names.append(Path(source).name)
        get_file(source, target)

    monkeypatch.setattr(bucket, "get_file", record)
    monkeypatch.setattr(remote, "PIECE_BYTES", 64)
    return names


def cached(cache: Path) -> set[str]:
    return {path.name for path in cache.glob("*/*.bin")}


def flip(system: fsspec.AbstractFileSystem, path: str) -> None:
    content = bytearray(system.cat_file(path))
    content[-1] ^= 1
    system.pipe_file(path, bytes(content))


def rows_of(folder: RemoteFolder | Path, tokens_per_row: int = 16) -> torch.Tensor:
    """200 rows one by one, in their shuffled order."""
    stream = TokenStream(folder, tokens_per_row=tokens_per_row)
    return torch.cat([stream.batch(row, 1).targets for row in range(200)])


def read_whole(folder: RemoteFolder, name: str = "train-00000.bin") -> list[int]:
    shard = next(shard for shard in folder.manifest.shards() if shard.name == name)
    tokens = np.empty(shard.tokens, dtype=np.uint16)
    folder.read(shard, 0, tokens)
    return tokens.tolist()


# Without a limit


def test_shard_is_fetched_when_first_needed_and_once(
    local: Path, bucket: fsspec.AbstractFileSystem, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RemoteFolder(f"{ADDRESS}/")
    assert str(folder) == ADDRESS
    assert cached(cache) == set()
    assert (folder / "tokenizer" / "tokenizer.json").read_text() == "{}"
    assert (folder / "train-00000.bin").read_bytes() == (local / "train-00000.bin").read_bytes()
    assert cached(cache) == {"train-00000.bin"}
    assert f"{ADDRESS}/train-00000.bin" in capsys.readouterr().err
    for number in range(5):  # another process finds it in the cache, even if the store has lost it
        bucket.rm(f"/bucket/folder/train-{number:05d}.bin")
    assert read_whole(RemoteFolder(ADDRESS)) == list(range(100))
    with pytest.raises(ValueError, match=rf"^{ADDRESS}/train-00001\.bin"):
        read_whole(folder, "train-00001.bin")


def test_damaged_or_incomplete_download_is_refused_and_not_cached(
    bucket: fsspec.AbstractFileSystem, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RemoteFolder(ADDRESS)
    path = "/bucket/folder/train-00000.bin"
    whole = bucket.cat_file(path)
    for damaged in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:-2]):
        bucket.pipe_file(path, damaged)
        with pytest.raises(ValueError, match=r"train-00000\.bin does not match its manifest"):
            read_whole(folder)

    def full(source: str, target: str) -> None:
        Path(target).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(bucket, "get_file", full)
    with pytest.raises(ValueError, match=r"^the disk of .* is full.*--cache-bytes"):
        read_whole(folder, "train-00001.bin")
    assert not list(cache.rglob("*.bin"))


@pytest.mark.usefixtures("bucket")
def test_flipped_bit_in_the_cache_is_repaired(local: Path, cache: Path) -> None:
    whole = read_whole(RemoteFolder(ADDRESS))
    (path,) = cache.glob("*/train-00000.bin")
    content = path.read_bytes()
    for damaged in (content[:-1] + bytes([content[-1] ^ 1]), content[:-2], b""):
        path.write_bytes(damaged)
        assert read_whole(RemoteFolder(ADDRESS)) == whole
        assert path.read_bytes() == (local / "train-00000.bin").read_bytes()


def test_missing_or_changed_manifest_is_refused(bucket: fsspec.AbstractFileSystem) -> None:
    assert is_prepared_elsewhere(ADDRESS)
    assert not is_prepared_elsewhere("memory://bucket/nothing")
    assert not is_prepared_elsewhere("bucket/folder")
    with pytest.raises(ValueError, match=r"memory://bucket/nothing has no manifest\.json"):
        RemoteFolder("memory://bucket/nothing")
    flip(bucket, "/bucket/folder/manifest.json")
    with pytest.raises(ValueError, match=rf"^{ADDRESS}: .*manifest\.json"):
        RemoteFolder(ADDRESS)


@pytest.mark.usefixtures("bucket")
def test_remote_open_files_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "files_at_once", lambda: 2)
    verified: list[str] = []
    verify = remote.verify_shard
    monkeypatch.setattr(remote, "verify_shard", lambda *of: verified.append(of[1].name) or verify(*of))
    folder = RemoteFolder(ADDRESS)
    for shard in folder.manifest.train * 2:
        read_whole(folder, shard.name)
    assert len(folder._opened) == 2
    assert len(verified) == 2 * 5  # not found; then found as it should be; never again


# With a limit


@pytest.fixture
def small(fetched: list[str]) -> RemoteFolder:
    """The folder in a cache of two shards, once each was in it: the first one was deleted."""
    folder = RemoteFolder(ADDRESS, cache_bytes=2 * SHARD_BYTES)
    for shard in folder.manifest.train:
        read_whole(folder, shard.name)
    assert read_whole(folder) == list(range(100))
    assert len(fetched) == 5
    return folder


@pytest.mark.usefixtures("bucket")
def test_cache_limit_deletes_least_recently_used(cache: Path) -> None:
    folder = RemoteFolder(ADDRESS, cache_bytes=3 * SHARD_BYTES + 5)
    for number in (0, 1, 2, 0, 3):  # shard 1 is the least recently used when shard 3 comes
        read_whole(folder, f"train-{number:05d}.bin")
    assert cached(cache) == {f"train-{number:05d}.bin" for number in (0, 2, 3)}
    stream = TokenStream(folder, tokens_per_row=16)
    for row in range(60):
        stream.batch(row, 1)
        assert sum(path.stat().st_size for path in cache.glob("*/*.bin")) <= 3 * SHARD_BYTES


@pytest.mark.parametrize("cached_shards", [None, 2])
@pytest.mark.parametrize("tokens_per_row", [1, 16, 150])
def test_remote_rows_are_the_local_ones_and_fetched_once(
    local: Path, fetched: list[str], tokens_per_row: int, cached_shards: int | None
) -> None:
    folder = RemoteFolder(ADDRESS, cache_bytes=cached_shards and cached_shards * SHARD_BYTES)
    for _ in range(2):
        ours, theirs = (rows_of(each, tokens_per_row=tokens_per_row) for each in (folder, local))
        assert torch.equal(ours, theirs)
    assert sorted(fetched) == [f"train-{number:05d}.bin" for number in range(5)]


@pytest.mark.usefixtures("bucket")
def test_cache_limit_below_a_shard_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=f"cache_bytes={SHARD_BYTES - 1} .* {SHARD_BYTES} bytes"):
        RemoteFolder(ADDRESS, cache_bytes=SHARD_BYTES - 1)
    RemoteFolder(ADDRESS, cache_bytes=2 * SHARD_BYTES)
    assert "about 60% of the rows" in capsys.readouterr().err


@pytest.mark.parametrize("is_shard", [True, False])
def test_damaged_remote_shard_is_refused_and_damaged_digests_are_repaired(
    small: RemoteFolder, bucket: fsspec.AbstractFileSystem, cache: Path, fetched: list[str], is_shard: bool
) -> None:
    if is_shard:
        flip(bucket, "/bucket/folder/train-00000.bin")
        with pytest.raises(ValueError, match=r"train-00000\.bin does not match its manifest"):
            read_whole(small)
    else:
        (path,) = cache.glob("*/train-00000.pieces")
        path.write_bytes(bytes(path.stat().st_size))
        assert read_whole(small) == list(range(100))
    assert fetched.count("train-00000.bin") == 2


@pytest.mark.usefixtures("small")
def test_remote_shard_is_cached_when_there_is_room(fetched: list[str]) -> None:
    for shards, times in ((2, 1), (3, 2)):  # in the first case it is read by its digests
        assert read_whole(RemoteFolder(ADDRESS, cache_bytes=shards * SHARD_BYTES)) == list(range(100))
        assert fetched.count("train-00000.bin") == times


# Several readers of one cache, which share nothing but its files


def test_two_readers_share_one_cache(local: Path, cache: Path) -> None:
    """Each deletes what the other has just used: the cache holds two shards of five."""
    folders = [RemoteFolder(f"file://{local}", cache_bytes=2 * SHARD_BYTES) for _ in range(2)]
    with ThreadPoolExecutor(2) as threads:
        ours, theirs = threads.map(rows_of, folders)
    assert torch.equal(ours, theirs)
    assert torch.equal(ours, rows_of(local))
    assert len(cached(cache)) <= 3  # two, and one that the other may have been fetching meanwhile


@pytest.mark.usefixtures("cache")
def test_shard_fetched_by_another_process_is_waited_for(
    local: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RemoteFolder(f"file://{local}")
    path = folder.folder / "train-00000.bin"
    with ThreadPoolExecutor(1) as threads, FileLock(path.with_name(f".{path.name}.lock")):
        reading = threads.submit(read_whole, folder)
        with pytest.raises(TimeoutError):
            reading.result(timeout=0.3)
        path.write_bytes((local / path.name).read_bytes())
    assert reading.result() == list(range(100))
    assert "fetching" not in capsys.readouterr().err
