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
from numpy.typing import NDArray

from overnight.data import shards
from overnight.data.loader import TokenStream
from overnight.data.shards import Manifest, load_prepared_tokenizer, read_manifest, verify
from overnight.data.text_files import describe_missing
from overnight.preparation import import_shards
from overnight.preparation.import_shards import find_external_shards
from overnight.preparation.prepare import PART_DIGITS, prepare_shards
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
ALL = sum(TRAIN, [])
VALIDATION = make_ids(4, 9)


def llm_c(ids: Sequence[int], version: int = 1) -> bytes:
    """As llm.c's data_common.py writes, by `struct` alone."""
    magic, letter = {1: (20240520, "H"), 7: (20240801, "I")}[version]
    head = struct.pack("<256i", magic, version, len(ids), *[0] * 253)
    return head + struct.pack(f"<{len(ids)}{letter}", *ids)


def npy(array: Any) -> bytes:
    """A .npy file; an array of objects is a pickle."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def short(ids: Sequence[int]) -> NDArray[np.uint16]:
    return np.array(ids, dtype=np.uint16)


def write(folder: str, **files: bytes) -> Path:
    """A folder of files, in whose names `__` stands for the dot."""
    Path(folder).mkdir(exist_ok=True)
    for name, content in files.items():
        Path(folder, name.replace("__", ".")).write_bytes(content)
    return Path(folder)


@pytest.fixture
def folders(here: Path) -> dict[str, Path]:
    """The same ids as three programs write them."""
    trains = dict(enumerate(TRAIN, start=9))  # 9, 10, 11: not in the order of the letters
    return {
        "llm.c": write(
            "fineweb",
            **{f"fineweb_train_{number}__bin": llm_c(ids) for number, ids in trains.items()},
            fineweb_val_0__bin=llm_c(VALIDATION),
        ),
        "build-nanogpt": write(
            "edu",
            **{f"edufineweb_train_{number:06d}__npy": npy(short(ids)) for number, ids in trains.items()},
            edufineweb_val_000000__npy=npy(short(VALIDATION)),
        ),
        "nanoGPT": write("owt", train__bin=short(ALL).tobytes(), val__bin=short(VALIDATION).tobytes()),
    }


@pytest.fixture
def fineweb(folders: dict[str, Path]) -> Path:
    return folders["llm.c"]


def adopt(folder: Path, tokenizer: str, **more: object) -> Manifest:
    config = PrepareConfig(from_shards=str(folder), tokenizer=tokenizer, out="adopted", **more)  # type: ignore[arg-type]
    return prepare_shards(config)  # type: ignore[return-value]


def ids_of(folder: Path, split: str) -> list[int]:
    """A split in its own order, as training streams it; its first id is no target."""
    stream = TokenStream(folder, split, tokens_per_row=16)
    batches = list(stream.evaluation_batches(4))
    first = int(batches[0].ids[0, 0])
    return [first, *(id for batch in batches for id in batch.targets.flatten().tolist())]


@pytest.mark.parametrize("program", ["llm.c", "build-nanogpt", "nanoGPT"])
def test_stream_has_the_imported_ids(
    program: str, here: Path, tokenizer: str, folders: dict[str, Path]
) -> None:
    manifest = adopt(folders[program], tokenizer)
    folder = here / "adopted"
    assert verify(folder) == read_manifest(folder) == manifest
    assert (ids_of(folder, "train"), ids_of(folder, "validation")) == (ALL, VALIDATION)
    assert manifest.text_bytes("train") == sum(len(BytePair(MERGES).token_bytes()[id]) for id in ALL)
    assert (sum(shard.documents for shard in manifest.train), manifest.documents) == (51, 60)
    assert manifest.source == f"{folders[program].name}, adopted from {program}'s shards"
    assert load_prepared_tokenizer(folder).fingerprint == manifest.tokenizer_fingerprint


def test_width_of_ids_without_a_header_is_found(here: Path, tokenizer: str) -> None:
    wide = {"train__bin": ALL, "val__bin": VALIDATION}
    for width in (np.uint16, np.uint32):
        folder = write(
            f"owt{width.__name__}", **{name: np.array(ids, width).tobytes() for name, ids in wide.items()}
        )
        manifest = adopt(folder, tokenizer)
        assert (manifest.tokens("train"), manifest.tokens("validation")) == (len(ALL), len(VALIDATION))
        assert ids_of(here / "adopted", "train") == ALL
        shutil.rmtree(here / "adopted")
    folder = write("default", **{name: np.array(ids).tobytes() for name, ids in wide.items()})
    with pytest.raises(ValueError, match=r"train\.bin holds ids of 8 bytes"):
        adopt(folder, tokenizer)
    sound = np.array(ALL, np.uint32).tobytes()
    for damaged in (sound[:-2], sound[: len(sound) // 2] + sound[len(sound) // 2 + 2 :], b"\1\0" + sound):
        folder = write(f"torn{len(damaged)}-{damaged[0]}", train__bin=damaged, val__bin=sound)
        with pytest.raises(ValueError, match=r"train\.bin is damaged: it holds ids of 4 bytes"):
            adopt(folder, tokenizer)


def test_ids_of_a_vocabulary_that_needs_4_bytes(here: Path, tmp_path: Path) -> None:
    """262,144 or more: the upper halves of the ids are as large as those of a short text's ids of 2 bytes."""
    points = [*range(0x20, 0xD800), *range(0xE000, 0x110000)]
    Characters([chr(point) for point in points[:400_000]]).save(tmp_path / "wide")
    ids = [7, 399_000, 65_535, 262_144, 65_536, 300_001] * 9
    content = np.array(ids, np.uint32).tobytes()
    folder = write("wide-ids", train__bin=content, val__bin=content)
    adopt(folder, str(tmp_path / "wide"))
    assert ids_of(here / "adopted", "train") == ids
    shutil.rmtree("adopted")
    for wrong, match in ((content[:-2], "takes 4"), (np.array(ids).tobytes(), "8 bytes")):
        (folder / "train.bin").write_bytes(wrong)
        with pytest.raises(ValueError, match=match):
            adopt(folder, str(tmp_path / "wide"))


