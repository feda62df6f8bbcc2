from __future__ import annotations

import http.client
import io
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow
import pytest
from pyarrow import parquet

from overnight.data.text_files import TextFile, hash_files
from overnight.preparation import sources
from overnight.preparation.documents import Document, Part
from overnight.preparation.sources import (
    SHAKESPEARE_BYTES,
    SHAKESPEARE_SHA256,
    Source,
    open_source,
    read_parts,
    source_name,
)
from overnight.run_directory import cache_folder


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_folder()


@pytest.fixture
def shakespeare(shared_data: Path) -> Path:
    return shared_data / "shakespeare" / "input.txt"


def answer_with(monkeypatch: pytest.MonkeyPatch, answer: bytes | Exception) -> list[str]:
    """Put `answer` in the place of the network; the addresses asked for."""
    asked: list[str] = []

    def urlopen(url: str, timeout: float) -> io.BytesIO:
        asked.append(url)
        if isinstance(answer, Exception):
            raise answer
        return io.BytesIO(answer)

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return asked


def documents_of(source: Source) -> list[Document]:
    return list(read_parts([Part(file) for file in source.files], "text"))


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("books.v2").mkdir()
    Path("notes.txt").write_text("x")
    Path("shakespeare").mkdir()
    assert source_name("python-docs") == "python-docs"
    assert source_name("books.v2") == source_name("./books.v2/") == "books.v2"
    assert source_name(str(tmp_path / "notes.txt")) == "notes"
    assert source_name("./shakespeare") == "shakespeare"
    Path("a.b.jsonl.zst").write_text("x")
    assert source_name("a.b.jsonl.zst") == "a.b"
    assert source_name("s3://bucket/books/") == "books"
    assert source_name("hf://datasets/owner/name/part.parquet") == "part"
    assert source_name(".") == tmp_path.name


@pytest.mark.parametrize(
    "source,message",
    [
        ("shakespear", r"'shakespear' is no file or folder, nor a source .*; did you mean shakespeare\?"),
        ("python_docs", r"did you mean python-docs\?"),
        ("texts.jsonl", r"'texts.jsonl' is no file or folder, .*; there is fineweb-edu, openwebtext, python"),
        ("data/x", r"nothing lies at data/x; .*`overnight prepare SOURCE --out data/x`, and the recipe's"),
    ],
)
def test_an_unknown_source_gets_the_nearest_name(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_source(source)


def test_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("bb")
    (tmp_path / "a.txt").write_text("a")
    source = open_source(str(tmp_path))
    assert [document.text for document in documents_of(source)] == ["a", "bb"]
    assert (source.name, source.licence) == (tmp_path.name, "not stated")
    with pytest.raises(ValueError, match="from_file is for a source that is downloaded"):
        open_source(str(tmp_path), from_file="x")


ELSEWHERE = """
import sys
from overnight.preparation.sources import open_source
opened = open_source(sys.argv[1])
print(ascii([opened.name, opened.sha256, [file.name for file in opened.files]]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a name must be UTF-8")
def test_names_that_the_locale_can_not_read_are_the_same(tmp_path: Path) -> None:
    """C without Python's UTF-8: names arrive as surrogates, which nothing can encode."""
    folder = tmp_path / "Texte-中"
    folder.mkdir()
    for name in ("Äpfel.txt", "zebra.txt", "中.txt", os.fsdecode(b"not-\xff-utf8.txt")):
        (folder / name).write_text("a text")
    said = []
    for variables in ({}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}):
        done = subprocess.run(
            [sys.executable, "-c", ELSEWHERE, str(folder)],
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            check=False,
        )
        assert not done.returncode, done.stderr
        said.append(done.stdout)
    assert said[0] == said[1]
    assert ascii(["not-\\xff-utf8.txt", "zebra.txt", "Äpfel.txt", "中.txt"]) in said[0]


