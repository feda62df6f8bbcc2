"""Files of text, local or at any URL that fsspec reads (hf://, s3://): found, opened, decompressed.

    .txt .md     texts
    .jsonl       a text a line
    .parquet     a text a row

The first two kinds may be compressed: .jsonl.gz, .txt.zst, and so on.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from overnight.terminal import progress

KINDS = (".txt", ".md", ".jsonl", ".parquet")
PACKINGS = (".gz", ".zst")


class DamagedFileError(ValueError):
    """A file that cannot be read to its end. The message names it."""


@dataclass(frozen=True)
class TextFile:
    """A file of one of the kinds above."""

    address: str
    """A path, or a URL."""
    name: str
    """Its path relative to the source, with forward slashes."""
    bytes: int
    """Its size as stored, compressed or not."""
    state: str = ""
    """Hash or date that the store of a remote file reports; empty for local files, which are hashed."""

    @property
    def kind(self) -> str:
        """.txt, .md, .jsonl or .parquet."""
        return kind_of(self.name) or ""

    @property
    def is_packed(self) -> bool:
        """True if it is compressed."""
        return self.name.lower().endswith(PACKINGS)


def kind_of(name: str) -> str | None:
    """The kind of a file by its name, without its compression; None if it cannot be read."""
    path = PurePosixPath(name.lower())
    if path.suffix in PACKINGS:
        kind = path.with_suffix("").suffix
        return kind if kind in KINDS and kind != ".parquet" else None
    return path.suffix if path.suffix in KINDS else None


def plain_name(name: str) -> str:
    """A file's name without the suffixes of its kind and compression; other names are not changed."""
    if kind_of(name) is None:
        return name
    path = PurePosixPath(name)
    return path.with_suffix("").stem if path.suffix.lower() in PACKINGS else path.stem


def as_utf8(name: str) -> str:
    """A file's name decoded as UTF-8, so that it does not depend on the locale."""
    return os.fsencode(name).decode(errors="backslashreplace")


def is_remote(source: str) -> bool:
    """True for hf://..., s3://... and every other URL."""
    return "://" in source


def find_files(source: str) -> list[TextFile]:
    """The text files at a path or URL, in the order of their paths; a folder is searched recursively.

    Names that begin with a dot and other kinds of file are skipped. Raises ValueError if none is found.
    """
    found = _find_remote(source) if is_remote(source) else _find_local(Path(source))
    if not found:
        raise ValueError(
            f"{source} holds no file that can be read ({', '.join(KINDS)}; compressed: {', '.join(PACKINGS)})"
        )
    # A README.md in a folder with .jsonl or .parquet files, at any depth, is a dataset card and not text.
    files = {PurePosixPath(file.name): file for file in found}
    tables = [path for path, file in files.items() if file.kind in {".jsonl", ".parquet"}]
    cards = {folder / "readme.md" for table in tables for folder in table.parents}
    return [files[path] for path in sorted(files) if path.with_name(path.name.lower()) not in cards]


def _is_text(name: str) -> bool:
    """True if a file in a folder of text is to be read: of a known kind, and not hidden."""
    return kind_of(name) is not None and not any(part.startswith(".") for part in PurePosixPath(name).parts)


def _find_local(source: Path) -> list[TextFile]:
    if source.is_file():
        if kind_of(source.name) is None:
            raise ValueError(f"{source} is not a kind of file that can be read ({', '.join(KINDS)})")
        return [TextFile(str(source), as_utf8(source.name), source.stat().st_size)]
    names = {path: as_utf8(path.relative_to(source).as_posix()) for path in source.rglob("*")}
    return [
        TextFile(str(path), name, path.stat().st_size)
        for path, name in names.items()
        if _is_text(name) and path.is_file()
    ]


