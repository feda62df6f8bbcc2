"""Sources of text: named sources, any file or folder, any URL that fsspec reads.

`python-docs` needs no network, `shakespeare` is downloaded once and kept in the user's cache, `fineweb-edu`
and `openwebtext` are read from Hugging Face's hub.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import http.client
import itertools
import math
import os
import sysconfig
import urllib.request
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from overnight.config import nearest
from overnight.data.text_files import (
    TextFile,
    as_utf8,
    find_files,
    hash_files,
    is_remote,
    list_files,
    plain_name,
)
from overnight.files import cache_path, write_atomically
from overnight.preparation.documents import PACKED_TEXT_BYTES, Document, Part, read_part
from overnight.terminal import echo, progress, shell_command

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_BYTES = 1_115_394
SHAKESPEARE_REMEDY = (
    f"fetch {SHAKESPEARE_URL} by other means, then run `overnight prepare shakespeare --from-file FILE` once"
)
DOWNLOAD_TIMEOUT_SECONDS = 60
FEWEST_HELD_OUT_BYTES = 100_000  # of the text of a source whose share is not given

FINEWEB_EDU = "hf://datasets/HuggingFaceFW/fineweb-edu"
FINEWEB_EDU_SUBSETS = {
    "sample-10BT": "sample/10BT",
    "sample-100BT": "sample/100BT",
    "sample-350BT": "sample/350BT",
    "default": "data",
}
# The hub's own export: the repository's script is refused by today's libraries (nanoGPT, issue 633).
OPENWEBTEXT = "hf://datasets/Skylion007/openwebtext@refs/convert/parquet/plain_text"
HUB_LICENCES = {
    "fineweb-edu": "ODC-BY 1.0",
    "openwebtext": "CC0 1.0 (the packaging; the texts are their authors')",
}

PYTHON_DOCS = TextFile("python-docs", "python-docs", 2_300_000)  # CPython 3.11's, as text
PYTHON_DOCS_RULES = 2  # raised when other documents are made of the same library
NAMED_SOURCES = ("python-docs", "shakespeare", "fineweb-edu", "openwebtext")


@dataclass(frozen=True)
class Source:
    """Text that can be read as often as needed."""

    name: str
    """Default name of the prepared folder."""
    licence: str
    sha256: str
    """Hash of the names and contents of the files: equal hashes mean equal documents. "" if unknown."""
    validation_fraction: float
    """Share of the documents held out; by default larger for small sources."""
    files: tuple[TextFile, ...]
    """The files in reading order."""
    files_left_alone: dict[str, list[int]] = field(default_factory=dict)
    """Kind of the files that are not read -> [number, bytes]."""


def source_name(source: str, subset: str | None = None) -> str:
    """The name of a source: its own, or that of the file or folder. Reads nothing.

    A named source comes before a file of the same name; `./shakespeare` is the file. Raises ValueError
    if `source` is neither.
    """
    if subset is not None and source != "fineweb-edu":
        raise ValueError(f"subset={subset} is for fineweb-edu, and {source} has none: leave it out")
    if subset is not None and subset not in FINEWEB_EDU_SUBSETS:
        raise ValueError(f"fineweb-edu has no subset {subset}{nearest(subset, FINEWEB_EDU_SUBSETS)}")
    if source in NAMED_SOURCES:
        return source
    if is_remote(source):
        return plain_name(PurePosixPath(source.rstrip("/")).name)
    path = Path(source)
    if not path.exists() and os.sep in source:
        raise ValueError(
            f"{source} is neither a file nor a folder; what a recipe trains on is prepared first, with "
            f"`{shell_command('prepare', 'SOURCE', '--out', source)}`, and the recipe's first lines "
            "show the command"
        )
    if not path.exists():
        raise ValueError(
            f"{source!r} is neither a file, nor a folder, nor a named source{nearest(source, NAMED_SOURCES)}"
        )
    return plain_name(path.name) if path.is_file() else path.resolve().name


def open_source(
    source: str, subset: str | None = None, from_file: str | None = None, text_column: str = "text"
) -> Source:
    """The named source, or the file, folder or URL; downloaded if necessary, and hashed.

    `from_file` is the user's own copy of what would be downloaded.
    """
    name = source_name(source, subset)
    if from_file is not None and source != "shakespeare":
        raise ValueError(f"from_file is for a source that is downloaded (shakespeare), which {source} is not")
    if source == "python-docs":
        paths = library_files()
        names = [path.relative_to(library_folder()).as_posix() for path in paths]
        library = [TextFile(str(p), name, p.stat().st_size) for p, name in zip(paths, names, strict=True)]
        sha256 = hashlib.sha256(f"{hash_files(library)} {PYTHON_DOCS_RULES}".encode()).hexdigest()
        return Source(source, "PSF-2.0", sha256, 0.1, (PYTHON_DOCS,))
    if (published := published_source(source, subset)) is None:
        found = list_files(source, text_column)
        files = tuple(found.files)
        return Source(
            as_utf8(name), "not stated", hash_files(files), share_held_out(files), files, found.left_alone
        )
    if source == "shakespeare":
        path = _cache_shakespeare(from_file)
        return dataclasses.replace(published, files=(TextFile(str(path), "input.txt", SHAKESPEARE_BYTES),))
    folder = f"{FINEWEB_EDU}/{FINEWEB_EDU_SUBSETS[subset or 'sample-10BT']}"
    files = _find_hub_files(name, OPENWEBTEXT if source == "openwebtext" else folder)
    return dataclasses.replace(published, sha256=hash_files(files), files=files)


def share_held_out(files: Sequence[TextFile]) -> float:
    """The share that is held out if none is given: 0.01, and more of a small text, up to 0.2."""
    text_bytes = sum(file.bytes * (PACKED_TEXT_BYTES if file.is_packed else 1) for file in files)
    return min(0.2, max(0.01, math.ceil(100 * FEWEST_HELD_OUT_BYTES / max(1, text_bytes)) / 100))


def published_source(source: str, subset: str | None = None) -> Source | None:
    """A named source whose text does not change, without its files; None for any other. Uses no network."""
    if source == "shakespeare":
        return Source(source, "public domain", SHAKESPEARE_SHA256, 0.1, ())  # nanoGPT's fraction
    source_name(source, subset)
    licence = HUB_LICENCES.get(source)
    return None if licence is None else Source(source, licence, "", 0.01, ())


def read_parts(parts: Sequence[Part], text_column: str) -> Iterator[Document]:
    """Every document of some parts of a source, in order."""
    return itertools.chain.from_iterable(
        parse_python_docs() if part.file == PYTHON_DOCS else read_part(part, text_column) for part in parts
    )


@functools.cache  # read twice where a tokenizer is trained, and parsing takes seconds
def parse_python_docs() -> tuple[Document, ...]:
    """The documents of the source `python-docs`, with a progress bar the first time."""
    with progress("reading", None, "documents") as advance:
        texts = [text for text in python_texts() if advance() is None]
    return tuple(map(Document, without_repetitions(texts)))


def _find_hub_files(name: str, address: str) -> tuple[TextFile, ...]:
    """Files on Hugging Face's hub. Raises ValueError, with another way to get them, without a network."""
    try:
        return tuple(find_files(address))
    except ValueError as error:
        folder = address.removeprefix("hf://datasets/")
        raise ValueError(
            f"{name} could not be reached ({error}): fetch the .parquet files of "
            f"https://huggingface.co/datasets/{folder} by other means, then `overnight prepare FOLDER`"
        ) from None


