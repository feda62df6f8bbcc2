"""Shards and manifests that are damaged, foreign or contradictory in a thousand ways do not open."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from overnight.data import shards as shards_module
from overnight.data import token_reader
from overnight.data.loader import TokenStream
from overnight.data.shards import (
    Manifest,
    TokenFile,
    hash_tokens,
    load_prepared_tokenizer,
    open_tokens,
    read_manifest,
    verify,
    write_manifest,
    write_split,
)

Prepare = Callable[..., Manifest]
many = pytest.mark.parametrize("trials", [200, pytest.param(1000, marks=pytest.mark.slow)])


@pytest.fixture
def folder(tmp_path: Path, prepared: Prepare) -> Path:
    """Three shards of training tokens and one of validation."""
    prepared(tmp_path / "numbers", range(1000), range(150), shard_tokens=400)
    return tmp_path / "numbers"


def write(path: Path, ids: list[int], vocab_size: int = 50_257) -> str:
    file = TokenFile(path, vocab_size)
    file.append(np.array(ids, dtype=np.uint32))
    return file.close()


# One file of tokens


@pytest.mark.parametrize(
    "vocab_size,ids,first_words",
    [
        (50_257, [50_256, 0, 1, 258], (20240520, 1, 4)),
        (65_536, [65_535], (20240520, 1, 1)),
        (65_537, [65_536, 3], (20240801, 7, 2)),
        (128_256, [128_255, 70_000, 0], (20240801, 7, 3)),
    ],
)
def test_token_file_is_read_by_an_independent_reader(
    tmp_path: Path, vocab_size: int, ids: list[int], first_words: tuple[int, ...]
) -> None:
    path = tmp_path / "train-00000.bin"
    digest = write(path, ids, vocab_size)
    content = path.read_bytes()
    header = struct.unpack("<256i", content[:1024])
    assert header == first_words + (0,) * 253
    letter = {(20240520, 1): "H", (20240801, 7): "I"}[header[0], header[1]]
    assert list(struct.unpack(f"<{header[2]}{letter}", content[1024:])) == ids == open_tokens(path).tolist()
    assert digest == hashlib.sha256(content).hexdigest()


def test_hash_tokens_finds_highest_id(tmp_path: Path) -> None:
    for index in (0, 700_000, 1_299_999):
        ids = [0] * 1_300_000
        ids[index] = 40_000
        digest = write(tmp_path / "t.bin", ids)
        assert hash_tokens(tmp_path / "t.bin") == (digest, 40_000)


def test_token_file_has_its_name_when_complete(tmp_path: Path) -> None:
    file = TokenFile(tmp_path / "t.bin", 100)
    file.append(np.array([1, 99], dtype=np.uint32))
    with pytest.raises(ValueError, match="id 100"):
        file.append(np.array([5, 100], dtype=np.uint32))
    assert not (tmp_path / "t.bin").exists()
    file.abandon()
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "t.bin", [1, 2])
    assert [path.name for path in tmp_path.iterdir()] == ["t.bin"]


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content[:1000],
        lambda content: content[:-1],
        lambda content: content + b"\0",
        lambda content: b"\x01" + content[1:],
        lambda content: content[:4] + b"\x02" + content[5:],
        lambda content: content[:8] + struct.pack("<i", -3) + content[12:],
        lambda content: content[:8] + struct.pack("<i", 0) + content[12:1024],
        lambda content: content[:900] + b"\x01" + content[901:],
    ],
)
def test_open_tokens_names_damaged_file(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "train-00007.bin"
    with pytest.raises(ValueError, match=r"train-00007\.bin is missing"):
        open_tokens(path)
    write(path, [1, 2, 3])
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=r"train-00007\.bin is damaged"):
        open_tokens(path)


# A folder and its manifest


def test_documents_are_counted_in_the_shard_where_they_begin(tmp_path: Path) -> None:
    documents = [np.arange(length, dtype=np.uint32) + 7 for length in (4, 6, 3, 20, 1, 8)]
    shards = write_split(tmp_path, "train", [(ids, 100 * ids.size) for ids in documents], 300, 10)
    assert [shard.name for shard in shards] == [f"train-{index:05d}.bin" for index in range(5)]
    assert [shard.tokens for shard in shards] == [10, 10, 10, 10, 2]
    assert [shard.documents for shard in shards] == [2, 2, 0, 2, 0]
    assert [shard.text_bytes for shard in shards] == [1000, 2300, 0, 900, 0]
    tokens = np.concatenate([open_tokens(tmp_path / shard.name) for shard in shards])
    assert np.array_equal(tokens, np.concatenate(documents))


def test_manifest_of_an_earlier_version_is_read(folder: Path) -> None:
    """A file as the first version wrote it, without the fields that were added since."""
    read = verify(folder)
    counts = [(read.tokens(split), read.text_bytes(split)) for split in ("train", "validation")]
    assert counts == [(1000, 2000), (150, 300)]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert list(manifest) == [
        *("format_version", "overnight_version", "source", "licence", "request", "split_rule"),
        *("tokenizer", "tokenizer_fingerprint", "vocab_size", "end_of_text", "documents"),
        *("duplicate_documents", "empty_documents", "skipped_documents", "repaired_documents"),
        *("damaged_files", "train", "validation", "sha256_of_the_above"),
    ]
    assert list(manifest["train"][0]) == ["name", "tokens", "documents", "text_bytes", "sha256"]
    checksum = manifest.pop("sha256_of_the_above")
    assert checksum == hashlib.sha256(json.dumps(manifest).encode()).hexdigest()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"name": "a browser extension", "version": 2}',
        '{"format_version": 2}',
        "[" * 100_000,
        '{"format_version": 2, "sha256_of_the_above": ""}',
        '{"format_version": 1, "sha256_of_the_above": "", "train": 7}',
    ],
)
def test_other_manifest_is_refused(folder: Path, content: str) -> None:
    (folder / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=r"manifest\.json") as error:
        read_manifest(folder)
    is_surely_ours = '"format_version": 1' in content  # a foreign folder's owner is not told to delete it
    assert ("delete the folder" in str(error.value)) == is_surely_ours


def test_missing_manifest_or_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no manifest\.json"):
        read_manifest(tmp_path)
    with pytest.raises(ValueError, match="tokenizer is missing"):
        load_prepared_tokenizer(folder)


@pytest.mark.parametrize("name", ["../train-00000.bin", "/etc/passwd", "validation-00000.bin", "train-0.bin"])
def test_manifest_points_only_into_its_folder(folder: Path, name: str) -> None:
    manifest = read_manifest(folder)
    strange = dataclasses.replace(manifest.train[0], name=name)
    write_manifest(folder, dataclasses.replace(manifest, train=(strange, *manifest.train[1:])))
    with pytest.raises(ValueError, match=name):
        read_manifest(folder)


@pytest.mark.parametrize(
    "source, target, split, named",
    [
        ("train-00001.bin", "train-00000.bin", "train", "train-00000.bin"),  # another shard's content
        ("validation-00000.bin", "elsewhere", None, "validation-00000.bin"),
        ("validation-00000.bin", "elsewhere", "train", None),
        ("validation-00000.bin", "train-00003.bin", "train", "train-00003.bin"),
    ],
)
def test_verify_names_wrong_missing_and_surplus_shards(
    folder: Path, source: str, target: str, split: str | None, named: str | None
) -> None:
    assert verify(folder, split)
    (folder / source).rename(folder / target)
    with pytest.raises(ValueError, match=named) if named else contextlib.nullcontext():
        verify(folder, split)


def test_shards_of_another_type_of_ids_are_refused(folder: Path) -> None:
    """Even where manifest and shards agree, as in a folder made by other means."""
    write_manifest(folder, dataclasses.replace(read_manifest(folder), vocab_size=100_000))
    with pytest.raises(ValueError, match="uint16"):
        verify(folder)


# Random damage


def opens(folder: Path, damaged: str) -> bool:
    """True if a run could train on the folder. A refusal must be one line that names the file."""
    try:
        for split in ("train", "validation"):
            TokenStream(folder, split, tokens_per_row=16, seed=0)
    except ValueError as error:
        assert "\n" not in str(error)  # noqa: PT017 - one of two right answers
        assert damaged in str(error)  # noqa: PT017
        return False
    return True


def damage(draw: random.Random, content: bytes) -> bytes:
    """Cut short, made longer, zeroed in part, moved by a byte; mostly, one bit flipped."""
    kind, place = draw.randrange(10), draw.randrange(len(content))
    if kind == 0:
        return content[:place]
    if kind == 1:
        return content + draw.randbytes(draw.choice((1, 2, 512)))
    if kind == 2 and any(content[place : place + 64]):
        return content[:place] + bytes(len(content[place : place + 64])) + content[place + 64 :]
    if kind == 3:
        return content[1:] + content[:1]
    return content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :]


def count_opened(folder: Path, trials: int) -> int:
    """How many of `trials` damaged folders open."""
    draw = random.Random(0)
    files = sorted(path for path in folder.iterdir() if path.is_file())
    opened = 0
    for _ in range(trials):
        path = draw.choice(files)
        sound = path.read_bytes()
        path.write_bytes(damage(draw, sound))
        opened += opens(folder, path.name)
        path.write_bytes(sound)
    assert opens(folder, "")
    return opened


@many
def test_no_damaged_folder_opens(folder: Path, trials: int) -> None:
    assert count_opened(folder, trials) == 0


def test_damaged_folders_open_without_verification(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: the manifest is read, its shards are not compared with it."""
    monkeypatch.setattr(token_reader, "verify", lambda folder, split: read_manifest(folder))
    assert count_opened(folder, 200) > 50


