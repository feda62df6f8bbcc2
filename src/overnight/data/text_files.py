"""Files of text, on this machine or wherever fsspec reaches (hf://, s3://): found, opened, unpacked.

    .txt .md     texts
    .jsonl       a text a line
    .parquet     a text a row

The first three may be packed: .jsonl.gz, .jsonl.zst, and so on.
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
from typing import Any, BinaryIO, NamedTuple, cast

from overnight.terminal import progress

KINDS = (".txt", ".md", ".jsonl", ".parquet")
PACKINGS = (".gz", ".zst")


class DamagedFileError(ValueError):
    """A file that can't be read to its end. The message names it."""


@dataclass(frozen=True)
class TextFile:
    """A file of one of the kinds above."""

    address: str
    """A path, or a URL."""
    name: str
    """Its place below the source, with forward slashes."""
    bytes: int
    """Its size as it lies there, packed or not."""
    state: str = ""
    """Of a file elsewhere: what its store says of its content (a hash, a date). Local files are hashed."""

    @property
    def kind(self) -> str:
        """.txt, .md, .jsonl or .parquet."""
        return kind_of(self.name) or ""

    @property
    def is_packed(self) -> bool:
        """True if it must be unpacked to be read."""
        return self.name.lower().endswith(PACKINGS)


class Store(NamedTuple):
    """Where files lie that are not on this machine."""

    system: Any
    """fsspec's file system."""
    root: str
    protocol: str


def kind_of(name: str) -> str | None:
    """The kind of a file by its name, whatever it is packed in; None if it is none that can be read."""
    path = PurePosixPath(name.lower())
    suffix = path.suffix
    if suffix in PACKINGS:
        suffix = path.with_suffix("").suffix
        return suffix if suffix in KINDS and suffix != ".parquet" else None
    return suffix if suffix in KINDS else None


def plain_name(name: str) -> str:
    """A file's name without its kind and packing; any other name as it is."""
    if kind_of(name) is None:
        return name
    path = PurePosixPath(name)
    return path.with_suffix("").stem if path.suffix.lower() in PACKINGS else path.stem


def as_utf8(name: str) -> str:
    """A file's name read as UTF-8, whatever the locale says: the same on every machine."""
    return os.fsencode(name).decode(errors="backslashreplace")


def is_remote(source: str) -> bool:
    """True for hf://..., s3://... and every other URL."""
    return "://" in source


def find_files(source: str) -> list[TextFile]:
    """What a file, or a folder of any depth, has to offer, in the order of the paths inside it.

    Names beginning with a dot are left alone, and so are other kinds of file. Raises ValueError if
    nothing is left.
    """
    found = _find_elsewhere(source) if is_remote(source) else _find_here(Path(source))
    if not found:
        raise ValueError(
            f"{source} holds no file that can be read ({', '.join(KINDS)}; packed: {', '.join(PACKINGS)})"
        )
    return sorted(_without_cards(found), key=lambda file: PurePosixPath(file.name).parts)


def _without_cards(files: Iterable[TextFile]) -> list[TextFile]:
    """All but each README.md that has tables of text beside or below it: that tells of them."""
    files = list(files)
    tables = [PurePosixPath(file.name) for file in files if file.kind in {".jsonl", ".parquet"}]
    described = {folder for table in tables for folder in table.parents}
    paths = ((file, PurePosixPath(file.name)) for file in files)
    return [file for file, path in paths if path.name.lower() != "readme.md" or path.parent not in described]


def _find_here(source: Path) -> list[TextFile]:
    if source.is_file():
        if kind_of(source.name) is None:
            raise ValueError(f"{source} is not a kind of file that can be read ({', '.join(KINDS)})")
        return [TextFile(str(source), as_utf8(source.name), source.stat().st_size)]
    found = []
    for folder, folders, names in os.walk(source):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = [Path(folder, name) for name in names if not name.startswith(".") and kind_of(name)]
        found += [
            TextFile(str(path), as_utf8(path.relative_to(source).as_posix()), path.stat().st_size)
            for path in paths
            if path.is_file()
        ]
    return found