def test_the_hash_is_of_names_and_contents_and_not_of_the_place(tmp_path: Path) -> None:
    def hash_of(**contents: str) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for name, content in contents.items():
            (folder / name).write_text(content)
        return hash_files(
            TextFile(str(path), path.name, path.stat().st_size) for path in sorted(folder.iterdir())
        )

    first = hash_of(a="x", b="y")
    assert hash_of(a="x", b="y") == first
    assert (
        len({first, hash_of(a="x", b="z"), hash_of(a="x", c="y"), hash_of(a="xy"), hash_of(a="y", b="x")})
        == 5
    )


def test_python_docs_are_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(sources, "python_documents", lambda: calls.append(1) or iter(["document"]))
    sources._python_docs.cache_clear()
    source = open_source("python-docs")
    assert calls == []
    parts = [Part(file) for file in source.files]
    assert list(read_parts(parts, "text")) == list(read_parts(parts, "text")) == ["document"]
    assert calls == [1]
    sources._python_docs.cache_clear()
    assert source.licence == "PSF-2.0"


# ---------------------------------------------------------------- elsewhere


@pytest.fixture
def store() -> Iterator[Any]:
    """Fsspec's file system in memory stands for every place that is not this machine."""
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()


def test_a_folder_elsewhere_is_read_as_one_here(store: Any, tmp_path: Path) -> None:
    contents = {"b/x.jsonl": '{"text": "two"}\n', "a.txt": "one", ".hidden.txt": "no", "c.png": "no"}
    for name, content in contents.items():
        store.pipe(f"/books/{name}", content.encode())
        (tmp_path / "books" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "books" / name).write_text(content)
    parquet.write_table(pyarrow.table({"text": ["three", "four"]}), tmp_path / "books" / "z.parquet")
    store.pipe("/books/z.parquet", (tmp_path / "books" / "z.parquet").read_bytes())
    there, here = open_source("memory://books"), open_source(str(tmp_path / "books"))
    assert [document.text for document in documents_of(there)] == ["one", "two", "three", "four"]
    assert [document.text for document in documents_of(here)] == ["one", "two", "three", "four"]
    assert there.name == here.name == "books"
    single = open_source("memory://books/a.txt")
    assert [document.text for document in documents_of(single)] == ["one"]


def test_a_changed_file_elsewhere_is_another_source(store: Any) -> None:
    store.pipe("/books/a.txt", b"one")
    before = open_source("memory://books").sha256
    assert open_source("memory://books").sha256 == before
    store.pipe("/books/a.txt", b"two")
    assert open_source("memory://books").sha256 != before