def count_foreign(folder: Path, trials: int) -> int:
    """How many folders open of which one id is outside the vocabulary, with a manifest that matches."""
    draw = random.Random(1)
    sound = read_manifest(folder)
    opened = 0
    for trial in range(trials):
        place = Path(shutil.copytree(folder, folder.parent / f"foreign-{trial}"))
        split = draw.choice(("train", "validation"))
        shard = draw.choice(sound.shards(split))
        vocab_size = draw.choice((1001, 4096, 50_257, 65_535))
        ids = [draw.randrange(vocab_size) for _ in range(shard.tokens)]
        ids[draw.randrange(len(ids))] = draw.choice((vocab_size, 65_535, draw.randrange(vocab_size, 65_536)))
        vouched = dataclasses.replace(shard, sha256=write(place / shard.name, ids, 65_536))
        shards = tuple(vouched if each == shard else each for each in sound.shards(split))
        write_manifest(place, dataclasses.replace(sound, vocab_size=vocab_size, **{split: shards}))
        opened += opens(place, shard.name)
    return opened


@many
def test_no_id_outside_the_vocabulary_passes(folder: Path, trials: int) -> None:
    assert count_foreign(folder, trials) == 0


def test_foreign_ids_pass_by_their_hashes_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control."""

    def blind(path: Path) -> tuple[str, int]:
        return hash_tokens(path)[0], 0

    monkeypatch.setattr(shards_module, "hash_tokens", blind)
    assert count_foreign(folder, 20) == 20
