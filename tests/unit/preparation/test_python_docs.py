from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from overnight.preparation import sources
from overnight.preparation.documents import Document
from overnight.preparation.sources import library_files, python_documents


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return list(python_documents())


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


def test_it_is_about_two_megabytes_of_english(documents: list[Document]) -> None:
    text = "".join(document.text for document in documents)
    assert 1.5e6 < len(text.encode()) < 3.5e6
    assert 700 < len(documents) < 2500
    words = re.findall(r"[a-z]+", text.lower())
    assert 0.03 < words.count("the") / len(words) < 0.12
    assert not any(document.damage for document in documents)
    assert len({document.origin for document in documents}) == len(documents)


def test_it_holds_the_topics_and_the_docstrings(documents: list[Document]) -> None:
    by_origin = {document.origin: document.text for document in documents}
    from pydoc_data.topics import topics

    assert {origin for origin in by_origin if origin.startswith("topic")} == {
        f"topic {name}" for name in topics
    }
    assert by_origin["topic for"] == topics["for"]
    wrapped = by_origin["module textwrap"]
    assert wrapped.startswith("textwrap\n\nText wrapping and filling.\n\ntextwrap.wrap\n\n")
    assert "textwrap.dedent\n\nRemove any common leading whitespace from every line in `text`." in wrapped
    assert wrapped.index("textwrap.wrap\n") < wrapped.index("textwrap.dedent\n")
    assert by_origin["class textwrap.TextWrapper"].startswith("textwrap.TextWrapper\n\nObject for wrapping")
    assert "module json" in by_origin
    assert "module json.decoder" in by_origin


def test_tests_programs_and_what_is_of_one_machine_are_left_out(documents: list[Document]) -> None:
    paths = [path.as_posix() for path in library_files()]
    for fragment in ("/test/", "/tests/", "site-packages", "idlelib", "lib2to3", "_sysconfigdata", "config-"):
        assert not any(fragment in path for path in paths)
    text = "".join(document.text for document in documents)
    assert sys.prefix not in text or sys.prefix in {"/usr", "/usr/local"}


def test_the_order_is_that_of_the_names_not_of_the_disk(library: Path) -> None:
    names = [f"module_{letter}" for letter in "gdbfaec"]
    for name in names:
        (library / f"{name}.py").write_text(f'"""{name} {"x" * 200}."""\n')
    documents = list(python_documents())
    assert [document.origin for document in documents[2:]] == [f"module {name}" for name in sorted(names)]
    assert list(python_documents()) == documents


def test_nothing_is_imported(library: Path) -> None:
    (library / "bomb.py").write_text(
        '"""' + "Never import this. " * 20 + '"""\nraise SystemExit("imported")\n'
    )
    assert [document.origin for document in python_documents()] == ["topic if", "topic while", "module bomb"]


def test_docstrings_stand_in_source_order_under_their_dotted_names(library: Path) -> None:
    (library / "pack").mkdir()
    (library / "pack" / "__init__.py").write_text(
        f'"""Pack.\n\n    Indented.\n    {"x" * 200}\n    """\n'
        'def zeta():\n    """Last letter."""\n    def inner():\n        """In it."""\n'
        f'class Alpha:\n    """{"y" * 200}"""\n    async def run(self):\n        """It runs."""\n'
        'def eta():\n    """Another letter."""\n'
    )
    *_, module, of_class = python_documents()
    assert module.origin == "module pack"
    assert module.text == (
        f"pack\n\nPack.\n\nIndented.\n{'x' * 200}\n\n"
        "pack.zeta\n\nLast letter.\n\npack.zeta.inner\n\nIn it.\n\npack.eta\n\nAnother letter.\n"
    )
    assert of_class.origin == "class pack.Alpha"
    assert of_class.text == f"pack.Alpha\n\n{'y' * 200}\n\npack.Alpha.run\n\nIt runs.\n"


def test_a_python_without_sources_is_refused(library: Path) -> None:
    (library / "alpha.py").unlink()
    with pytest.raises(ValueError, match="came without the sources of its standard library"):
        library_files()


def test_topics_in_another_shape_are_refused(library: Path) -> None:
    (library / "pydoc_data" / "topics.py").write_text("from elsewhere import topics\n")
    with pytest.raises(ValueError, match="does not hold pydoc's topics"):
        list(python_documents())
