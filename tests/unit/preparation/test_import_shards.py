from __future__ import annotations

import io
import os
import pickle
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from overnight.data import shards
from overnight.data.loader import TokenStream
from overnight.data.shards import Manifest, load_prepared_tokenizer, read_manifest, verify
from overnight.preparation import import_shards
from overnight.preparation.import_shards import find_external_shards
from overnight.preparation.prepare import prepare_shards
from overnight.preparation.prepare_config import PrepareConfig, output_folder
from overnight.tokenizer.bpe import BytePair, byte_characters
from overnight.tokenizer.characters import Characters

# Ids 0 to 255 are bytes, 256 to 258 are " t", "he" and " the", 259 is end-of-text.
BYTES = sorted(byte_characters())
SPACE = byte_characters()[32]
MERGES = [(SPACE, "t"), ("h", "e"), (SPACE + "t", "he")]
END = 259


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    BytePair(MERGES).save(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def make_ids(seed: int, documents: int) -> list[int]:
    """Documents of 3 to 40 ids, each behind an end-of-text id."""
    draw = np.random.default_rng(seed)
    return [
        id for _ in range(documents) for id in (END, *draw.integers(0, END, draw.integers(3, 41)).tolist())
    ]


TRAIN = [make_ids(1, 30), make_ids(2, 20), make_ids(3, 1)]
VALIDATION = make_ids(4, 9)


def write_llm_c(path: Path, ids: Sequence[int], version: int = 1) -> None:
    """As llm.c's data_common.py writes, by `struct` alone."""
    magic, letter = {1: (20240520, "H"), 7: (20240801, "I")}[version]
    head = struct.pack("<256i", magic, version, len(ids), *[0] * 253)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(head + struct.pack(f"<{len(ids)}{letter}", *ids))


def write_numpy(path: Path, ids: Sequence[int]) -> None:
    path.parent.mkdir(exist_ok=True)
    np.save(path, np.array(ids, dtype=np.uint16))


def write_nanogpt(path: Path, ids: Sequence[int]) -> None:
    path.parent.mkdir(exist_ok=True)
    np.array(ids, dtype=np.uint16).tofile(path)


@pytest.fixture
def llm_c(here: Path) -> Path:
    for number, ids in enumerate(TRAIN, start=9):  # 9, 10, 11: not in the order of the letters
        write_llm_c(here / "fineweb" / f"fineweb_train_{number}.bin", ids)
    write_llm_c(here / "fineweb" / "fineweb_val_0.bin", VALIDATION)
    return here / "fineweb"


@pytest.fixture
def build_nanogpt(here: Path) -> Path:
    for number, ids in enumerate(TRAIN, start=1):
        write_numpy(here / "edu" / f"edufineweb_train_{number:06d}.npy", ids)
    write_numpy(here / "edu" / "edufineweb_val_000000.npy", VALIDATION)
    return here / "edu"


@pytest.fixture
def nanogpt(here: Path) -> Path:
    write_nanogpt(here / "owt" / "train.bin", sum(TRAIN, []))
    write_nanogpt(here / "owt" / "val.bin", VALIDATION)
    return here / "owt"


def adopt(folder: Path, tokenizer: str, **more: object) -> Manifest:
    config = PrepareConfig(from_shards=str(folder), tokenizer=tokenizer, out="adopted", **more)  # type: ignore[arg-type]
    return prepare_shards(config)  # type: ignore[return-value]


def ids_of(folder: Path, split: str) -> list[int]:
    """A split in its own order, as training streams it; its first id is no target."""
    stream = TokenStream(folder, split, tokens_per_row=16)
    batches = list(stream.evaluation_batches(4))
    first = int(batches[0].ids[0, 0])
    return [first, *(id for batch in batches for id in batch.targets.flatten().tolist())]


@pytest.mark.parametrize("kind", ["llm_c", "build_nanogpt", "nanogpt"])
def test_stream_has_the_imported_ids(
    kind: str, here: Path, tokenizer: str, request: pytest.FixtureRequest
) -> None:
    manifest = adopt(request.getfixturevalue(kind), tokenizer)
    folder = here / "adopted"
    assert verify(folder) == read_manifest(folder) == manifest
    assert ids_of(folder, "train") == sum(TRAIN, [])
    assert ids_of(folder, "validation") == VALIDATION
    decoded = b"".join(BytePair(MERGES).token_bytes()[id] for id in sum(TRAIN, []))
    assert manifest.text_bytes("train") == len(decoded)
    assert sum(shard.documents for shard in manifest.train) == sum(TRAIN, []).count(END) == 51
    assert manifest.documents == 60
    assert manifest.request["from_shards"] in manifest.source
    assert load_prepared_tokenizer(folder).fingerprint == manifest.tokenizer_fingerprint


@pytest.mark.parametrize("way", ["linked", "copied", "from a cache"])
def test_files_of_our_format_are_linked_or_copied(
    llm_c: Path, here: Path, tokenizer: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*paths: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    if way == "copied":
        monkeypatch.setattr(os, "link", refuse)
    if way == "from a cache":  # of downloads, which has links in the folder
        for path in llm_c.iterdir():
            path.symlink_to(path.rename(here / f"blob-{path.stem}"))
    manifest = adopt(llm_c, tokenizer)
    for number in range(3):
        shard = here / "adopted" / f"train-{number:05d}.bin"
        assert shard.samefile(llm_c / f"fineweb_train_{number + 9}.bin") == (way != "copied")
        assert not shard.is_symlink()
    shutil.rmtree(llm_c)
    assert verify(here / "adopted") == manifest


def test_ids_are_narrowed_and_long_files_cut(nanogpt: Path, here: Path, tokenizer: str) -> None:
    ids = sum(TRAIN, [])
    write_llm_c(here / "wide" / "a_train.bin", ids, version=7)
    write_llm_c(here / "wide" / "a_val.bin", VALIDATION, version=7)
    pieces = [ids[start : start + 100] for start in range(0, len(ids), 100)]
    for folder in (nanogpt, here / "wide"):
        manifest = adopt(folder, tokenizer, shard_tokens=100)
        assert [shard.tokens for shard in manifest.train] == [len(piece) for piece in pieces]
        assert [shard.documents for shard in manifest.train] == [piece.count(END) for piece in pieces]
        assert (here / "adopted" / "train-00000.bin").stat().st_size == 1024 + 2 * 100
        assert verify(here / "adopted") == manifest
        assert ids_of(here / "adopted", "train") == ids
        shutil.rmtree(here / "adopted")


def test_same_import_is_reused(llm_c: Path, tokenizer: str) -> None:
    assert adopt(llm_c, tokenizer) == adopt(llm_c, tokenizer)
    (llm_c / "fineweb_train_9.bin").unlink()
    with pytest.raises(ValueError, match="adopted .*--out"):
        adopt(llm_c, tokenizer)


def test_characters_need_their_own_tokenizer(
    here: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "to be or not to be, that is the question " * 20
    characters = sorted(set(text))
    ids = [characters.index(character) for character in text]  # nanoGPT's shakespeare_char
    write_nanogpt(here / "char" / "train.bin", ids[:600])
    write_nanogpt(here / "char" / "val.bin", ids[600:])
    (here / "char" / "meta.pkl").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match=r"meta\.pkl .*--tokenizer"):
        adopt(here / "char", "gpt2")
    Characters(text).save(here / "letters")
    manifest = adopt(here / "char", str(here / "letters"))
    said = capsys.readouterr().err
    for part in ("char/meta.pkl", "train.bin, val.bin", "'to be or not to be, that'"):
        assert part in said
    assert not (here / "sprung").exists()
    assert [shard.documents for shard in (*manifest.train, *manifest.validation)] == [1, 1]
    assert Characters(text).decode(ids_of(here / "adopted", "train")) == text[:600]
    assert manifest.text_bytes("train") == 600


class Trap:
    """What leaves a file where it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, ("sprung", "w")


def test_pickle_would_be_sprung(here: Path) -> None:
    """The negative control of the test before."""
    pickle.loads(pickle.dumps(Trap())).close()
    assert (here / "sprung").exists()


def test_interrupted_import_is_begun_again(
    llm_c: Path, here: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*given: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_manifest", interrupt)
        with pytest.raises(KeyboardInterrupt):
            adopt(llm_c, tokenizer)
    assert not (here / "adopted").exists()
    (here / ".adopted.partial" / "train-00007.bin").write_text("surplus")
    manifest = adopt(llm_c, tokenizer)
    assert verify(here / "adopted") == manifest


def test_id_outside_the_vocabulary_is_refused(llm_c: Path, here: Path, tokenizer: str) -> None:
    write_llm_c(llm_c / "fineweb_train_10.bin", [*TRAIN[1], 260])
    with pytest.raises(ValueError, match=r"fineweb_train_10\.bin .*260.*--tokenizer"):
        adopt(llm_c, tokenizer)
    assert not (here / "adopted").exists()
    assert not (here / ".adopted.partial").exists()


def as_npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut short": lambda content: content[:-1],
    "too long": lambda content: content + b"\0\0",
    "empty": lambda content: b"",
    "no magic number": lambda content: b"\0" + content[1:],
    "another version": lambda content: content[:4] + b"\x02" + content[5:],
    "ends in the header": lambda content: content[:500],
    "two dimensions": lambda _: as_npy(np.zeros((3, 4), np.uint16)),
    "int64": lambda _: as_npy(np.zeros(5, np.int64)),
    "float32": lambda _: as_npy(np.zeros(5, np.float32)),
    "a pickle": lambda _: as_npy(np.array([Trap()], dtype=object)),
    # nanoGPT's files have no header, so every damaged header could be ids.
    "a damaged header": lambda _: (
        b"\0" + struct.pack("<256i", 20240520, 1, 512, *[0] * 253)[1:] + bytes(1024)
    ),
}


@pytest.mark.parametrize(
    "kind,name,damages",
    [
        ("llm_c", "fineweb_train_9.bin", [*DAMAGE][:6]),
        ("build_nanogpt", "edufineweb_val_000000.npy", [*DAMAGE][:4] + [*DAMAGE][6:10]),
        ("nanogpt", "val.bin", ["cut short", "empty", "a damaged header"]),
    ],
)
def test_damaged_file_is_named(
    kind: str, name: str, damages: list[str], here: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(kind)
    sound = (folder / name).read_bytes()
    for damage in damages:
        (folder / name).write_bytes(sound)
        assert find_external_shards(folder)
        (folder / name).write_bytes(DAMAGE[damage](sound))
        with pytest.raises(ValueError, match=name):
            find_external_shards(folder)
    assert not (here / "sprung").exists()


def test_folder_without_shards_is_refused(here: Path, llm_c: Path, tokenizer: str) -> None:
    (here / "none").mkdir()
    with pytest.raises(ValueError, match=r"none .*\.npy"):
        find_external_shards(here / "none")
    write_nanogpt(here / "mixed" / "train.bin", TRAIN[0])
    write_numpy(here / "mixed" / "edufineweb_val.npy", VALIDATION)
    with pytest.raises(ValueError, match="several programs"):
        find_external_shards(here / "mixed")
    with pytest.raises(ValueError, match="folder nowhere does not exist"):
        adopt(Path("nowhere"), tokenizer)
    adopt(llm_c, tokenizer)
    with pytest.raises(ValueError, match="--data adopted"):
        find_external_shards(Path("adopted"))


def test_both_splits_are_needed(llm_c: Path, nanogpt: Path) -> None:
    (llm_c / "fineweb_val_0.bin").unlink()
    with pytest.raises(ValueError, match=r"no validation shard .*fineweb_train_11\.bin"):
        find_external_shards(llm_c)
    (nanogpt / "train.bin").unlink()
    with pytest.raises(ValueError, match=r"no train shard .*val\.bin"):
        find_external_shards(nanogpt)


@pytest.mark.parametrize(
    "name, split",
    [
        ("fineweb_val_000000", "validation"),
        ("val", "validation"),
        ("tiny-VALID-1", "validation"),
        ("x.validation.3", "validation"),
        ("train", "train"),
        ("interval_train_1", "train"),
        ("valley_1", "train"),
    ],
)
def test_split_is_in_the_name(name: str, split: str) -> None:
    assert bool(import_shards.VALIDATION_NAME.search(name)) == (split == "validation")


def test_options_of_an_import(llm_c: Path) -> None:
    config = PrepareConfig(from_shards=str(llm_c), source="shakespeare", tokens=5, subset="x")
    assert [problem.split()[0] for problem in config.problems()] == ["source", "subset", "tokens"]
    assert PrepareConfig(from_shards=str(llm_c), out="x", tokenizer="y", shard_tokens=7).problems() == []
    for tokenizer, folder in (("gpt2", "fineweb-adopted"), ("my/own.json", "fineweb-adopted-own")):
        named = PrepareConfig(from_shards="fineweb/", tokenizer=tokenizer)
        assert output_folder(named) == Path("data", folder)
    for call in (prepare_shards, output_folder):
        with pytest.raises(ValueError, match="from_shards"):
            call(PrepareConfig())
