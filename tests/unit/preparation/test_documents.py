from __future__ import annotations

import gzip
import hashlib
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from overnight.data.text_files import DamagedFileError, find_files, list_files
from overnight.data.wide_encodings import find_wide_encoding
from overnight.preparation.documents import (
    LONGEST_PIECE_BYTES,
    RECORD,
    SHORTEST_PIECE_BYTES,
    Document,
    Part,
    divide_file,
    document_hash,
    filter_documents,
    is_validation,
    read_part,
    split_of,
)

TEXTS = [f"The document of number {number}." for number in range(4000)]


def read_documents(path: Path, text_column: str = "text") -> Iterator[Document]:
    """All of a file or folder, in its order."""
    for file in find_files(str(path)):
        yield from read_part(Part(file), text_column)


def texts(path: Path, **options: Any) -> list[str]:
    return [document.text for document in read_documents(path, **options)]


def write_lines(path: Path, *values: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def write_parquet(path: Path, column: Any, name: str = "text") -> Path:
    parquet.write_table(pyarrow.table({name: column, "id": list(range(len(column)))}), path, row_group_size=2)
    return path


# Kinds of files


@pytest.mark.parametrize("name", ["a.txt", "a.md", "A.TXT"])
def test_text_file_is_unchanged(tmp_path: Path, name: str) -> None:
    text = "One line.\r\n\r\n\tÄnother – 日本.\n\n\n "
    for mark in (b"", b"\xef\xbb\xbf"):
        (tmp_path / name).write_bytes(mark + text.encode())
        assert list(read_documents(tmp_path / name)) == [Document(text)]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.txt.gz"])
@pytest.mark.parametrize("order", ["LE", "BE"])
@pytest.mark.parametrize("mark", ["\ufeff", ""])
@pytest.mark.parametrize("family", ["UTF-16", "UTF-32"])
def test_utf16_and_utf32_are_named(tmp_path: Path, name: str, order: str, mark: str, family: str) -> None:
    content = mark + '{"text": "Übung 日 one 🙂"}\n'
    pack = gzip.compress if name.endswith(".gz") else bytes
    (tmp_path / name).write_bytes(pack(content.encode(family + order)))
    encoding = family if mark else family + order
    with pytest.raises(DamagedFileError, match=f"{name} is {encoding}, not UTF-8: .* -f {encoding} -t"):
        texts(tmp_path / name)
    (tmp_path / name).write_bytes(pack(content.encode()))  # the negative control
    assert len(texts(tmp_path / name)) == 1


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"a\0",
        b"one\0two\0three\0four",
        bytes(64),
        b"\0\0a\0" * 9,
        "日本語の文".encode("utf-16-le"),
    ],
)
def test_other_bytes_are_not_taken_for_utf16(content: bytes) -> None:
    """Zeros between words, zeros alone, and wide text that has none."""
    assert find_wide_encoding(content) is None


@pytest.mark.parametrize("encoding", ["UTF-16LE", "UTF-16BE", "UTF-32LE", "UTF-32BE"])
def test_long_text_is_recognized_by_its_beginning(encoding: str) -> None:
    for before in ("", "a"):  # the beginning ends within a character outside the BMP
        content = (before + "Plain words, now and then 🙂. " * 9_000).encode(encoding)
        assert find_wide_encoding(content[:65_535]) == find_wide_encoding(content) == encoding


def test_json_lines(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "a.jsonl", {"text": "one\n\ntwo", "id": 1}, {"id": 2, "text": "日本"}, {"text": ""}
    )
    path.write_text(path.read_text().replace("\n", "\n\n", 1))  # a blank line is not a document
    assert texts(path) == ["one\n\ntwo", "日本", ""]
    write_lines(path, {"body": "b", "text": "t"})
    assert texts(path, text_column="body") == ["b"]


CATEGORIES = pyarrow.dictionary(pyarrow.int32(), pyarrow.string())  # a categorical column of pandas


@pytest.mark.parametrize(
    "kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.binary(), CATEGORIES], ids=str
)
def test_parquet(tmp_path: Path, kind: pyarrow.DataType) -> None:
    values = ["one\n\ntwo", "日本", "", "four", "five"]
    column = pyarrow.array(values).cast(pyarrow.string() if kind == CATEGORIES else kind).cast(kind)
    path = write_parquet(tmp_path / "a.parquet", column, "body")
    assert texts(path, text_column="body") == values