@pytest.mark.parametrize(
    "names, missing",
    [
        (["part-00000-of-00003", "part-00002-of-00003"], "part-00001-of-00003"),
        (["a/p-00000-of-00003.txt.gz", "a/p-00001-of-00003.txt.gz"], "a/p-00002-of-00003.txt.gz"),
        (["p-00001-of-00002", "p-00002-of-00002", "q-00000-of-00001"], None),
        (["00003.jsonl", "00005.jsonl"], "00004.jsonl"),
        (["00003.jsonl", "00009.jsonl"], "00004.jsonl, 00005.jsonl, 00006.jsonl ..."),
        (["notes 2019.txt", "notes 2023.txt"], None),
    ],
)
def test_gap_in_the_parts_of_a_text_is_named(names: list[str], missing: str | None) -> None:
    found = describe_missing(names, PART_DIGITS)
    assert found == (f"not there, by the numbers in the names: {missing}" if missing else "")


def test_gap_in_the_numbers_is_named(
    fineweb: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    adopt(fineweb, tokenizer)
    assert "not there" not in capsys.readouterr().err
    (fineweb / "fineweb_train_10.bin").unlink()
    shutil.rmtree("adopted")
    adopt(fineweb, tokenizer)
    assert "not there, by the numbers in the names: fineweb_train_10.bin" in capsys.readouterr().err


@pytest.mark.parametrize("way", ["linked", "copied", "from a cache"])
def test_files_of_our_format_are_linked_or_copied(
    fineweb: Path, here: Path, tokenizer: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*paths: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    if way == "copied":
        monkeypatch.setattr(os, "link", refuse)
    if way == "from a cache":  # of downloads, which has links in the folder
        for path in fineweb.iterdir():
            path.symlink_to(path.rename(here / f"blob-{path.stem}"))
    manifest = adopt(fineweb, tokenizer)
    for number in range(3):
        shard = here / "adopted" / f"train-{number:05d}.bin"
        assert shard.samefile(fineweb / f"fineweb_train_{number + 9}.bin") == (way != "copied")
        assert not shard.is_symlink()
    shutil.rmtree(fineweb)
    assert verify(here / "adopted") == manifest


def test_ids_are_narrowed_and_long_files_cut(folders: dict[str, Path], here: Path, tokenizer: str) -> None:
    wide = write("wide", a_train__bin=llm_c(ALL, version=7), a_val__bin=llm_c(VALIDATION, version=7))
    pieces = [ALL[start : start + 100] for start in range(0, len(ALL), 100)]
    for folder in (folders["nanoGPT"], wide):
        manifest = adopt(folder, tokenizer, shard_tokens=100)
        found = [(shard.tokens, shard.documents) for shard in manifest.train]
        assert found == [(len(piece), piece.count(END)) for piece in pieces]
        assert (here / "adopted" / "train-00000.bin").stat().st_size == 1024 + 2 * 100
        assert verify(here / "adopted") == manifest
        assert ids_of(here / "adopted", "train") == ALL
        shutil.rmtree(here / "adopted")


def test_same_import_is_reused(fineweb: Path, tokenizer: str) -> None:
    assert adopt(fineweb, tokenizer) == adopt(fineweb, tokenizer)
    (fineweb / "fineweb_train_9.bin").unlink()
    with pytest.raises(ValueError, match="adopted .*--out"):
        adopt(fineweb, tokenizer)


def test_characters_need_their_own_tokenizer(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "to be or not to be, that is the question " * 20
    characters = sorted(set(text))
    ids = [characters.index(character) for character in text]  # nanoGPT's shakespeare_char
    files = {"train__bin": short(ids[:600]).tobytes(), "val__bin": short(ids[600:]).tobytes()}
    folder = write("char", **files, meta__pkl=pickle.dumps(Trap()))
    with pytest.raises(ValueError, match=r"meta\.pkl .*--tokenizer"):
        adopt(folder, "gpt2")
    Characters(text).save(here / "letters")
    manifest = adopt(folder, str(here / "letters"))
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
    fineweb: Path, here: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*given: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_manifest", interrupt)
        with pytest.raises(KeyboardInterrupt):
            adopt(fineweb, tokenizer)
    assert not (here / "adopted").exists()
    (here / ".adopted.partial" / "train-00007.bin").write_text("surplus")
    manifest = adopt(fineweb, tokenizer)
    assert verify(here / "adopted") == manifest


def test_id_outside_the_vocabulary_is_refused(fineweb: Path, here: Path, tokenizer: str) -> None:
    write("fineweb", fineweb_train_10__bin=llm_c([*TRAIN[1], 260]))
    with pytest.raises(ValueError, match=r"fineweb_train_10\.bin .*260.*--tokenizer"):
        adopt(fineweb, tokenizer)
    assert not (here / "adopted").exists()
    assert not (here / ".adopted.partial").exists()


CUT: list[Callable[[bytes], bytes]] = [lambda content: content[:-1], lambda content: b""]
OTHER_HEADERS: list[Callable[[bytes], bytes]] = [
    lambda content: content + b"\0\0",
    lambda content: b"\0" + content[1:],
    lambda content: content[:4] + b"\x02" + content[5:],
    lambda content: content[:500],
]
ARRAYS = [np.zeros((3, 4), np.uint16), np.zeros(5, np.int64), np.zeros(5, np.float32)]
PICKLE = np.array([Trap()], dtype=object)
# nanoGPT's files have no header, so every damaged header could be ids.
HEADER = b"\0" + struct.pack("<256i", 20240520, 1, 512, *[0] * 253)[1:] + bytes(1024)


@pytest.mark.parametrize(
    "program,name,damages",
    [
        ("llm.c", "fineweb_train_9.bin", [*CUT, *OTHER_HEADERS]),
        (
            "build-nanogpt",
            "edufineweb_val_000000.npy",
            [*CUT, *OTHER_HEADERS[:2], *(lambda _, array=array: npy(array) for array in (*ARRAYS, PICKLE))],
        ),
        ("nanoGPT", "val.bin", [*CUT, lambda _: HEADER]),
    ],
)
def test_damaged_file_is_named(
    program: str,
    name: str,
    damages: list[Callable[[bytes], bytes]],
    here: Path,
    folders: dict[str, Path],
) -> None:
    path = folders[program] / name
    sound = path.read_bytes()
    for damage in damages:
        path.write_bytes(sound)
        assert find_external_shards(path.parent)
        path.write_bytes(damage(sound))
        with pytest.raises(ValueError, match=name):
            find_external_shards(path.parent)
    assert not (here / "sprung").exists()


def test_folder_without_shards_is_refused(here: Path, folders: dict[str, Path], tokenizer: str) -> None:
    mixed = {"train__bin": short(TRAIN[0]).tobytes(), "edufineweb_val__npy": npy(short(VALIDATION))}
    adopt(folders["llm.c"], tokenizer)
    (folders["llm.c"] / "fineweb_val_0.bin").unlink()
    (folders["nanoGPT"] / "train.bin").unlink()
    for folder, message in {
        write("none"): r"none .*\.npy",
        write("mixed", **mixed): "several programs",
        Path("adopted"): "--data adopted",
        folders["llm.c"]: r"no validation shard .*fineweb_train_11\.bin",
        folders["nanoGPT"]: r"no train shard .*val\.bin",
    }.items():
        with pytest.raises(ValueError, match=message):
            find_external_shards(folder)
    with pytest.raises(ValueError, match="folder nowhere does not exist"):
        adopt(Path("nowhere"), tokenizer)


@pytest.mark.parametrize("name", ["fineweb_val_000000", "val", "tiny-VALID-1", "x.validation.3"])
def test_validation_is_in_the_name(name: str) -> None:
    assert import_shards.VALIDATION_NAME.search(name)


@pytest.mark.parametrize("name", ["train", "interval_train_1", "valley_1"])
def test_other_names_are_of_training(name: str) -> None:
    assert not import_shards.VALIDATION_NAME.search(name)


def test_options_of_an_import(fineweb: Path) -> None:
    config = PrepareConfig(from_shards=str(fineweb), source="shakespeare", tokens=5, subset="x")
    assert [problem.split()[0] for problem in config.problems()] == ["source", "subset", "tokens"]
    assert PrepareConfig(from_shards=str(fineweb), out="x", tokenizer="y", shard_tokens=7).problems() == []
    for tokenizer, folder in (("gpt2", "fineweb-adopted"), ("my/own.json", "fineweb-adopted-own")):
        named = PrepareConfig(from_shards="fineweb/", tokenizer=tokenizer)
        assert output_folder(named) == Path("data", folder)
    for call in (prepare_shards, output_folder):
        with pytest.raises(ValueError, match="from_shards"):
            call(PrepareConfig())
