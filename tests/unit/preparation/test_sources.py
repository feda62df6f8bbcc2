from __future__ import annotations

import http.client
import io
import os
import re
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

from overnight.data.text_files import TextFile
from overnight.files import cache_path
from overnight.preparation import sources
from overnight.preparation.documents import Document, Part
from overnight.preparation.sources import (
    SHAKESPEARE_BYTES,
    SHAKESPEARE_SHA256,
    Source,
    library_files,
    open_source,
    parse_python_docs,
    python_texts,
    read_parts,
    source_name,
    without_repetitions,
)


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_path()


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


def test_source_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("books.v2", "shakespeare"):
        Path(folder).mkdir()
    for file in ("notes.txt", "a.b.jsonl.zst"):
        Path(file).touch()
    for source, name in {
        **{"python-docs": "python-docs", "./shakespeare": "shakespeare", ".": tmp_path.name},
        **{"books.v2": "books.v2", "./books.v2/": "books.v2", "a.b.jsonl.zst": "a.b"},
        **{str(tmp_path / "notes.txt"): "notes", "s3://bucket/books/": "books"},
        "hf://datasets/owner/name/part.parquet": "part",
    }.items():
        assert source_name(source) == name


@pytest.mark.parametrize(
    "source,part",
    [
        ("shakespear", r"did you mean shakespeare\?"),
        ("python_docs", r"did you mean python-docs\?"),
        ("texts.jsonl", "'texts.jsonl' .*openwebtext"),
        ("data/x", "overnight prepare SOURCE --out data/x"),
    ],
)
def test_unknown_source_is_refused(source: str, part: str) -> None:
    with pytest.raises(ValueError, match=part):
        open_source(source)


ELSEWHERE = """
import sys
from overnight.preparation.sources import open_source
opened = open_source(sys.argv[1])
print(ascii([opened.name, opened.sha256, [file.name for file in opened.files]]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a name must be UTF-8")
def test_locale_does_not_change_names(tmp_path: Path) -> None:
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


def test_hash_is_of_names_and_contents(tmp_path: Path) -> None:
    def hash_of(**contents: str) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for name, content in contents.items():
            (folder / f"{name}.txt").write_text(content)
        return open_source(str(folder)).sha256

    first = hash_of(a="x", b="y")
    assert hash_of(a="x", b="y") == first  # of another folder
    others = [hash_of(a="x", b="z"), hash_of(a="x", c="y"), hash_of(a="xy"), hash_of(a="y", b="x")]
    assert len({first, *others}) == 5


# elsewhere


@pytest.fixture
def store() -> Iterator[Any]:
    """Fsspec's file system in memory stands for every place that is not this machine."""
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()


def test_remote_folder_equals_local_folder(store: Any, tmp_path: Path) -> None:
    contents = {"b/x.jsonl": '{"text": "two"}\n', "a.txt": "one", ".hidden.txt": "no", "c.png": "no"}
    for name, content in contents.items():
        store.pipe(f"/books/{name}", content.encode())
        (tmp_path / "books" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "books" / name).write_text(content)
    parquet.write_table(pyarrow.table({"text": ["three", "four"]}), tmp_path / "books" / "z.parquet")
    store.pipe("/books/z.parquet", (tmp_path / "books" / "z.parquet").read_bytes())
    there, here = open_source("memory://books"), open_source(str(tmp_path / "books"))
    for source in (there, here):
        assert [document.text for document in documents_of(source)] == ["one", "two", "three", "four"]
        assert (source.name, source.licence) == ("books", "not stated")
    assert open_source("memory://books").sha256 == there.sha256
    store.pipe("/books/a.txt", b"changed")
    assert open_source("memory://books").sha256 != there.sha256
    assert [document.text for document in documents_of(open_source("memory://books/a.txt"))] == ["changed"]


