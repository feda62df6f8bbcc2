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
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "overnight" / "shards"


@pytest.fixture
def here(tmp_path: Path, prepared: Prepare) -> Path:
    """A prepared folder of five shards of training tokens and one of validation."""
    prepared(tmp_path / "here", range(500), range(40))
    (tmp_path / "here" / "tokenizer").mkdir()
    (tmp_path / "here" / "tokenizer" / "tokenizer.json").write_text("{}")
    return tmp_path / "here"


@pytest.fixture
def bucket(here: Path, shelf: Path) -> Iterator[fsspec.AbstractFileSystem]:
    """An object store that holds a copy of it."""
    system = fsspec.filesystem("memory")
    system.put(str(here), "/bucket/folder", recursive=True)
    yield system
    system.rm("/bucket", recursive=True)


def kept(shelf: Path) -> set[str]:
    return {path.name for path in shelf.glob("*/*.bin")}


def flip(system: fsspec.AbstractFileSystem, path: str) -> None:
    content = bytearray(system.cat_file(path))
    content[-1] ^= 1
    system.pipe_file(path, bytes(content))


@pytest.mark.usefixtures("bucket")
def test_a_folder_elsewhere_gives_the_rows_of_the_one_here(here: Path, shelf: Path) -> None:
    for split in ("train", "validation"):
        ours = TokenStream(RemoteFolder(ADDRESS), split, tokens_per_row=16, seed=5)
        theirs = TokenStream(here, split, tokens_per_row=16, seed=5)
        rows = 3 * theirs.windows_per_epoch
        assert torch.equal(ours.batch(0, rows).ids, theirs.batch(0, rows).ids)
        assert torch.equal(ours.batch(0, rows).targets, theirs.batch(0, rows).targets)
        pairs = zip(ours.evaluation_batches(3), theirs.evaluation_batches(3), strict=True)
        assert all(torch.equal(one.targets, other.targets) for one, other in pairs)
    assert len(kept(shelf)) == 6


