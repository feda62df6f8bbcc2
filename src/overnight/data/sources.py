"""Where text comes from: the named sources, and any file or folder. Each knows its licence.

`python-docs` is there without a network, `shakespeare` is downloaded once and kept in the user's cache.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from overnight.cache import cache_folder
from overnight.data.documents import (
    Document,
    estimate_text_bytes,
    read_documents,
    read_text_file,
    readable_files,
)
from overnight.data.python_docs import library_files, library_folder, python_documents
from overnight.run_directory import write_atomically
from overnight.settings import nearest
from overnight.terminal import progress, say

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_BYTES = 1_115_394
DOWNLOAD_TIMEOUT_SECONDS = 60


@dataclass(frozen=True)
class Source:
    """Text ready to be read, as often as wanted."""

    name: str
    """Of the prepared folder, unless the user chose another."""
    licence: str
    sha256: str
    """Of the files it is read from, names and contents: the same hash, the same documents."""
    text_bytes: int
    """About how much text it holds; exact unless it is stored compressed."""
    validation_fraction: float
    """The share of documents held out unless the user says otherwise: small sources need a larger one."""
    documents: Callable[[], Iterable[Document]]


def source_name(source: str) -> str:
    """What a source is called: its own name, or that of the file or folder. Reads nothing.

    A named source comes before a file of the same name; `./shakespeare` is the file. Raises ValueError
    if `source` is neither.
    """
    if source in NAMED_SOURCES:
        return source
    path = Path(source)
    if not path.exists() and os.sep in source:
        raise ValueError(
            f"nothing lies at {source}; what a recipe trains on is prepared first, with "
            f"`overnight prepare SOURCE --out {source}`, and the recipe's first lines show the command"
        )
    if not path.exists():
        raise ValueError(
            f"{source!r} is no file or folder, nor a source that is known{nearest(source, NAMED_SOURCES)}"
        )
    return path.resolve().stem if path.is_file() else path.resolve().name


def open_source(source: str, text_column: str = "text", from_file: str | None = None) -> Source:
    """The named source, or the file or folder, downloaded where need be and hashed.

    `from_file` is a copy that the user already has of what would be downloaded.
    """
    name = source_name(source)
    if from_file is not None and source != "shakespeare":
        raise ValueError(f"from_file is for a source that is downloaded (shakespeare), which {source} is not")
    if source == "python-docs":
        return _open_python_docs()
    if source == "shakespeare":
        return _open_shakespeare(from_file)
    path = Path(source)
    files = readable_files(path)
    return Source(
        name=name,
        licence="not stated",
        sha256=hash_files(files, path if path.is_dir() else path.parent),
        text_bytes=sum(estimate_text_bytes(file, text_column) for file in files),
        validation_fraction=0.01,
        documents=lambda: read_documents(path, text_column),
    )


def hash_files(files: list[Path], root: Path) -> str:
    """sha256 of the files' contents and of their paths below `root`, in the order given."""
    total = hashlib.sha256()
    with progress("hashing", sum(path.stat().st_size for path in files) / 1e6, "MB") as advance:
        for path in files:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                advance(file.tell() / 1e6)
            total.update(f"{digest} {path.relative_to(root).as_posix()}\n".encode())
    return total.hexdigest()


def _open_python_docs() -> Source:
    files = library_files()

    @functools.cache  # read twice where a tokenizer is trained, and parsing takes seconds
    def documents() -> tuple[Document, ...]:
        with progress("reading", None, "documents") as advance:
            return tuple(document for document in python_documents() if advance() is None)

    return Source(
        name="python-docs",
        licence="PSF-2.0",
        sha256=hash_files(files, library_folder()),
        text_bytes=2_300_000,  # CPython 3.11's
        validation_fraction=0.1,
        documents=documents,
    )


def _open_shakespeare(from_file: str | None) -> Source:
    path = cache_folder() / "shakespeare" / "input.txt"
    if from_file is not None:
        write_atomically(path, _read_shakespeare(Path(from_file)))  # from then on no command needs a network
    elif not path.is_file() or _sha256(path.read_bytes()) != SHAKESPEARE_SHA256:
        write_atomically(path, _download_shakespeare())
    return Source(
        name="shakespeare",
        licence="public domain",
        sha256=SHAKESPEARE_SHA256,
        text_bytes=SHAKESPEARE_BYTES,
        validation_fraction=0.1,  # nanoGPT's share
        documents=lambda: read_text_file(path),
    )


def _read_shakespeare(path: Path) -> bytes:
    """The user's own copy. Raises ValueError if it is not the published file."""
    if not path.is_file():
        raise ValueError(f"from_file: there is no file {path}")
    content = path.read_bytes()
    if _sha256(content) != SHAKESPEARE_SHA256:
        raise ValueError(
            f"{path} is not tiny shakespeare as it is published ({SHAKESPEARE_BYTES:,} bytes, sha256 "
            f"{SHAKESPEARE_SHA256[:12]}...); to prepare a text of your own, give its path as the source"
        )
    return content


def _download_shakespeare() -> bytes:
    """The published file, fetched. Raises ValueError if that fails, or something else comes."""
    import http.client
    import urllib.request

    say(f"downloading {SHAKESPEARE_URL}")
    try:
        with urllib.request.urlopen(SHAKESPEARE_URL, timeout=DOWNLOAD_TIMEOUT_SECONDS) as answer:
            content: bytes = answer.read(SHAKESPEARE_BYTES + 1)  # no server makes us read more
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(_instead(f"shakespeare could not be downloaded ({error})")) from None
    if _sha256(content) != SHAKESPEARE_SHA256:
        raise ValueError(_instead("what was downloaded as shakespeare is not the published file"))
    return content


def _instead(problem: str) -> str:
    command = "overnight prepare shakespeare --from-file FILE"
    return f"{problem}; fetch {SHAKESPEARE_URL} some other way, then run `{command}` once"


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


NAMED_SOURCES = ("python-docs", "shakespeare")