def test_refusal_of_a_store_is_a_sentence(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class NoCredentialsError(Exception):
        """Of no kind that Python knows."""

    def refuse(*_: Any, **__: Any) -> None:
        raise NoCredentialsError("no credentials")

    with pytest.raises(ValueError, match="memory://books"):
        open_source("memory://books")  # holds nothing
    store.pipe("/books/a.txt", b"one")
    source = open_source("memory://books")
    monkeypatch.setattr(type(store), "open", refuse)
    with pytest.raises(ValueError, match=r"memory://.*a\.txt .*no credentials"):
        documents_of(source)
    monkeypatch.setattr(type(store), "find", refuse)
    with pytest.raises(ValueError, match="memory://books .*no credentials"):
        open_source("memory://books")
    with pytest.raises(ValueError, match="gopher:"):
        open_source("gopher://books")


def test_named_sources_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
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
    with pytest.raises(ValueError, match=r"did you mean sample-10BT\?"):
        open_source("fineweb-edu", subset="sample-10B")
    with pytest.raises(ValueError, match="subset=default"):
        open_source("openwebtext", subset="default")

    def refuse(address: str) -> list[TextFile]:
        raise ValueError("no route")

    monkeypatch.setattr(sources, "find_files", refuse)
    with pytest.raises(ValueError, match=r"no route.*huggingface\.co/datasets/.*prepare FOLDER"):
        open_source("fineweb-edu")


def test_more_is_held_out_of_a_small_text() -> None:
    for size, share in ((10_000, 0.2), (300_000, 0.2), (1_000_000, 0.1), (10_000_000, 0.01), (10**12, 0.01)):
        assert sources.share_held_out([TextFile("a.txt", "a.txt", size)]) == share


# shakespeare


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


def test_shakespeare_is_downloaded_once_or_if_damaged(
    shakespeare: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = shakespeare.read_bytes()
    asked = answer_with(monkeypatch, content)
    assert open_source("shakespeare") == open_source("shakespeare")
    assert asked == [sources.SHAKESPEARE_URL]
    (kept,) = [path for path in empty_cache.rglob("*") if path.is_file()]
    assert kept.read_bytes() == content
    kept.write_bytes(content[:-1])
    documents = documents_of(open_source("shakespeare"))
    assert "".join(document.text for document in documents).encode() == content
    assert len(asked) == 2


FAILURES = [urllib.error.URLError("no route"), TimeoutError("slow"), http.client.IncompleteRead(b"half")]
CHANGES: list[Any] = [lambda text: text[:-1], lambda text: b"#" + text[1:], lambda text: text * 2]


@pytest.mark.parametrize("answer", [*FAILURES, *CHANGES])
def test_failed_download_names_the_remedy(
    shakespeare: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch, answer: Any
) -> None:
    is_failure = isinstance(answer, Exception)
    answer_with(monkeypatch, answer if is_failure else answer(shakespeare.read_bytes()))
    with pytest.raises(ValueError, match=r"https://.*input\.txt .*shakespeare --from-file"):
        open_source("shakespeare")
    assert not empty_cache.exists()


def test_from_file_is_the_published_file(tmp_path: Path, empty_cache: Path) -> None:
    (tmp_path / "other.txt").write_text("To be or not to be")
    for source, name, part in (
        *(("shakespeare", "other.txt", r"other\.txt"), ("shakespeare", "absent", "absent")),
        ("python-docs", "other.txt", "from_file"),
    ):
        with pytest.raises(ValueError, match=part):
            open_source(source, from_file=str(tmp_path / name))
    assert not empty_cache.exists()


# Python's documentation


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return list(parse_python_docs())


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small library in the place of Python's."""
    (tmp_path / "pydoc_data").mkdir()
    (tmp_path / "pydoc_data" / "topics.py").write_text(
        "topics = {'while': 'The while loop.', 'if': 'The if.'}\n"
    )
    (tmp_path / "alpha.py").write_text('"""Alpha."""\n')
    monkeypatch.setattr(sources, "library_folder", lambda: tmp_path)
    return tmp_path


def test_python_docs_are_two_megabytes_of_english(documents: list[Document]) -> None:
    text = "".join(document.text for document in documents)
    assert 1.5e6 < len(text.encode()) < 3.5e6
    assert 700 < len(documents) < 2500
    words = re.findall(r"[a-z]+", text.lower())
    assert 0.03 < words.count("the") / len(words) < 0.12
    assert not any(document.damage for document in documents)


def test_python_docs_hold_topics_and_docstrings(documents: list[Document]) -> None:
    from pydoc_data.topics import topics

    texts = [*python_texts()]
    assert texts[: len(topics)] == [topics[name] for name in sorted(topics)]
    by_heading = {text.partition("\n")[0]: text for text in texts[len(topics) :]}
    assert len(by_heading) == len(texts) - len(topics)
    left_out = {*texts} - {document.text for document in documents}
    assert {topics["try"], topics["function"], topics["attribute-access"]} <= left_out, "in longer topics"
    assert len(left_out) < len(texts) / 20
    wrapped = by_heading["textwrap"]
    assert wrapped.startswith("textwrap\n\nText wrapping and filling.\n\ntextwrap.wrap\n\n")
    assert "textwrap.dedent\n\nRemove any common leading whitespace from every line in `text`." in wrapped
    assert by_heading["textwrap.TextWrapper"].startswith("textwrap.TextWrapper\n\nObject for wrapping")
    assert {"json", "json.decoder"} <= {*by_heading}


def test_python_docs_leave_out_what_differs_by_machine(documents: list[Document]) -> None:
    paths = " ".join(path.as_posix() for path in library_files())
    assert not re.search("/tests?/|site-packages|idlelib|lib2to3|_sysconfigdata|config-", paths)
    text = "".join(document.text for document in documents)
    assert sys.prefix not in text or sys.prefix in {"/usr", "/usr/local"}


def test_python_docs_are_in_the_order_of_names_and_import_nothing(library: Path) -> None:
    names = [f"module_{letter}" for letter in "gdbfaec"]
    for name in names:
        (library / f"{name}.py").write_text(f'"""{name} {"x" * 200}."""\nraise SystemExit("imported")\n')
    texts = list(python_texts())
    assert [text.partition("\n")[0] for text in texts] == ["The if.", "The while loop.", *sorted(names)]
    assert list(python_texts()) == texts


def test_docstrings_are_in_source_order(library: Path) -> None:
    (library / "pack").mkdir()
    (library / "pack" / "__init__.py").write_text(
        f'"""Pack.\n\n    Indented.\n    {"x" * 200}\n    """\n'
        'def zeta():\n    """Last letter."""\n    def inner():\n        """In it."""\n'
        f'class Alpha:\n    """{"y" * 200}"""\n    async def run(self):\n        """It runs."""\n'
        'def eta():\n    """Another letter."""\n'
    )
    *_, module, of_class = python_texts()
    assert module == (
        f"pack\n\nPack.\n\nIndented.\n{'x' * 200}\n\n"
        "pack.zeta\n\nLast letter.\n\npack.zeta.inner\n\nIn it.\n\npack.eta\n\nAnother letter.\n"
    )
    assert of_class == f"pack.Alpha\n\n{'y' * 200}\n\npack.Alpha.run\n\nIt runs.\n"


def test_text_that_stands_in_longer_ones_is_left_out() -> None:
    section, other = "Section\n\nAbout it.", "Something else\n\nentirely."
    chapter = f"Chapter\n\n{section}\n\nAnd more of it."
    assert without_repetitions([section, chapter, other]) == [chapter, other]
    half_new = f"About it.\n\n{'new ' * 9}"
    assert without_repetitions([half_new, chapter]) == [half_new, chapter]


def test_python_without_sources_is_refused(library: Path) -> None:
    (library / "pydoc_data" / "topics.py").write_text("from elsewhere import topics\n")
    with pytest.raises(ValueError, match="topics"):
        list(python_texts())
    (library / "alpha.py").unlink()
    with pytest.raises(ValueError, match="sources of its standard library"):
        library_files()