def test_a_shard_is_fetched_when_a_row_first_needs_it_and_once(
    bucket: fsspec.AbstractFileSystem, shelf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RemoteFolder(ADDRESS)
    assert kept(shelf) == set()
    assert [path.name for path in shelf.glob("*/tokenizer/*")] == ["tokenizer.json"]
    stream = TokenStream(folder, tokens_per_row=16)
    assert kept(shelf) == set()
    next(stream.evaluation_batches(1))
    assert kept(shelf) == {"train-00000.bin"}
    assert "fetching memory://bucket/folder/train-00000.bin" in capsys.readouterr().err
    for number in range(5):  # another process finds it there, even if the store has lost it
        bucket.rm(f"/bucket/folder/train-{number:05d}.bin")
    next(TokenStream(RemoteFolder(ADDRESS), tokens_per_row=16).evaluation_batches(1))
    with pytest.raises(ValueError, match=r"^memory://bucket/folder/train-00001\.bin can't be fetched"):
        list(stream.evaluation_batches(1))


def test_a_flipped_bit_is_refused_and_not_kept(bucket: fsspec.AbstractFileSystem, shelf: Path) -> None:
    flip(bucket, "/bucket/folder/train-00001.bin")
    batches = TokenStream(RemoteFolder(ADDRESS), tokens_per_row=20).evaluation_batches(1)
    for _ in range(4):
        next(batches)  # from the first shard, which is sound
    with pytest.raises(ValueError, match=r"train-00001\.bin is not as its manifest says: upload"):
        next(batches)
    assert {path.name for path in shelf.rglob("*.bin")} == {"train-00000.bin"}


def test_a_shard_that_does_not_come_whole_is_refused(
    bucket: fsspec.AbstractFileSystem, shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RemoteFolder(ADDRESS)

    def full(source: str, target: str) -> None:
        Path(target).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(bucket, "get_file", full)
        with pytest.raises(ValueError, match=r"^the disk of .* is full: free some, or limit what is kept"):
            folder.open(folder.manifest.train[0])
    assert not list(shelf.rglob("*.bin"))
    bucket.pipe_file("/bucket/folder/train-00000.bin", bucket.cat_file("/bucket/folder/train-00000.bin")[:-2])
    with pytest.raises(ValueError, match=r"train-00000\.bin is not as its manifest says"):
        folder.open(folder.manifest.train[0])


@pytest.mark.usefixtures("bucket")
def test_a_bit_that_flips_in_the_cache_is_mended(here: Path, shelf: Path) -> None:
    (first,) = TokenStream(RemoteFolder(ADDRESS), "validation", tokens_per_row=39).evaluation_batches(1)
    (path,) = shelf.glob("*/validation-00000.bin")
    content = bytearray(path.read_bytes())
    for damaged in (content[:-1] + bytes([content[-1] ^ 1]), content[:-2], b""):
        path.write_bytes(damaged)
        (again,) = TokenStream(RemoteFolder(ADDRESS), "validation", tokens_per_row=39).evaluation_batches(1)
        assert torch.equal(again.targets, first.targets)
        assert path.read_bytes() == (here / "validation-00000.bin").read_bytes()


def test_a_manifest_that_was_changed_is_refused(bucket: fsspec.AbstractFileSystem) -> None:
    flip(bucket, "/bucket/folder/manifest.json")
    with pytest.raises(ValueError, match=r"^memory://bucket/folder: .*manifest\.json"):
        RemoteFolder(ADDRESS)


@pytest.mark.usefixtures("bucket")
def test_a_folder_without_a_manifest_is_refused() -> None:
    assert is_prepared_elsewhere(ADDRESS)
    assert not is_prepared_elsewhere("memory://bucket/nothing")
    assert not is_prepared_elsewhere("bucket/folder")
    with pytest.raises(ValueError, match=r"memory://bucket/nothing has no manifest\.json"):
        RemoteFolder("memory://bucket/nothing")


@pytest.mark.usefixtures("bucket")
def test_the_limit_holds_and_the_least_recently_used_go_first(shelf: Path) -> None:
    folder = RemoteFolder(ADDRESS, cache_bytes=3 * SHARD_BYTES + 5)
    shards = folder.manifest.train
    for shard in shards[:3]:
        folder.open(shard)
    folder.open(shards[0])  # now the second is the one that was not used for longest
    folder.open(shards[3])
    assert kept(shelf) == {shards[0].name, shards[2].name, shards[3].name}
    stream = TokenStream(folder, tokens_per_row=16)
    for row in range(60):
        stream.batch(row, 1)
        assert sum(path.stat().st_size for path in shelf.glob("*/*.bin")) <= 3 * SHARD_BYTES


@pytest.fixture
def fetched(bucket: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the shards that are fetched as a whole. Pieces are small here: a shard has several."""
    names: list[str] = []
    get_file = bucket.get_file

    def noted(source: str, target: str) -> None:
        names.append(Path(source).name)
        get_file(source, target)

    monkeypatch.setattr(bucket, "get_file", noted)
    monkeypatch.setattr(remote, "PIECE_BYTES", 64)
    return names


@pytest.mark.parametrize("tokens_per_row", [1, 16, 150])
def test_a_text_larger_than_the_cache_is_fetched_once(
    here: Path, fetched: list[str], tokens_per_row: int
) -> None:
    ours = TokenStream(RemoteFolder(ADDRESS, cache_bytes=2 * SHARD_BYTES), tokens_per_row=tokens_per_row)
    theirs = TokenStream(here, tokens_per_row=tokens_per_row)
    for _ in range(2):
        for row in range(100):
            assert torch.equal(ours.batch(row, 2).targets, theirs.batch(row, 2).targets)
    assert sorted(fetched) == [f"train-{number:05d}.bin" for number in range(5)]


def distant(folder: RemoteFolder) -> Shard:
    """A shard that was here and had to go."""
    for shard in folder.manifest.train:
        folder.open(shard)
    assert isinstance(folder.open(folder.manifest.train[0]), remote.RemoteShard)
    return folder.manifest.train[0]


def first_tokens(folder: RemoteFolder, shard: Shard) -> list[int]:
    tokens = np.empty(100, dtype=np.uint16)
    folder.open(shard).read(0, tokens)
    return tokens.tolist()


def test_a_bit_that_flips_where_it_lies_is_refused(
    bucket: fsspec.AbstractFileSystem, fetched: list[str]
) -> None:
    folder = RemoteFolder(ADDRESS, cache_bytes=2 * SHARD_BYTES)
    shard = distant(folder)
    assert first_tokens(folder, shard) == list(range(100))
    flip(bucket, f"/bucket/folder/{shard.name}")
    with pytest.raises(ValueError, match=r"train-00000\.bin is not as its manifest says: upload"):
        first_tokens(folder, shard)
    assert fetched.count(shard.name) == 2


def test_damaged_digests_are_mended(shelf: Path, fetched: list[str]) -> None:
    folder = RemoteFolder(ADDRESS, cache_bytes=2 * SHARD_BYTES)
    shard = distant(folder)
    (path,) = shelf.glob("*/train-00000.pieces")
    path.write_bytes(bytes(path.stat().st_size))
    assert first_tokens(folder, shard) == list(range(100))
    assert fetched.count(shard.name) == 2


def test_where_there_is_room_again_a_shard_is_kept(shelf: Path, fetched: list[str]) -> None:
    shard = distant(RemoteFolder(ADDRESS, cache_bytes=2 * SHARD_BYTES))
    assert first_tokens(RemoteFolder(ADDRESS, cache_bytes=2 * SHARD_BYTES), shard) == list(range(100))
    assert fetched.count(shard.name) == 1  # the digests outlive the process
    assert first_tokens(RemoteFolder(ADDRESS, cache_bytes=3 * SHARD_BYTES), shard) == list(range(100))
    assert fetched.count(shard.name) == 2
    assert shard.name in kept(shelf)


@pytest.mark.usefixtures("bucket")
def test_without_a_limit_all_are_kept(shelf: Path) -> None:
    folder = RemoteFolder(ADDRESS)
    for shard in folder.manifest.train:
        folder.open(shard)
    assert len(kept(shelf)) == 5


@pytest.mark.usefixtures("bucket")
def test_a_limit_is_told_what_it_costs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=f"cache_bytes=1000 is less than .*, which has {SHARD_BYTES}: give"):
        RemoteFolder(ADDRESS, cache_bytes=1000)
    RemoteFolder(ADDRESS, cache_bytes=5 * SHARD_BYTES)
    assert "one by one" not in capsys.readouterr().err
    RemoteFolder(ADDRESS, cache_bytes=2 * SHARD_BYTES)
    assert "about 60% of the rows will be read from there one by one" in capsys.readouterr().err


@pytest.mark.usefixtures("bucket")
def test_more_shards_than_may_be_open(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "files_at_once", lambda: 2)
    verified: list[str] = []
    verify = remote.verify_shard
    monkeypatch.setattr(remote, "verify_shard", lambda *of: verified.append(of[1].name) or verify(*of))
    folder = RemoteFolder(ADDRESS)
    for shard in folder.manifest.train * 2:
        folder.open(shard)
    assert len(folder._opened) == 2
    assert len(verified) == 2 * 5  # not found; then found as it should be; never again


def test_a_path_below_it_is_on_this_machine(here: Path, bucket: fsspec.AbstractFileSystem) -> None:
    folder = RemoteFolder(f"{ADDRESS}/")
    assert str(folder) == ADDRESS
    assert (folder / "train-00004.bin").read_bytes() == (here / "train-00004.bin").read_bytes()
    assert (folder / "tokenizer" / "tokenizer.json").read_text() == "{}"


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


def test_two_processes_share_one_cache(here: Path, shelf: Path) -> None:
    """Each deletes what the other has just used: the cache holds two shards of five."""
    command = [sys.executable, "-c", READER, f"file://{here}", str(2 * SHARD_BYTES)]
    readers = [
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for reader in readers:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "ready\n"
    for reader in readers:
        assert reader.stdin is not None
        reader.stdin.write("\n")
        reader.stdin.flush()
    told = [reader.communicate(timeout=60) for reader in readers]
    assert [reader.returncode for reader in readers] == [0, 0], told
    local = TokenStream(here, tokens_per_row=16, seed=1)
    expected = hashlib.sha256(b"".join(local.batch(row, 1).ids.numpy().tobytes() for row in range(300)))
    assert [out.strip() for out, _ in told] == [expected.hexdigest()] * 2
    assert len(kept(shelf)) <= 3  # two, and one that the other may have been fetching meanwhile


def test_a_shard_that_another_process_fetches_is_waited_for(
    here: Path, shelf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RemoteFolder(f"file://{here}")
    place = folder.folder / "train-00000.bin"
    command = [sys.executable, "-c", READER, f"file://{here}", str(9 * SHARD_BYTES)]
    with FileLock(place.with_name(f".{place.name}.lock")):
        reader = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert reader.stdin is not None
        reader.stdin.write("\n")
        reader.stdin.flush()
        place.write_bytes((here / place.name).read_bytes())
    _, told = reader.communicate(timeout=60)
    assert reader.returncode == 0, told
    assert "train-00001.bin" in told
    assert "train-00000.bin" not in told