def test_folder_is_read_in_the_order_of_its_paths(tmp_path: Path) -> None:
    """Also: a README.md in a folder with tables is not a text."""
    contents = {name: name for name in ("a/deep/z.md", "a/y.txt", "a/README.md", "a.txt", "README.md")}
    ignored = dict.fromkeys(("image.png", ".hidden.txt", "notes.txt~", ".git/description.txt"), "no")
    for name, text in (contents | ignored).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    write_lines(tmp_path / "b" / "c.jsonl", {"text": "b1"}, {"text": "b2"})
    write_parquet(tmp_path / "c.parquet", ["c1"])
    assert texts(tmp_path) == ["a/README.md", "a/deep/z.md", "a/y.txt", "a.txt", "b1", "b2", "c1"]


@pytest.mark.parametrize("packing", [".gz", ".zst"])
@pytest.mark.parametrize("kind", [".txt", ".jsonl"])
def test_packed_files(tmp_path: Path, kind: str, packing: str) -> None:
    written = ["one", "zwei\n", "日本"] if kind == ".jsonl" else ["one\n" * 3000]
    plain = "".join(json.dumps({"text": text}) + "\n" for text in written) if kind == ".jsonl" else written[0]
    path = tmp_path / f"a{kind}{packing}"
    if packing == ".gz":
        path.write_bytes(gzip.compress(plain.encode()))
    else:
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.CompressedOutputStream(file, "zstd") as packed:
            packed.write(plain.encode())
    assert texts(path) == written
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DamagedFileError, match=rf"a\{kind}\{packing} is damaged"):
        texts(path)


def test_large_parquet_file_is_divided_between_row_groups(tmp_path: Path) -> None:
    values = [f"{number} " * 50 for number in range(20)]
    (file,) = find_files(str(write_parquet(tmp_path / "a.parquet", values)))
    parts = divide_file(file, "text", part_bytes=600)
    assert len(parts) > 3
    documents = [document for part in parts for document in read_part(part)]
    assert [document.text for document in documents] == values
    whole = sum(parts.values())
    assert divide_file(file, "text", part_bytes=whole) == {Part(file): whole}


# Long text files


@given(
    words=st.lists(
        st.sampled_from(["word ", "日本語", "line\n", "paragraph\n\n", "x" * 997, "\r\n \r\n"]), max_size=80
    ),
    repeat=st.integers(1, 60),
)
def test_pieces_of_a_long_file_join_to_the_file(
    tmp_path_factory: pytest.TempPathFactory, words: list[str], repeat: int
) -> None:
    path = tmp_path_factory.mktemp("long") / "a.txt"
    content = ("".join(words) * repeat).encode()
    path.write_bytes(content)
    documents = list(read_documents(path))
    assert all(document.damage is None for document in documents)
    assert "".join(document.text for document in documents).encode() == content
    lengths = [len(document.text.encode()) for document in documents]
    assert all(length <= LONGEST_PIECE_BYTES for length in lengths)
    assert all(length >= SHORTEST_PIECE_BYTES for length in lengths[:-1])
    if len(content) <= LONGEST_PIECE_BYTES:
        assert len(documents) == bool(content)


@pytest.mark.parametrize("end", ["\n\n", "\r\n\r\n", "\n \t\n", "\n", " "])
def test_long_file_is_cut_at_the_best_place(tmp_path: Path, end: str) -> None:
    (tmp_path / "a.txt").write_bytes((f"Some words.{end}" * 9000).encode())
    pieces = texts(tmp_path / "a.txt")
    assert len(pieces) > 4
    assert all(piece.endswith(end) for piece in pieces)
    assert all(0 <= len(piece) - SHORTEST_PIECE_BYTES < 20 for piece in pieces[:-1])


@pytest.mark.parametrize("character", ["x", "é", "日", "🙂"])
def test_long_file_is_cut_between_characters(tmp_path: Path, character: str) -> None:
    content = "a" + character * 30_000
    (tmp_path / "a.txt").write_bytes(content.encode())
    assert "".join(texts(tmp_path / "a.txt")) == content


# Text that can't be read


def damages(path: Path) -> list[str]:
    return [document.damage.replace(str(path), "F") for document in read_documents(path) if document.damage]


