from __future__ import annotations

import errno
import hashlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from filelock import FileLock

from overnight.data import remote
from overnight.data.loader import TokenStream
from overnight.data.remote import RemoteFolder, is_prepared_elsewhere
from overnight.data.shards import HEADER_BYTES, Manifest, Shard

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


# Without a limit


@pytest.mark.usefixtures("bucket")
@pytest.mark.parametrize("split", ["train", "validation"])
def test_remote_rows_are_the_local_ones(local: Path, split: str) -> None:
    ours = TokenStream(RemoteFolder(ADDRESS), split, tokens_per_row=16, seed=5)
    theirs = TokenStream(local, split, tokens_per_row=16, seed=5)
    rows = 3 * theirs.rows_per_epoch
    assert torch.equal(ours.batch(0, rows).ids, theirs.batch(0, rows).ids)
    assert torch.equal(ours.batch(0, rows).targets, theirs.batch(0, rows).targets)
    pairs = zip(ours.evaluation_batches(3), theirs.evaluation_batches(3), strict=True)
    assert all(torch.equal(one.targets, other.targets) for one, other in pairs)


def test_shard_is_fetched_when_first_needed_and_once(
    bucket: fsspec.AbstractFileSystem, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = TokenStream(RemoteFolder(f"{ADDRESS}/"), tokens_per_row=16)
    assert cached(cache) == set()
    assert [path.name for path in cache.glob("*/tokenizer/*")] == ["tokenizer.json"]
    next(stream.evaluation_batches(1))
    assert cached(cache) == {"train-00000.bin"}
    assert f"{ADDRESS}/train-00000.bin" in capsys.readouterr().err
    for number in range(5):  # another process finds it in the cache, even if the store has lost it
        bucket.rm(f"/bucket/folder/train-{number:05d}.bin")
    next(TokenStream(RemoteFolder(ADDRESS), tokens_per_row=16).evaluation_batches(1))
    with pytest.raises(ValueError, match=rf"^{ADDRESS}/train-00001\.bin"):
        list(stream.evaluation_batches(1))


def test_path_in_remote_folder_is_local(local: Path, bucket: fsspec.AbstractFileSystem) -> None:
    folder = RemoteFolder(f"{ADDRESS}/")
    assert str(folder) == ADDRESS
    assert (folder / "train-00004.bin").read_bytes() == (local / "train-00004.bin").read_bytes()
    assert (folder / "tokenizer" / "tokenizer.json").read_text() == "{}"


def test_flipped_bit_at_the_url_is_refused_and_not_cached(
    bucket: fsspec.AbstractFileSystem, cache: Path
) -> None:
    flip(bucket, "/bucket/folder/train-00001.bin")
    batches = TokenStream(RemoteFolder(ADDRESS), tokens_per_row=20).evaluation_batches(1)
    for _ in range(4):
        next(batches)  # from the first shard, which is sound
    with pytest.raises(ValueError, match=r"train-00001\.bin does not match its manifest"):
        next(batches)
    assert {path.name for path in cache.rglob("*.bin")} == {"train-00000.bin"}


def test_incomplete_download_is_refused(
    bucket: fsspec.AbstractFileSystem, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RemoteFolder(ADDRESS)

    def full(source: str, target: str) -> None:
        Path(target).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(bucket, "get_file", full)
        with pytest.raises(ValueError, match=r"^the disk of .* is full.*--cache-bytes"):
            folder.open(folder.manifest.train[0])
    assert not list(cache.rglob("*.bin"))
    path = "/bucket/folder/train-00000.bin"
    bucket.pipe_file(path, bucket.cat_file(path)[:-2])
    with pytest.raises(ValueError, match=r"train-00000\.bin does not match its manifest"):
        folder.open(folder.manifest.train[0])


@pytest.mark.usefixtures("bucket")
def test_flipped_bit_in_the_cache_is_repaired(local: Path, cache: Path) -> None:
    (first,) = TokenStream(RemoteFolder(ADDRESS), "validation", tokens_per_row=39).evaluation_batches(1)
    (path,) = cache.glob("*/validation-00000.bin")
    content = bytearray(path.read_bytes())
    for damaged in (content[:-1] + bytes([content[-1] ^ 1]), content[:-2], b""):
        path.write_bytes(damaged)
        (again,) = TokenStream(RemoteFolder(ADDRESS), "validation", tokens_per_row=39).evaluation_batches(1)
        assert torch.equal(again.targets, first.targets)
        assert path.read_bytes() == (local / "validation-00000.bin").read_bytes()


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
        folder.open(shard)
    assert len(folder._opened) == 2
    assert len(verified) == 2 * 5  # not found; then found as it should be; never again


# With a limit


@pytest.mark.usefixtures("bucket")
def test_cache_limit_deletes_least_recently_used(cache: Path) -> None:
    folder = RemoteFolder(ADDRESS, cache_bytes=3 * SHARD_BYTES + 5)
    shards = folder.manifest.train
    for number in (0, 1, 2, 0, 3):  # shard 1 is the least recently used when shard 3 comes
        folder.open(shards[number])
    assert cached(cache) == {shards[0].name, shards[2].name, shards[3].name}
    stream = TokenStream(folder, tokens_per_row=16)
    for row in range(60):
        stream.batch(row, 1)
        assert sum(path.stat().st_size for path in cache.glob("*/*.bin")) <= 3 * SHARD_BYTES


@pytest.mark.parametrize("tokens_per_row", [1, 16, 150])
def test_text_larger_than_cache_is_fetched_once(local: Path, fetched: list[str], tokens_per_row: int) -> None:
    ours = TokenStream(RemoteFolder(ADDRESS, cache_bytes=2 * SHARD_BYTES), tokens_per_row=tokens_per_row)
    theirs = TokenStream(local, tokens_per_row=tokens_per_row)
    for row in [*range(100), *range(100)]:
        assert torch.equal(ours.batch(row, 2).targets, theirs.batch(row, 2).targets)
    assert sorted(fetched) == [f"train-{number:05d}.bin" for number in range(5)]


@pytest.mark.usefixtures("bucket")
def test_cache_limit_below_a_shard_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=f"cache_bytes={SHARD_BYTES - 1} .* {SHARD_BYTES} bytes"):
        RemoteFolder(ADDRESS, cache_bytes=SHARD_BYTES - 1)
    RemoteFolder(ADDRESS, cache_bytes=2 * SHARD_BYTES)
    assert "about 60% of the rows" in capsys.readouterr().err


def remote_shard(folder: RemoteFolder) -> Shard:
    """A shard that was in the cache and was deleted."""
    for shard in folder.manifest.train:
        folder.open(shard)
    assert isinstance(folder.open(folder.manifest.train[0]), remote.RemoteShard)
    return folder.manifest.train[0]


def tokens_of(folder: RemoteFolder, shard: Shard) -> list[int]:
    tokens = np.empty(100, dtype=np.uint16)
    folder.open(shard).read(0, tokens)
    return tokens.tolist()


def test_flipped_bit_of_a_remote_shard_is_refused(
    bucket: fsspec.AbstractFileSystem, fetched: list[str]
) -> None:
    folder = RemoteFolder(ADDRESS, cache_bytes=2 * SHARD_BYTES)
    shard = remote_shard(folder)
    assert tokens_of(folder, shard) == list(range(100))
    flip(bucket, f"/bucket/folder/{shard.name}")
    with pytest.raises(ValueError, match=r"train-00000\.bin does not match its manifest"):
        tokens_of(folder, shard)
    assert fetched.count(shard.name) == 2


def test_damaged_digests_are_repaired(cache: Path, fetched: list[str]) -> None:
    folder = RemoteFolder(ADDRESS, cache_bytes=2 * SHARD_BYTES)
    shard = remote_shard(folder)
    (path,) = cache.glob("*/train-00000.pieces")
    path.write_bytes(bytes(path.stat().st_size))
    assert tokens_of(folder, shard) == list(range(100))
    assert fetched.count(shard.name) == 2


def test_remote_shard_is_cached_when_there_is_room(fetched: list[str]) -> None:
    shard = remote_shard(RemoteFolder(ADDRESS, cache_bytes=2 * SHARD_BYTES))
    assert tokens_of(RemoteFolder(ADDRESS, cache_bytes=2 * SHARD_BYTES), shard) == list(range(100))
    assert fetched.count(shard.name) == 1  # the digests outlive the process
    assert tokens_of(RemoteFolder(ADDRESS, cache_bytes=3 * SHARD_BYTES), shard) == list(range(100))
    assert fetched.count(shard.name) == 2


# Several processes

READER = """
import sys, hashlib
from overnight.data.remote import RemoteFolder
from overnight.data.loader import TokenStream
folder = RemoteFolder(sys.argv[1], cache_bytes=int(sys.argv[2]))
print("ready", flush=True)
sys.stdin.readline()
digest = hashlib.sha256()
stream = TokenStream(folder, tokens_per_row=16, seed=1)
for row in range(300):
    digest.update(stream.batch(row, 1).ids.numpy().tobytes())
print(digest.hexdigest())
"""


def start_reader(local: Path, cache_bytes: int) -> subprocess.Popen[str]:
    """A process that waits for a line and then prints the digest of 300 rows."""
    command = [sys.executable, "-c", READER, f"file://{local}", str(cache_bytes)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def test_two_processes_share_one_cache(local: Path, cache: Path) -> None:
    """Each deletes what the other has just used: the cache holds two shards of five."""
    readers = [start_reader(local, 2 * SHARD_BYTES) for _ in range(2)]
    for reader in readers:
        assert reader.stdout
        assert reader.stdout.readline() == "ready\n"
    results = []
    for reader in readers:
        assert reader.stdin
        reader.stdin.write("\n")
        reader.stdin.flush()
    for reader in readers:
        results.append(reader.communicate(timeout=120))
        assert reader.returncode == 0, results
    stream = TokenStream(local, tokens_per_row=16, seed=1)
    expected = hashlib.sha256(b"".join(stream.batch(row, 1).ids.numpy().tobytes() for row in range(300)))
    assert [out.strip() for out, _ in results] == [expected.hexdigest()] * 2
    assert len(cached(cache)) <= 3  # two, and one that the other may have been fetching meanwhile


@pytest.mark.usefixtures("cache")
def test_shard_fetched_by_another_process_is_waited_for(local: Path) -> None:
    path = RemoteFolder(f"file://{local}").folder / "train-00000.bin"
    with FileLock(path.with_name(f".{path.name}.lock")):
        reader = start_reader(local, 9 * SHARD_BYTES)
        assert reader.stdin
        reader.stdin.write("\n")
        reader.stdin.flush()
        path.write_bytes((local / path.name).read_bytes())
    _, printed = reader.communicate(timeout=120)
    assert reader.returncode == 0, printed
    assert "train-00001.bin" in printed
    assert "train-00000.bin" not in printed
