"""Shards damaged or foreign in a thousand ways: a stream over them does not open."""

from __future__ import annotations

import dataclasses
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from overnight.data import shards as shards_module
from overnight.data.loader import TokenStream
from overnight.data.shards import Manifest, TokenFile, hash_tokens, read_manifest, write_manifest

Prepare = Callable[..., Manifest]
many = pytest.mark.parametrize("trials", [200, pytest.param(1000, marks=pytest.mark.slow)])


@pytest.fixture
def folder(tmp_path: Path, prepared: Prepare) -> Path:
    prepared(tmp_path / "numbers", range(1000), range(150), shard_tokens=400)
    return tmp_path / "numbers"


def opens(folder: Path) -> bool:
    """True if a run could train on the folder; whatever is raised but a sentence is raised."""
    said = ""
    try:
        TokenStream(folder, tokens_per_row=16, seed=0)
        TokenStream(folder, "validation", tokens_per_row=16, seed=0)
    except ValueError as error:
        said = str(error)
        assert "\n" not in said  # noqa: PT017 - one of two right answers
    return not said


def damage(draw: random.Random, content: bytes) -> bytes:
    """Cut short, made longer, zeroed in part, moved by a byte; mostly, one bit turned."""
    kind, place = draw.randrange(10), draw.randrange(len(content))
    if kind == 0:
        return content[:place]
    if kind == 1:
        return content + draw.randbytes(draw.choice((1, 2, 512)))
    if kind == 2 and any(content[place : place + 64]):
        return content[:place] + bytes(len(content[place : place + 64])) + content[place + 64 :]
    if kind == 3:
        return content[1:] + content[:1]
    damaged = bytearray(content)
    damaged[place] ^= 1 << draw.randrange(8)
    return bytes(damaged)


def count_opened(folder: Path, trials: int) -> int:
    """Of so many damaged folders, how many open."""
    draw = random.Random(0)
    files = sorted(path for path in folder.iterdir() if path.is_file())
    opened = 0
    for _ in range(trials):
        path = draw.choice(files)
        sound = path.read_bytes()
        path.write_bytes(damage(draw, sound))
        opened += opens(folder)
        path.write_bytes(sound)
    assert opens(folder)
    return opened


@many
def test_no_damaged_folder_opens(folder: Path, trials: int) -> None:
    assert count_opened(folder, trials) == 0


def test_without_verification_damaged_folders_open(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: the manifest is read, its shards are not held against it."""
    monkeypatch.setattr(shards_module, "verify", lambda folder, split: read_manifest(folder))
    assert count_opened(folder, 200) > 50


def count_foreign(folder: Path, trials: int) -> int:
    """Of so many folders of which one id is outside the vocabulary, and that vouch for it, how many open."""
    draw = random.Random(1)
    sound = read_manifest(folder)
    opened = 0
    for trial in range(trials):
        place = folder.parent / f"foreign-{trial}"
        shutil.copytree(folder, place)
        split = draw.choice(("train", "validation"))
        shard = draw.choice(sound.shards(split))
        vocab_size = draw.choice((1001, 4096, 50_257, 65_535))
        ids = np.array([draw.randrange(vocab_size) for _ in range(shard.tokens)], dtype=np.uint32)
        ids[draw.randrange(ids.size)] = draw.choice((vocab_size, 65_535, draw.randrange(vocab_size, 65_536)))
        (place / shard.name).unlink()
        file = TokenFile(place / shard.name, 65_536)
        file.append(ids)
        file.close()
        vouched = dataclasses.replace(shard, sha256=hash_tokens(place / shard.name).sha256)
        shards = tuple(vouched if each == shard else each for each in sound.shards(split))
        write_manifest(place, dataclasses.replace(sound, vocab_size=vocab_size, **{split: shards}))
        opened += opens(place)
        shutil.rmtree(place)
    return opened


@many
def test_no_id_outside_the_vocabulary_passes(folder: Path, trials: int) -> None:
    assert count_foreign(folder, trials) == 0


def test_without_a_look_at_the_ids_they_pass(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: bytes held against their hashes alone."""
    from overnight.data import shards

    def blind(path: Path) -> object:
        return dataclasses.replace(hash_tokens(path), highest_id=0)

    monkeypatch.setattr(shards, "hash_tokens", blind)
    assert count_foreign(folder, 20) == 20
