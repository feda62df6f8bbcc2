from __future__ import annotations

import builtins
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from overnight.data.text_files import DamagedFileError, find_files
from overnight.preparation.documents import (
    LONGEST_PIECE_BYTES,
    SHORTEST_PIECE_BYTES,
    Document,
    Part,
    divide_file,
    estimate_text_bytes,
    read_part,
)


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


# ---------------------------------------------------------------- kinds of files


@pytest.mark.parametrize("name", ["a.txt", "a.md", "A.TXT"])
def test_a_text_file_is_a_document_as_it_is(tmp_path: Path, name: str) -> None:
    text = "\ufeffOne line.\r\n\r\n\tÄnother – 日本.\n\n\n "
    (tmp_path / name).write_bytes(text.encode())
    (document,) = read_documents(tmp_path / name)
    assert (document.text, document.damage) == (text, None)
    assert name in document.origin


def test_json_lines(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "a.jsonl", {"text": "one\n\ntwo", "id": 1}, {"id": 2, "text": "日本"}, {"text": ""}
    )
    path.write_text(path.read_text().replace("\n", "\n\n", 1))  # a blank line is no document
    assert texts(path) == ["one\n\ntwo", "日本", ""]
    write_lines(path, {"body": "b", "text": "t"})
    assert texts(path, text_column="body") == ["b"]


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.binary()])
def test_parquet(tmp_path: Path, kind: pyarrow.DataType) -> None:
    values = ["one\n\ntwo", "日本", "", "four", "five"]
    path = write_parquet(tmp_path / "a.parquet", pyarrow.array([v.encode() for v in values], kind), "body")
    assert texts(path, text_column="body") == values


def test_a_parquet_file_of_the_corpus(shared_data: Path) -> None:
    path = shared_data / "corpus" / "validation.parquet"
    expected = parquet.read_table(path, columns=["text"]).column("text").to_pylist()
    assert texts(path) == expected
    (file,) = find_files(str(path))
    estimated = estimate_text_bytes(Part(file))
    assert 0.5 < estimated / sum(len(text.encode()) for text in expected) < 1.5


def test_a_folder_of_any_depth_is_read_in_the_order_of_its_paths(tmp_path: Path) -> None:
    write_lines(tmp_path / "b.jsonl", {"text": "b1"}, {"text": "b2"})
    (tmp_path / "a" / "deep").mkdir(parents=True)
    (tmp_path / "a" / "deep" / "z.md").write_text("a/deep/z")
    (tmp_path / "a" / "y.txt").write_text("a/y")
    write_parquet(tmp_path / "c.parquet", ["c1"])
    (tmp_path / "a.txt").write_text("a.txt")
    for ignored in ("image.png", ".hidden.txt", "notes.txt~"):
        (tmp_path / ignored).write_text("no")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "description.txt").write_text("no")
    assert texts(tmp_path) == ["a/deep/z", "a/y", "a.txt", "b1", "b2", "c1"]
    assert texts(tmp_path) == texts(tmp_path)


def pack(path: Path) -> Path:
    """The file packed beside itself, as .gz or .zst; itself removed."""
    content, unpacked = path.read_bytes(), path.with_suffix("")
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(content))
    else:
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.CompressedOutputStream(file, "zstd") as packed:
            packed.write(content)
    assert not unpacked.exists()
    return path


@pytest.mark.parametrize("packing", [".gz", ".zst"])
@pytest.mark.parametrize("kind", [".txt", ".jsonl"])
def test_packed_files_are_their_contents(tmp_path: Path, kind: str, packing: str) -> None:
    written = ["one", "zwei\n", "日本"] if kind == ".jsonl" else ["one\n" * 3000]
    path = tmp_path / f"a{kind}{packing}"
    path.write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in written) if kind == ".jsonl" else written[0]
    )
    assert texts(pack(path)) == written
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DamagedFileError, match=rf"a\{kind}\{packing} is damaged: "):
        texts(path)


def test_a_large_parquet_file_is_divided_between_row_groups(tmp_path: Path) -> None:
    values = [f"{number} " * 50 for number in range(20)]
    (file,) = find_files(str(write_parquet(tmp_path / "a.parquet", values)))
    parts = divide_file(file, "text", part_bytes=600)
    assert len(parts) > 3
    assert [text for part in parts for text in (d.text for d in read_part(part))] == values
    origins = [document.origin for part in parts for document in read_part(part)]
    assert origins == [f"a.parquet, row {number}" for number in range(1, 21)]
    whole = estimate_text_bytes(Part(file))
    assert sum(estimate_text_bytes(part) for part in parts) == whole
    assert divide_file(file, "text", part_bytes=10 * whole) == [Part(file)]


def test_a_readme_beside_tables_tells_of_them_and_is_no_text(tmp_path: Path) -> None:
    write_lines(tmp_path / "tables" / "train" / "a.jsonl", {"text": "a"})
    for folder in ("tables", "notes"):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "README.md").write_text(folder)
        (tmp_path / folder / "more.md").write_text(f"more {folder}")
    assert texts(tmp_path) == ["notes", "more notes", "more tables", "a"]


# ---------------------------------------------------------------- long text files


