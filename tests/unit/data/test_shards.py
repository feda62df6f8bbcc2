from __future__ import annotations

import dataclasses
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from overnight.data.shards import (
    Manifest,
    ShardWriter,
    load_prepared_tokenizer,
    open_tokens,
    read_manifest,
    verify,
    write_manifest,
)

Prepare = Callable[..., Manifest]


@pytest.fixture
def folder(tmp_path: Path, prepared: Prepare) -> Path:
    prepared(tmp_path / "numbers", range(1000), range(150), shard_tokens=400)
    return tmp_path / "numbers"


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_documents_are_cut_into_shards_and_counted_where_they_begin(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "train", 300, shard_tokens=10)
    documents = [np.arange(length, dtype=np.uint32) + 7 for length in (4, 6, 3, 20, 1, 8)]
    for document in documents:
        writer.add(document, text_bytes=100 * document.size)
    shards = writer.finish()
    assert [shard.name for shard in shards] == [f"train-{index:05d}.bin" for index in range(5)]
    assert [shard.tokens for shard in shards] == [10, 10, 10, 10, 2]
    assert [shard.documents for shard in shards] == [2, 2, 0, 2, 0]
    assert [shard.text_bytes for shard in shards] == [1000, 2300, 0, 900, 0]
    tokens = np.concatenate([open_tokens(tmp_path / shard.name) for shard in shards])
    assert np.array_equal(tokens, np.concatenate(documents))


def test_the_manifest_comes_back_as_it_was(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert verify(folder) == manifest
    assert (manifest.tokens("train"), manifest.tokens("validation")) == (1000, 150)
    assert (manifest.text_bytes("train"), manifest.text_bytes("validation")) == (2000, 300)
    assert json.loads((folder / "manifest.json").read_text())["train"][2]["tokens"] == 200
    write_manifest(folder, manifest)
    assert read_manifest(folder) == manifest


def test_every_flipped_bit_of_a_shard_is_refused(folder: Path) -> None:
    draw = random.Random(0)
    paths = sorted(folder.glob("*.bin"))
    assert len(paths) == 4
    refused = 0
    for _ in range(240):
        path = draw.choice(paths)
        bit = draw.randrange(8 * path.stat().st_size)
        flip(path, bit)
        with pytest.raises(ValueError, match=path.name):
            verify(folder)
        refused += 1
        flip(path, bit)
    assert refused == 240
    assert verify(folder)


def test_without_verification_a_flipped_bit_passes_unseen(folder: Path) -> None:
    """The negative control: the format alone does not notice what the manifest refuses."""
    path = folder / "train-00000.bin"
    sound = open_tokens(path).tolist()
    flip(path, 8 * (1024 + 2 * 17))
    damaged = open_tokens(path).tolist()
    assert damaged != sound
    assert damaged[17] == sound[17] ^ 1


def test_every_flipped_bit_of_the_manifest_is_refused(folder: Path) -> None:
    path = folder / "manifest.json"
    draw = random.Random(1)
    for _ in range(240):
        bit = draw.randrange(8 * path.stat().st_size)
        flip(path, bit)
        with pytest.raises(ValueError, match=r"manifest\.json"):
            read_manifest(folder)
        flip(path, bit)
    assert read_manifest(folder)


@pytest.mark.parametrize("keep", [0, 3, 1023, 1024, 1025, 1700])
def test_a_shard_cut_short_is_refused(folder: Path, keep: int) -> None:
    path = folder / "train-00001.bin"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"train-00001\.bin is damaged"):
        verify(folder)


def test_shards_in_each_other_s_place_are_refused(folder: Path) -> None:
    first, second = folder / "train-00000.bin", folder / "train-00001.bin"
    first.rename(folder / "elsewhere")
    second.rename(first)
    (folder / "elsewhere").rename(second)
    with pytest.raises(ValueError, match=r"train-00000\.bin was changed"):
        verify(folder)


def test_a_missing_shard_is_refused(folder: Path) -> None:
    (folder / "validation-00000.bin").unlink()
    with pytest.raises(ValueError, match=r"validation-00000\.bin is missing"):
        verify(folder)
    assert verify(folder, "train")


def test_a_surplus_shard_is_refused(folder: Path) -> None:
    shutil.copy(folder / "train-00000.bin", folder / "train-00003.bin")
    with pytest.raises(ValueError, match=r"train-00003\.bin is not in the manifest"):
        verify(folder)


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no manifest\.json: it is not a folder that .* finished"):
        read_manifest(tmp_path)


def test_an_id_outside_the_vocabulary_is_found(folder: Path) -> None:
    """Even where manifest and shards agree, as in a folder made by other means."""
    write_manifest(folder, dataclasses.replace(read_manifest(folder), vocab_size=1000))
    assert verify(folder)
    write_manifest(folder, dataclasses.replace(read_manifest(folder), vocab_size=999))
    with pytest.raises(ValueError, match=r"train-00002\.bin holds the id 999, outside the vocabulary of 999"):
        verify(folder)


def test_shards_of_another_width_than_the_vocabulary_are_refused(folder: Path) -> None:
    write_manifest(folder, dataclasses.replace(read_manifest(folder), vocab_size=100_000))
    with pytest.raises(ValueError, match=r"holds 400 tokens as uint16, and its manifest says 400"):
        verify(folder)


@pytest.mark.parametrize("name", ["../train-00000.bin", "/etc/passwd", "validation-00000.bin", "train-0.bin"])
def test_a_manifest_leads_nowhere_else(folder: Path, name: str) -> None:
    manifest = read_manifest(folder)
    strange = dataclasses.replace(manifest.train[0], name=name)
    write_manifest(folder, dataclasses.replace(manifest, train=(strange, *manifest.train[1:])))
    with pytest.raises(ValueError, match="which is no shard of train"):
        read_manifest(folder)


@pytest.mark.parametrize(
    "content,message",
    [
        ("", "is no folder that `overnight prepare` wrote"),
        ("[]", "is no folder that `overnight prepare` wrote"),
        ('{"name": "a browser extension", "version": 2}', "is no folder that `overnight prepare` wrote"),
        ('{"format_version": 2}', "is no folder that `overnight prepare` wrote"),
        ("[" * 100_000, "is no folder that `overnight prepare` wrote"),
        ('{"format_version": 2, "sha256_of_the_above": ""}', "or its manifest.json is damaged"),
        (
            '{"format_version": 1, "sha256_of_the_above": "", "train": 7}',
            "has format version 1, and this is 2",
        ),
    ],
)
def test_any_other_manifest_is_refused(folder: Path, content: str, message: str) -> None:
    (folder / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        read_manifest(folder)
    is_surely_ours = "has format version" in message
    assert ("delete the folder" in str(error.value)) == is_surely_ours


def test_a_manifest_changed_by_hand_is_refused(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"licence": "none"', '"licence": "mine"'))
    with pytest.raises(ValueError, match="was changed since it was written; delete the folder and prepare"):
        read_manifest(folder)


def test_a_tokenizer_that_did_not_make_the_shards_is_refused(folder: Path, byte_tokenizer) -> None:  # type: ignore[no-untyped-def]
    byte_tokenizer.save(folder / "tokenizer")
    with pytest.raises(ValueError, match="is not the tokenizer that made the shards"):
        load_prepared_tokenizer(folder)
    fingerprint = byte_tokenizer.fingerprint
    write_manifest(folder, dataclasses.replace(read_manifest(folder), tokenizer_fingerprint=fingerprint))
    assert load_prepared_tokenizer(folder).fingerprint == fingerprint