def _find_remote(source: str) -> list[TextFile]:
    system, root = open_store(source)
    try:
        entries = system.find(root, detail=True)
    except FileNotFoundError:
        entries = {}
    except Exception as error:  # each store has its own error classes
        raise ValueError(f"{source} can't be listed: {first_line(error)}") from None
    found = []
    for path, entry in entries.items():
        name = path.removeprefix(f"{root}/") if path != root else PurePosixPath(path).name
        if _is_text(name):
            address = f"{source.partition('://')[0]}://{path}"
            state = next((str(entry[key]) for key in STATES if entry.get(key)), "")
            found.append(TextFile(address, name, int(entry["size"]), state))
    return found


# Names under which stores report a file's hash or date, the most reliable first.
STATES = ("ETag", "etag", "md5Hash", "sha256", "blob_id", "LastModified", "last_modified", "mtime", "created")


def open_store(address: str) -> tuple[Any, str]:
    """(fsspec's file system for a URL, the path in it).

    Raises ValueError if its protocol is unknown or not installed.
    """
    import fsspec

    try:
        system, root = fsspec.core.url_to_fs(address)
    except ValueError:
        raise ValueError(f"{address}: fsspec does not know the protocol of this address") from None
    except ImportError as error:
        raise ValueError(f"{address} can't be reached: {error}") from None
    return system, root.rstrip("/")


@contextmanager
def open_file(file: TextFile) -> Iterator[BinaryIO]:
    """The file's bytes, decompressed. Reading raises DamagedFileError if it is truncated or damaged."""
    name = file.name.lower()
    try:
        with _open_raw(file) as raw:
            if name.endswith(".gz"):
                yield cast(BinaryIO, gzip.GzipFile(fileobj=raw))
            elif name.endswith(".zst"):
                stream = import_pyarrow(file.address).CompressedInputStream(raw, "zstd")
                yield cast(BinaryIO, io.BufferedReader(stream, 1 << 20))
            else:
                yield raw
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DamagedFileError(f"{file.address} is damaged: {error}") from None
    except OSError as error:
        if name.endswith(".zst") and error.errno is None:  # pyarrow's decompression error
            raise DamagedFileError(f"{file.address} is damaged: {first_line(error)}") from None
        raise


def _open_raw(file: TextFile) -> BinaryIO:
    if not is_remote(file.address):
        return Path(file.address).open("rb")
    system, path = open_store(file.address)
    try:
        return cast(BinaryIO, system.open(path, "rb"))
    except Exception as error:  # each store has its own error classes
        raise ValueError(f"{file.address} can't be opened: {first_line(error) or repr(error)}") from None


def open_parquet(file: TextFile) -> Any:
    """A pyarrow ParquetFile. Raises DamagedFileError if the file is truncated or not Parquet."""
    pyarrow = import_pyarrow(file.address)
    from pyarrow import parquet

    source = _open_raw(file) if is_remote(file.address) else file.address
    try:
        return parquet.ParquetFile(source, pre_buffer=is_remote(file.address))
    except (OSError, pyarrow.ArrowException) as error:
        raise DamagedFileError(
            f"{file.address} is damaged or is not a Parquet file: {first_line(error)}"
        ) from None


def import_pyarrow(address: str) -> Any:
    """The module pyarrow. Raises ValueError with the install command if it is missing."""
    try:
        import pyarrow
    except ImportError:
        raise ValueError(
            f"{address} needs pyarrow, which is not installed: pip install 'overnight[data]'"
        ) from None
    return pyarrow


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return str(error).partition("\n")[0]


def hash_files(files: Iterable[TextFile]) -> str:
    """sha256 of all files' contents and names, in the order given.

    A remote file is not read: its size and what its store says about the content are hashed instead.
    """
    files = list(files)
    total = hashlib.sha256()
    local_bytes = sum(file.bytes for file in files if not is_remote(file.address))
    with progress("hashing", local_bytes / 1e6, "MB") as advance:
        for file in files:
            facts = f"{file.state} {file.bytes}"
            if not is_remote(file.address):
                with Path(file.address).open("rb") as content:
                    facts = hashlib.file_digest(content, "sha256").hexdigest()
                    advance(content.tell() / 1e6)
            total.update(f"{facts} {file.name}\n".encode())
    return total.hexdigest()