def test_a_store_that_refuses_is_a_sentence(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class NoCredentialsError(Exception):
        """Of no kind that Python knows."""

    def refuse(*_: Any, **__: Any) -> None:
        raise NoCredentialsError("no credentials")

    store.pipe("/books/a.txt", b"one")
    source = open_source("memory://books")
    monkeypatch.setattr(type(store), "open", refuse)
    with pytest.raises(ValueError, match=r"memory://.*a\.txt can't be opened: no credentials"):
        documents_of(source)
    monkeypatch.setattr(type(store), "find", refuse)
    with pytest.raises(ValueError, match="memory://books can't be listed: no credentials"):
        open_source("memory://books")


def test_nothing_elsewhere_is_refused(store: Any) -> None:
    with pytest.raises(ValueError, match="memory://none holds no file that can be read"):
        open_source("memory://none")
    with pytest.raises(ValueError, match="gopher://"):
        open_source("gopher://books")


def test_the_named_ones_lie_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def find(address: str) -> list[TextFile]:
        asked.append(address)
        return [TextFile(f"{address}/000.parquet", "000.parquet", 10, "etag")]

    monkeypatch.setattr(sources, "find_files", find)
    assert open_source("fineweb-edu").licence == "ODC-BY 1.0"
    open_source("fineweb-edu", subset="sample-100BT")
    open_source("openwebtext")
    assert asked == [
        "hf://datasets/HuggingFaceFW/fineweb-edu/sample/10BT",
        "hf://datasets/HuggingFaceFW/fineweb-edu/sample/100BT",
        "hf://datasets/Skylion007/openwebtext@refs/convert/parquet/plain_text",
    ]
    with pytest.raises(ValueError, match=r"has no subset sample-10B; did you mean sample-10BT\?"):
        open_source("fineweb-edu", subset="sample-10B")
    with pytest.raises(ValueError, match="subset=default is for fineweb-edu, and openwebtext has none"):
        open_source("openwebtext", subset="default")


def test_without_a_network_it_is_said_what_to_fetch(monkeypatch: pytest.MonkeyPatch) -> None:
    def find(address: str) -> list[TextFile]:
        raise ValueError(f"{address} can't be listed: no route")

    monkeypatch.setattr(sources, "find_files", find)
    message = r"fineweb-edu could not be reached .*huggingface\.co/datasets/HuggingFaceFW/.*prepare FOLDER"
    with pytest.raises(ValueError, match=message):
        open_source("fineweb-edu")


# ---------------------------------------------------------------- shakespeare


def test_shakespeare_from_a_file(
    shakespeare: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = answer_with(monkeypatch, AssertionError("no network"))
    copy = tmp_path / "copy"  # whatever it is called
    copy.write_bytes(shakespeare.read_bytes())
    source = open_source("shakespeare", from_file=str(copy))
    documents = documents_of(source)
    assert "".join(document.text for document in documents).encode() == shakespeare.read_bytes()
    assert 90 < len(documents) < 120
    assert all(document.text.endswith("\n\n") for document in documents[:-1])
    assert source.sha256 == SHAKESPEARE_SHA256
    assert [file.bytes for file in source.files] == [SHAKESPEARE_BYTES]
    copy.unlink()
    assert documents_of(open_source("shakespeare")) == documents  # kept: `train` can't be given a file
    assert asked == []


def test_shakespeare_is_downloaded_once(
    shakespeare: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = answer_with(monkeypatch, shakespeare.read_bytes())
    first = open_source("shakespeare")
    assert open_source("shakespeare").sha256 == first.sha256
    assert asked == [sources.SHAKESPEARE_URL]
    kept = [path for path in empty_cache.rglob("*") if path.is_file()]
    assert [path.read_bytes() for path in kept] == [shakespeare.read_bytes()]


def test_a_damaged_copy_in_the_cache_is_fetched_again(
    shakespeare: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = answer_with(monkeypatch, shakespeare.read_bytes())
    open_source("shakespeare")
    (empty_cache / "shakespeare" / "input.txt").write_bytes(shakespeare.read_bytes()[:-1])
    documents = documents_of(open_source("shakespeare"))
    assert "".join(document.text for document in documents).encode() == shakespeare.read_bytes()
    assert len(asked) == 2


@pytest.mark.parametrize(
    "failure",
    [
        urllib.error.URLError("no route"),
        TimeoutError("slow"),
        http.client.IncompleteRead(b"half"),
        ConnectionResetError(),
        http.client.BadStatusLine("?"),
    ],
)
def test_offline_says_what_to_fetch(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    answer_with(monkeypatch, failure)
    with pytest.raises(
        ValueError,
        match=r"could not be .*fetch https://.*input\.txt .*`overnight prepare shakespeare --from-file FILE`",
    ):
        open_source("shakespeare")
    assert not empty_cache.exists()


@pytest.mark.parametrize(
    "change", [lambda text: text[:-1], lambda text: text[:50] + b"#" + text[51:], lambda text: text * 2]
)
def test_a_wrong_answer_is_never_kept(
    shakespeare: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch, change: Any
) -> None:
    answer_with(monkeypatch, change(shakespeare.read_bytes()))
    with pytest.raises(ValueError, match="what was downloaded as shakespeare is not the published file"):
        open_source("shakespeare")
    assert not empty_cache.exists()


def test_a_wrong_file_is_refused(tmp_path: Path, empty_cache: Path) -> None:
    (tmp_path / "other.txt").write_text("To be or not to be")
    with pytest.raises(ValueError, match=r"other\.txt is not tiny shakespeare as it is published"):
        open_source("shakespeare", from_file=str(tmp_path / "other.txt"))
    with pytest.raises(ValueError, match=r"from_file: there is no file .*absent\.txt"):
        open_source("shakespeare", from_file=str(tmp_path / "absent.txt"))
    assert not empty_cache.exists()