def _find_elsewhere(source: str) -> list[TextFile]:
    store = open_store(source)
    try:
        entries = store.system.find(store.root, detail=True)
    except FileNotFoundError:
        entries = {}
    except Exception as error:  # every store has errors of its own
        raise ValueError(f"{source} can't be listed: {first_line(error)}") from None
    found = []
    for path, entry in entries.items():
        inside = PurePosixPath(path).relative_to(store.root) if path != store.root else None
        name = str(inside) if inside and inside.parts else PurePosixPath(path).name
        if kind_of(name) and not any(part.startswith(".") for part in PurePosixPath(name).parts):
            state = next((str(entry[key]) for key in STATES if entry.get(key)), "")
            found.append(TextFile(f"{store.protocol}://{path}", name, int(entry["size"]), state))
    return found


STATES = ("ETag", "etag", "md5Hash", "sha256", "blob_id", "LastModified", "last_modified", "mtime", "created")


def open_store(address: str) -> Store:
    """Fsspec's file system for a URL. Raises ValueError if what it needs is not installed."""
    import fsspec

    protocol = address.partition("://")[0]
    try:
        system, root = fsspec.core.url_to_fs(address)
    except ValueError:
        raise ValueError(f"{address}: {protocol}:// is no place that fsspec knows") from None
    except ImportError as error:
        raise ValueError(f"{address} can't be reached: {error}") from None
    return Store(system, root.rstrip("/"), protocol)


@contextmanager
def open_file(file: TextFile) -> Iterator[BinaryIO]:
    """The file's bytes, unpacked. What is cut short or damaged raises DamagedFileError where it is read."""
    try:
        with _open_raw(file) as raw:
            yield _unpacked(raw, file)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DamagedFileError(f"{file.address} is damaged: {error}") from None
    except OSError as error:
        if file.name.lower().endswith(".zst") and error.errno is None:  # pyarrow's way to say it
            raise DamagedFileError(f"{file.address} is damaged: {first_line(error)}") from None
        raise


def _open_raw(file: TextFile) -> BinaryIO:
    if not is_remote(file.address):
        return Path(file.address).open("rb")
    store = open_store(file.address)
    try:
        return cast(BinaryIO, store.system.open(store.root, "rb"))
    except Exception as error:  # every store has errors of its own
        raise ValueError(f"{file.address} can't be opened: {first_line(error) or repr(error)}") from None


def _unpacked(raw: BinaryIO, file: TextFile) -> BinaryIO:
    if file.name.lower().endswith(".gz"):
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
    if file.name.lower().endswith(".zst"):
        pyarrow = import_pyarrow(file.address)
        return cast(BinaryIO, io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"), 1 << 20))
    return raw


def open_parquet(file: TextFile) -> Any:
    """A pyarrow ParquetFile. Raises DamagedFileError if it is none, or was cut short."""
    pyarrow = import_pyarrow(file.address)
    from pyarrow import parquet

    try:
        if not is_remote(file.address):
            return parquet.ParquetFile(file.address)
        return parquet.ParquetFile(_open_raw(file), pre_buffer=True)
    except (OSError, pyarrow.ArrowException) as error:
        raise DamagedFileError(
            f"{file.address} is damaged or is not a Parquet file: {first_line(error)}"
        ) from None


def import_pyarrow(address: str) -> Any:
    """The library, where it is installed. Raises ValueError that says how to install it."""
    try:
        import pyarrow
    except ImportError:
        raise ValueError(
            f"{address} needs pyarrow to be read, which is not installed: pip install 'overnight[data]'"
        ) from None
    return pyarrow


def first_line(error: Exception) -> str:
    """Of what a library says."""
    return str(error).partition("\n")[0]


def hash_files(files: Iterable[TextFile]) -> str:
    """sha256 of all files' contents and names, in the order given.

    Of a file elsewhere, its size and what its store says of its content stand for that.
    """
    files = list(files)
    total = hashlib.sha256()
    here = sum(file.bytes for file in files if not is_remote(file.address))
    with progress("hashing", here / 1e6, "MB") as advance:
        for file in files:
            if is_remote(file.address):
                total.update(f"{file.state} {file.bytes} {file.name}\n".encode())
                continue
            with Path(file.address).open("rb") as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
                advance(content.tell() / 1e6)
            total.update(f"{digest} {file.name}\n".encode())
    return total.hexdigest()
