"""The text every Python carries: the language reference's topics and the standard library's docstrings.

About 2 MB of technical English, there without a network. The library's source files are parsed, never
imported. Another version of Python has other documents.
"""

from __future__ import annotations

import ast
import os
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from overnight.data.documents import Document

# Tests, bundled programs, what was installed later, and the topics (they are read as topics).
LEFT_OUT_FOLDERS = {
    *("test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "pydoc_data"),
    *("site-packages", "dist-packages", "__pycache__"),
}
# Written when this Python was built or installed: they differ from machine to machine.
LEFT_OUT_FILES = ("_sysconfigdata", "sitecustomize", "usercustomize")
SHORTEST_DOCUMENT_CHARACTERS = 200
Described = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def library_files() -> list[Path]:
    """The source files that the documents are made from: the topics, then the modules by their dotted names.

    Raises ValueError if this Python came without its sources.
    """
    library = library_folder()
    modules = []
    for folder, folders, names in os.walk(library):
        folders[:] = [name for name in folders if name not in LEFT_OUT_FOLDERS and "config-" not in name]
        kept = [name for name in names if name.endswith(".py") and not name.startswith(LEFT_OUT_FILES)]
        modules += [Path(folder, name) for name in kept]
    topics = library / "pydoc_data" / "topics.py"
    if not modules or not topics.is_file():
        raise ValueError(
            f"this Python came without the sources of its standard library ({library}): "
            "prepare a text file or a folder of your own instead of python-docs"
        )
    return [topics, *sorted(modules, key=_dotted_name)]


def library_folder() -> Path:
    """Where this Python keeps its standard library."""
    return Path(sysconfig.get_path("stdlib"))


def python_documents() -> Iterator[Document]:
    """Each topic, then each module without its classes and each class, their docstrings in source order."""
    topics, *modules = library_files()
    for name, text in _read_topics(topics).items():
        yield Document(text, f"topic {name}")
    for path in modules:
        for kind, name, node in _described_things(_parse(path), _dotted_name(path)):
            text = "\n\n".join(_described(node, name)) + "\n"
            if len(text) >= SHORTEST_DOCUMENT_CHARACTERS:
                yield Document(text, f"{kind} {name}")


def _described_things(module: ast.Module, name: str) -> Iterator[tuple[str, str, Described]]:
    """Kind, name and node of what makes a document: the module with its functions, then each class.

    A whole module would be too lumpy to split by: tkinter's text alone is a third of a held-out tenth.
    """
    classes = [node for node in module.body if isinstance(node, ast.ClassDef)]
    rest = [node for node in module.body if not isinstance(node, ast.ClassDef)]
    yield "module", name, ast.Module(rest, type_ignores=[])
    yield from (("class", f"{name}.{node.name}", node) for node in classes)


def _read_topics(path: Path) -> dict[str, str]:
    """The topics of `pydoc` by name: a file holding one dictionary of strings, read without running it."""
    for statement in _parse(path).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            topics = ast.literal_eval(statement.value)
            return {name: topics[name] for name in sorted(topics)}
    raise ValueError(f"{path} does not hold pydoc's topics; prepare a file or folder of your own instead")


def _described(node: Described, name: str) -> Iterator[str]:
    """A heading and a docstring for everything in `node` that has one, outermost first, in source order."""
    if docstring := ast.get_docstring(node):
        yield f"{name}\n\n{docstring}"
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _described(child, f"{name}.{child.name}")


def _parse(path: Path) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's own doubtful escapes are not our reader's business
        return ast.parse(path.read_bytes(), filename=str(path))


def _dotted_name(path: Path) -> str:
    parts = path.relative_to(library_folder()).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