def _cache_shakespeare(from_file: str | None) -> Path:
    """The published file in the user's cache: copied from `from_file`, or downloaded if it is not there."""
    path = cache_path("shakespeare", "input.txt")
    if from_file is None and path.is_file() and _is_shakespeare(path.read_bytes()):
        return path
    if from_file is not None and not Path(from_file).is_file():
        raise ValueError(f"from_file: the file {from_file} does not exist")
    content = _download_shakespeare() if from_file is None else Path(from_file).read_bytes()
    if not _is_shakespeare(content):
        raise ValueError(
            f"{from_file or SHAKESPEARE_URL} is not tiny shakespeare as it was published "
            f"({SHAKESPEARE_BYTES:,} bytes, sha256 {SHAKESPEARE_SHA256[:12]}...): {SHAKESPEARE_REMEDY}; to "
            "prepare a text of your own, give its path as the source"
        )
    write_atomically(path, content)  # no later command needs a network
    return path


def _download_shakespeare() -> bytes:
    echo(f"downloading {SHAKESPEARE_URL}")
    try:
        with urllib.request.urlopen(SHAKESPEARE_URL, timeout=DOWNLOAD_TIMEOUT_SECONDS) as answer:
            content: bytes = answer.read(SHAKESPEARE_BYTES + 1)  # limits the size of a wrong answer
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(f"shakespeare could not be downloaded ({error}): {SHAKESPEARE_REMEDY}") from None
    return content


def _is_shakespeare(content: bytes) -> bool:
    return hashlib.sha256(content).hexdigest() == SHAKESPEARE_SHA256


# The docstrings of Python's standard library, in which every machine has two megabytes of English

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


def python_texts() -> Iterator[str]:
    """Each topic, then each module without its classes and each class, their docstrings in source order.

    A whole module would be too large a unit: tkinter's text alone is a third of a validation split of 10%.
    """
    topics, *modules = library_files()
    yield from _read_topics(topics)
    for path in modules:
        module, name = _parse(path), _dotted_name(path)
        classes = [node for node in module.body if isinstance(node, ast.ClassDef)]
        rest = ast.Module([node for node in module.body if node not in classes], type_ignores=[])
        described = [_described(rest, name), *(_described(node, f"{name}.{node.name}") for node in classes)]
        for text in ("\n\n".join(headed) + "\n" for headed in described):
            if len(text) >= SHORTEST_DOCUMENT_CHARACTERS:
                yield text


def without_repetitions(texts: Sequence[str]) -> list[str]:
    """The texts without those of which half or more stands in longer ones, paragraph by paragraph.

    A chapter on compound statements holds the section on `try`, which is a topic too. Held out, that section
    would be scored by a model that has read it. MinHash compares whole documents and does not find it.
    """
    seen: set[str] = set()
    kept = set()
    for text in sorted(texts, key=len, reverse=True):
        paragraphs = text.split("\n\n")
        if 2 * sum(len(each) for each in paragraphs if each in seen) < len(text):
            kept.add(text)
            seen.update(paragraphs)
    return [text for text in texts if text in kept]


def _read_topics(path: Path) -> list[str]:
    """The topics of `pydoc`, in the order of their names: read without running the file."""
    for statement in _parse(path).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            topics = ast.literal_eval(statement.value)
            return [topics[name] for name in sorted(topics)]
    raise ValueError(f"{path} does not hold pydoc's topics; prepare a file or folder of your own instead")


def _described(node: Described, name: str) -> Iterator[str]:
    """A heading and a docstring for everything in `node` that has one, in source order."""
    if docstring := ast.get_docstring(node):
        yield f"{name}\n\n{docstring}"
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _described(child, f"{name}.{child.name}")


def _parse(path: Path) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of invalid escapes in the library
        return ast.parse(path.read_bytes(), filename=str(path))


def _dotted_name(path: Path) -> str:
    parts = path.relative_to(library_folder()).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