def test_bad_bytes_are_named_by_file_and_offset(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_bytes(b"good \xff bad")
    assert damages(text) == ["F is not UTF-8 at byte 5"]
    assert texts(text) == ["good \ufffd bad"]
    # Far into a long file: the offset counts from the file's beginning, and only one piece is damaged.
    text.write_bytes(b"line\n" * 20_000 + b"\xc3\x28" + b"line\n" * 20_000)
    assert damages(text) == ["F is not UTF-8 at byte 100,000"]


def test_bad_json_lines_are_named_by_line_and_offset(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'{"text": "one"}\n{"text": "tw\xe9"}\n{"text": tru\n[1]\n{"text": null}\n{"text": "\\ud800x"}\n'
        b'{"text": "\\ud83d\\ude42"}\n' + b"[" * 100_000 + b"\n" + b"9" * 5000 + b"\n"
    )
    assert texts(path) == ["one", "tw\ufffd", "", "", "", "\ufffdx", "🙂", "", ""]
    places = [(2, 28), (3, 32), (4, 45), (5, 49), (6, 64), (8, 109), (9, "100,110")]
    for damage, (line, byte) in zip(damages(path), places, strict=True):
        assert damage.startswith(f"F line {line} ")
        assert f"byte {byte}" in damage
    assert path.read_bytes()[28:29] == b"\xe9"


def test_bad_parquet_rows_are_named(tmp_path: Path) -> None:
    column = pyarrow.array([b"one", b"tw\xff", None, b"four"], pyarrow.binary())
    path = write_parquet(tmp_path / "a.parquet", column)
    assert texts(path) == ["one", "tw\ufffd", "", "four"]
    assert damages(path) == ["F row 2 is not UTF-8 at byte 2 of its text", "F row 3 holds no text in 'text'"]


def test_missing_column_lists_those_there_are(tmp_path: Path) -> None:
    for path in (
        write_lines(tmp_path / "a.jsonl", {"body": "x", "id": 1}),
        write_parquet(tmp_path / "a.parquet", ["x"], "body"),
    ):
        with pytest.raises(ValueError, match=rf"{path.name} .*'text'; .* --text-column: body, id"):
            texts(path)
    with pytest.raises(ValueError, match=r"a\.parquet holds int64, .*'id'"):
        texts(path, text_column="id")


def test_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", ["some text"] * 100)
    content = path.read_bytes()
    for damaged in (content[:-50], content[:4] + b"\xff" * 40 + content[44:]):
        path.write_bytes(damaged)
        with pytest.raises(DamagedFileError, match=r"a\.parquet is damaged"):
            texts(path)


def test_parquet_needs_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "a.parquet", ["x"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"pip install 'overnight\[data\]'"):
        texts(path)


def test_nothing_to_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.docx").write_text("x")
    with pytest.raises(ValueError, match=r"\.jsonl, \.json, \.parquet; .*\.zst\); there is 1 \.docx"):
        find_files(str(tmp_path))
    with pytest.raises(ValueError, match=r"a\.docx .*\.jsonl"):
        find_files(str(tmp_path / "a.docx"))


# Status and split


def test_split_of_a_document_never_changes() -> None:
    """It depends on the text alone, and these are written down."""
    digest = hashlib.blake2b("日本".encode(), digest_size=16).digest()
    assert b"".join(half.to_bytes(8) for half in document_hash("日本")) == digest
    sides = {text: split_of(text, 0.1) for text in TEXTS}
    held_out = [number for number, text in enumerate(TEXTS) if sides[text] == "validation"]
    assert held_out[:6] == [6, 7, 28, 35, 39, 53]
    shuffled = random.Random(0).sample(TEXTS, len(TEXTS) // 2)
    assert all(split_of(text, 0.1) == sides[text] for text in shuffled)


def test_validation_fraction_is_the_share_held_out() -> None:
    held_out: dict[float, set[str]] = {}
    records = np.zeros(len(TEXTS), dtype=RECORD)
    records["hash_high"] = [document_hash(text)[0] for text in TEXTS]
    for fraction in (0.01, 0.1, 0.5):
        sides = [split_of(text, fraction) == "validation" for text in TEXTS]
        assert is_validation(records, fraction).tolist() == sides
        # The standard deviation of a share of 4,000 is at most 0.8%.
        assert abs(sum(sides) / len(TEXTS) - fraction) < 0.03
        held_out[fraction] = {text for text, side in zip(TEXTS, sides, strict=True) if side}
    assert held_out[0.01] < held_out[0.1] < held_out[0.5]


def test_damaged_text_has_the_status_asked_for() -> None:
    bad = Document("tw\ufffd", damage="F is not UTF-8 at byte 7")
    documents = [Document("one"), bad, Document(""), Document("one")]
    for policy, status in (("skip", "skipped"), ("replace", "repaired")):
        found = [filtered.status for filtered in filter_documents(documents, policy)]
        assert found == ["kept", status, "empty", "kept"]
    with pytest.raises(ValueError, match="byte 7; .*--on-bad-text"):
        list(filter_documents(documents, "fail"))


OBJECTS = [{"data": {"text": f"Text {number}, ä."}, "n": number} for number in range(3)]
LINES = "".join(json.dumps(each) + "\n" for each in OBJECTS).encode()
MARK = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    "name, content",
    [
        *(("a.json", LINES), ("a.json.gz", gzip.compress(LINES, mtime=0)), ("a.jsonl", MARK + LINES)),
        *(
            ("a.json", MARK + json.dumps(OBJECTS).encode()),
            ("a.json", json.dumps(OBJECTS, indent=1).encode()),
            ("a.json", b"\r\n\n " + json.dumps(OBJECTS).encode()),
        ),
        ("a.JSON.gz", gzip.compress(json.dumps(OBJECTS, ensure_ascii=False).encode(), mtime=0)),
    ],
)
def test_json_lines_and_arrays_with_a_nested_column(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    (file,) = find_files(str(tmp_path))
    expected = [(each["data"]["text"], None) for each in OBJECTS]  # type: ignore[index]
    assert [tuple(each) for each in read_part(Part(file), "data.text")] == expected
    with pytest.raises(ValueError, match=r"(?i)a\.json.* has no column 'text'; .*: data, n"):
        list(read_part(Part(file)))
    with pytest.raises(ValueError, match="has no column 'body'; .*: text"):
        list(read_part(Part(file), "data.body"))


@pytest.mark.parametrize(
    "end, damage",
    [
        ("]", None),
        (",7]", "item 5 is not a JSON object"),
        ("", "item 5 is not JSON, or the array has no end"),
        (',{"text": ' + "1" * 5000 + "}]", "item 5 is not JSON"),
        ('{"text": "x"}]', "item 5 is not JSON"),
        (',,{"text": "x"}]', "item 5 is not JSON"),
        (",]", "item 5 is not JSON"),
        ('] [{"text": "lost"}]', "more after the end of its array"),
        ("]\x1a", "more after the end of its array"),
        ("] \n\n", None),
    ],
)
def test_array_is_read_in_parts_and_its_damage_is_found(tmp_path: Path, end: str, damage: str | None) -> None:
    sizes = [1, 200_000, 3, 70_000]
    path = tmp_path / "a.json"
    path.write_text("[" + ",".join(json.dumps({"text": "x" * size}) for size in sizes) + end)
    found = list(read_documents(path))
    assert [len(each.text) for each in found[:4]] == sizes
    assert [each.damage for each in found[:4]] == [None] * 4
    assert len(found) == 4 + (damage is not None)
    assert damage is None or damage in str(found[-1].damage)


def test_what_is_left_alone_is_counted_and_links_end(tmp_path: Path) -> None:
    source, outside = tmp_path / "source", tmp_path / "outside"
    for name, content in {
        **{"a/b.txt": "one", "a/c.csv": "x,y", "d.csv": "1234", "e.pdf": "", ".git/f.txt": "12", "g": "1"},
        **{"README.md": "a card", "h.jsonl": "{}\n", "settings.json": '{\n "a": 1\n}'},
        **{"one.json": '{"a": 1}', "../outside/i.txt": "i"},
    }.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(content)
    for link, target in (
        ("loop", source),
        ("again", source / "a"),
        ("far", outside),
        ("gone.txt", "nowhere"),
    ):
        (source / link).symlink_to(target)
    (outside / "back").symlink_to(source)
    found = list_files(str(source))
    assert [file.name for file in found.files] == ["a/b.txt", "far/i.txt", "h.jsonl"]
    assert found.left_alone == {
        **{".csv": [2, 7], ".pdf": [1, 0], "hidden": [1, 2], "without suffix": [1, 1]},
        **{"README.md of a dataset": [1, 6], ".json of one object": [2, 19], "broken link": [1, 0]},
    }


def test_parquet_with_two_columns_of_one_name_or_a_nested_one(tmp_path: Path) -> None:
    path = str(tmp_path / "a.parquet")
    parquet.write_table(pyarrow.table([["a"], ["b"]], names=["text", "text"]), path)
    (file,) = find_files(path)
    with pytest.raises(ValueError, match=r"a\.parquet has 2 columns 'text'"):
        list(read_part(Part(file)))
    parquet.write_table(pyarrow.table({"data": [{"text": "a", "n": 1}, {"text": "b", "n": 2}]}), path)
    assert [each.text for each in read_part(Part(file), "data.text")] == ["a", "b"]
    assert sum(divide_file(file, "data.text", 10**6).values()) > 0
