from __future__ import annotations

import hashlib
import struct
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from overnight.data.shards import TokenFile, hash_tokens, open_tokens


def write(path: Path, ids: list[int], vocab_size: int = 50_257) -> str:
    file = TokenFile(path, vocab_size)
    file.append(np.array(ids, dtype=np.uint32))
    return file.close()


def read_independently(path: Path) -> tuple[tuple[int, ...], list[int]]:
    """Header words and tokens, by `struct` alone and by the format's description."""
    content = path.read_bytes()
    header = struct.unpack("<256i", content[:1024])
    letter = {(20240520, 1): "H", (20240801, 7): "I"}[header[0], header[1]]
    return header, list(struct.unpack(f"<{header[2]}{letter}", content[1024:]))


@pytest.mark.parametrize(
    "vocab_size,ids,first_words",
    [
        (50_257, [50_256, 0, 1, 258], (20240520, 1, 4)),
        (65_536, [65_535], (20240520, 1, 1)),
        (65_537, [65_536, 3], (20240801, 7, 2)),
        (128_256, [128_255, 70_000, 0], (20240801, 7, 3)),
    ],
)
def test_another_reader_reads_it(
    tmp_path: Path, vocab_size: int, ids: list[int], first_words: tuple[int, ...]
) -> None:
    digest = write(tmp_path / "train-00000.bin", ids, vocab_size)
    header, tokens = read_independently(tmp_path / "train-00000.bin")
    assert header == first_words + (0,) * 253
    assert tokens == ids == open_tokens(tmp_path / "train-00000.bin").tolist()
    assert digest == hashlib.sha256((tmp_path / "train-00000.bin").read_bytes()).hexdigest()


def test_hashing_finds_the_highest_id_wherever_it_is(tmp_path: Path) -> None:
    for place in (0, 700_000, 1_299_999):
        ids = np.zeros(1_300_000, dtype=np.uint32)
        ids[place] = 40_000
        file = TokenFile(tmp_path / "t.bin", 50_257)
        file.append(ids)
        digest = file.close()
        summary = hash_tokens(tmp_path / "t.bin")
        assert (summary.highest_id, summary.sha256) == (40_000, digest)


def test_an_id_outside_the_vocabulary_is_not_written(tmp_path: Path) -> None:
    file = TokenFile(tmp_path / "t.bin", 100)
    file.append(np.array([99], dtype=np.uint32))
    with pytest.raises(ValueError, match="the id 100, outside its vocabulary of 100"):
        file.append(np.array([5, 100], dtype=np.uint32))
    file.abandon()
    assert list(tmp_path.iterdir()) == []


def test_nothing_has_the_name_before_it_is_complete(tmp_path: Path) -> None:
    file = TokenFile(tmp_path / "t.bin", 100)
    file.append(np.array([1, 2], dtype=np.uint32))
    assert not (tmp_path / "t.bin").exists()
    file.close()
    assert [path.name for path in tmp_path.iterdir()] == ["t.bin"]


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda content: b"", "ends after 0 bytes, within its header"),
        (lambda content: content[:1000], "ends after 1,000 bytes, within its header"),
        (lambda content: content[:-1], r"3 tokens make 1,030 bytes, and it has 1,029"),
        (lambda content: content + b"\0", r"3 tokens make 1,030 bytes, and it has 1,031"),
        (lambda content: b"\x01" + content[1:], "begins with"),
        (lambda content: content[:4] + b"\x02" + content[5:], "begins with 20240520, version 2"),
        (lambda content: content[:8] + struct.pack("<i", 2) + content[12:], r"2 tokens make"),
        (lambda content: content[:8] + struct.pack("<i", -3) + content[12:], "not one that is ever written"),
        (lambda content: content[:8] + struct.pack("<i", 0) + content[12:1024], "not one that is ever"),
        (lambda content: content[:900] + b"\x01" + content[901:], "not one that is ever written"),
    ],
)
def test_damage_is_named(tmp_path: Path, change, message: str) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "train-00007.bin"
    write(path, [1, 2, 3])
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=message) as error:
        open_tokens(path)
    assert str(path) in str(error.value)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train-00000\.bin is missing"):
        open_tokens(tmp_path / "train-00000.bin")


@given(content=st.binary(max_size=1200), magic=st.sampled_from([b"", struct.pack("<2i", 20240520, 1)]))
def test_any_bytes_are_a_shard_or_a_plain_refusal(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, magic: bytes
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "t.bin"
    path.write_bytes(magic + content)
    with suppress(ValueError):
        assert open_tokens(path).size > 0