@given(
    words=st.lists(
        st.sampled_from(["word ", "日本語", "line\n", "paragraph\n\n", "x" * 997, "\r\n \r\n"]), max_size=80
    ),
    repeat=st.integers(1, 60),
)
def test_the_pieces_of_a_long_file_join_to_the_file(
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


@pytest.mark.parametrize(
    "line,end",
    [
        ("Some words.\n\n", "\n\n"),
        ("Some words.\r\n\r\n", "\r\n\r\n"),
        ("Some words.\n \t\n", "\n \t\n"),
        ("Some words.\n", "\n"),
        ("Some words. ", " "),
    ],
)
def test_a_long_file_is_cut_at_the_best_place_there_is(tmp_path: Path, line: str, end: str) -> None:
    (tmp_path / "a.txt").write_bytes((line * 9000).encode())
    pieces = texts(tmp_path / "a.txt")
    assert len(pieces) > 4
    assert all(piece.endswith(end) for piece in pieces)
    assert {len(piece) for piece in pieces[:-1]} <= set(
        range(SHORTEST_PIECE_BYTES, SHORTEST_PIECE_BYTES + 20)
    )


def test_a_file_with_no_place_to_cut_is_cut_between_characters(tmp_path: Path) -> None:
    for character in "x", "é", "日", "🙂":
        content = ("a" + character * 30_000).encode()
        (tmp_path / "a.txt").write_bytes(content)
        pieces = texts(tmp_path / "a.txt")
        assert "\ufffd" not in "".join(pieces)
        assert "".join(pieces).encode() == content


# ---------------------------------------------------------------- text that can't be read


def damages(path: Path) -> list[str]:
    return [document.damage.replace(str(path), "F") for document in read_documents(path) if document.damage]


def test_bad_bytes_are_named_by_file_and_offset(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_bytes(b"good \xff bad")
    assert damages(text) == ["F is not UTF-8 at byte 5"]
    (document,) = read_documents(text)
    assert document.text == "good \ufffd bad"
    # Far into a long file: the offset counts from the file's beginning, and only one piece is unsound.
    text.write_bytes(b"line\n" * 20_000 + b"\xc3\x28" + b"line\n" * 20_000)
    assert damages(text) == ["F is not UTF-8 at byte 100,000"]


def test_bad_json_lines_are_named_by_line_and_offset(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'{"text": "one"}\n{"text": "tw\xe9"}\n{"text": tru\n[1]\n{"text": null}\n{"text": "\\ud800x"}\n'
        b'{"text": "\\ud83d\\ude42"}\n' + b"[" * 100_000 + b"\n"
    )
    documents = list(read_documents(path))
    assert [document.text for document in documents] == ["one", "tw\ufffd", "", "", "", "\ufffdx", "🙂", ""]
    assert damages(path) == [
        "F line 2 is not UTF-8 at byte 28",
        "F line 3 (byte 32) is not JSON",
        "F line 4 (byte 45) is not a JSON object with named fields",
        "F line 5 (byte 49) holds no text in 'text'",
        "F line 6 (byte 64) is not UTF-8: it escapes half a surrogate pair",
        "F line 8 (byte 109) is not JSON",
    ]
    assert path.read_bytes()[28:29] == b"\xe9"


def test_bad_parquet_rows_are_named(tmp_path: Path) -> None:
    column = pyarrow.array([b"one", b"tw\xff", None, b"four"], pyarrow.binary())
    path = write_parquet(tmp_path / "a.parquet", column)
    assert texts(path) == ["one", "tw\ufffd", "", "four"]
    assert damages(path) == ["F row 2 is not UTF-8 at byte 2 of its text", "F row 3 holds no text in 'text'"]


# ---------------------------------------------------------------- refusals


def test_a_missing_column_lists_those_there_are(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"body": "x", "id": 1})
    with pytest.raises(ValueError, match=r"a\.jsonl line 1 has no column 'text'; .* --text-column: body, id"):
        texts(path)
    path = write_parquet(tmp_path / "a.parquet", ["x"], "body")
    with pytest.raises(ValueError, match=r"a\.parquet has no column 'text'; .* --text-column: body, id"):
        texts(path)
    with pytest.raises(ValueError, match=r"a\.parquet holds int64, not text, in its column 'id'"):
        texts(path, text_column="id")


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", ["some text"] * 100)
    content = path.read_bytes()
    path.write_bytes(content[:-50])
    with pytest.raises(ValueError, match=r"a\.parquet is damaged or is not a Parquet file"):
        texts(path)
    path.write_bytes(content[:4] + b"\xff" * 40 + content[44:])
    with pytest.raises(ValueError, match=r"a\.parquet is damaged after row 0"):
        texts(path)


def test_parquet_without_pyarrow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_parquet(tmp_path / "a.parquet", ["x"])
    real_import = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real_import(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ValueError, match=r"pip install 'overnight\[data\]'"):
        texts(path)


def test_nothing_to_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"holds no file that can be read \(\.txt, \.md, \.jsonl, \.parquet; packed: \.gz, \.zst\)",
    ):
        find_files(str(tmp_path))
    (tmp_path / "a.docx").write_text("x")
    with pytest.raises(ValueError, match="holds no file that can be read"):
        find_files(str(tmp_path))
    with pytest.raises(ValueError, match=r"a\.docx is not a kind of file that can be read"):
        find_files(str(tmp_path / "a.docx"))
