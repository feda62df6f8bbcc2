"""Files of text, local or at any URL that fsspec reads (hf://, s3://): found, opened, decompressed.

    .txt .md     texts
    .jsonl       a text a line
    .json        the same, or one array with a text an item
    .parquet     a text a row

All kinds but the last may be compressed: .jsonl.gz, .txt.zst, and so on.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import io
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, cast

from overnight.config import require_readable
from overnight.data.wide_encodings import find_wide_encoding
from overnight.terminal import progress

KINDS = (".txt", ".md", ".jsonl", ".json", ".parquet")
PACKINGS = (".gz", ".zst")
TABLES = frozenset({".jsonl", ".json", ".parquet"})
BYTE_ORDER_MARK = codecs.BOM_UTF8
LAST_NUMBER = re.compile(r"(.*?)([0-9]+)([^0-9]*)")
PART_OF = re.compile(r"(.*?)([0-9]+)(-of-[0-9]+.*)")
FIRST_LINE_BYTES = 1 << 20
BROKEN_LINK = "broken link"


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
        """.txt, .md, .jsonl, .json or .parquet."""
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


class FileListing(NamedTuple):
    """What is at a path or URL."""

    files: list[TextFile]
    """The files to be read, in the order of their names."""
    left_alone: dict[str, list[int]]
    """Kind of the files that are not read -> [number of files, bytes]."""


def find_files(source: str) -> list[TextFile]:
    """The text files of `list_files`."""
    return list_files(source).files


def list_files(source: str, text_column: str = "text") -> FileListing:
    """The text files at a path or URL, a folder searched recursively, and a count of all other files.

    Names that begin with a dot are not read. Raises ValueError if no file can be read.
    """
    found = _find_remote(source) if is_remote(source) else _find_local(Path(source))
    names = {PurePosixPath(file.name): file for file in found}
    kinds = {path: _kind_left_alone(file, text_column) for path, file in names.items()}
    # A README.md in a folder with tables of texts, at any depth, is a dataset card and not text.
    tables = [path for path, file in names.items() if kinds[path] is None and file.kind in TABLES]
    cards = {folder / "readme.md" for table in tables for folder in table.parents}
    listing = FileListing([], {})
    for path in sorted(names):
        kind = kinds[path]
        if kind is None and path.with_name(path.name.lower()) in cards:
            kind = "README.md of a dataset"
        if kind is None:
            listing.files.append(names[path])
        else:
            count, size = listing.left_alone.get(kind, [0, 0])
            listing.left_alone[kind] = [count + 1, size + names[path].bytes]
    if not listing.files:
        there = f"; there is {describe_files(listing.left_alone)}" if listing.left_alone else ""
        raise ValueError(
            f"{source} holds no file that can be read ({', '.join(KINDS)}; compressed: {', '.join(PACKINGS)})"
            f"{there}"
        )
    return listing


def count_files(files: Iterable[TextFile]) -> dict[str, list[int]]:
    """Kind -> [number of files, bytes]."""
    counts: dict[str, list[int]] = {}
    for file in files:
        kind = file.kind + PurePosixPath(file.name.lower()).suffix * file.is_packed
        count, size = counts.get(kind, [0, 0])
        counts[kind] = [count + 1, size + file.bytes]
    return {kind: counts[kind] for kind in sorted(counts) if kind}


def describe_files(counts: Mapping[str, Sequence[int]]) -> str:
    """Number of files and bytes of each kind, as text."""
    return ", ".join(f"{count:,} {kind} ({size:,} bytes)" for kind, (count, size) in sorted(counts.items()))


def describe_missing(names: Iterable[str], least_digits: int = 1) -> str:
    """The names that lack in a numbered row, in a sentence that shows the first three; "" if none does.

    part-00000-of-00003 says how many there are; other names lack between the lowest and the highest number.
    Numbers of fewer digits than `least_digits` are not counted, since a year is no part.
    """
    rows: dict[tuple[str, str], dict[int, str]] = {}
    for name in names:
        found = PART_OF.fullmatch(name) or LAST_NUMBER.fullmatch(name)
        if found is not None and len(found[2]) >= least_digits:
            rows.setdefault((found[1], found[3]), {})[int(found[2])] = found[2]
    missing = (
        f"{before}{number:0{len(there[min(there)])}d}{after}"
        for (before, after), there in rows.items()
        for number in _numbers_of(there, after)
        if number not in there
    )
    shown = list(islice(missing, 4))
    more = " ..." * (len(shown) > 3)
    return f"not there, by the numbers in the names: {', '.join(shown[:3])}{more}" if shown else ""


def _numbers_of(there: Mapping[int, str], after: str) -> range:
    total = re.match(r"-of-([0-9]+)", after)
    if total is None:
        return range(min(there), max(there))
    first = int(int(total[1]) in there)  # 1 if they are counted from 1
    return range(first, first + int(total[1]))


def _kind_left_alone(file: TextFile, text_column: str) -> str | None:
    """The kind of a file that is not to be read; None if it is."""
    path = PurePosixPath(file.name.lower())
    if any(part.startswith(".") for part in path.parts):
        return "hidden"
    if file.state == BROKEN_LINK:
        return "broken link"
    if kind_of(file.name) is None:
        suffixes = path.suffixes[-2:] if path.suffix in PACKINGS else path.suffixes[-1:]
        return "".join(suffixes) or "without suffix"
    is_text = file.kind != ".json" or _is_json_text(file, text_column)
    return None if is_text else ".json of one object"


def _is_json_text(file: TextFile, text_column: str) -> bool:
    """True for JSON lines, for an array, and for one object with the text column."""
    try:
        with open_file(file) as content:
            first = content.readline(FIRST_LINE_BYTES).removeprefix(BYTE_ORDER_MARK).strip()
            rest = content.readline(FIRST_LINE_BYTES).strip()
    except DamagedFileError:
        return True  # found again, and reported, when it is read
    if find_wide_encoding(first) is not None:
        return True  # refused when it is read
    if not first.startswith(b"{"):
        return first.startswith(b"[") or not first
    if rest or len(first) >= FIRST_LINE_BYTES:
        return rest.startswith(b"{") or not rest
    with suppress(ValueError, RecursionError):
        return text_column.partition(".")[0] in json.loads(first)
    return True


def _find_local(source: Path) -> list[TextFile]:
    if source.is_file():
        if kind_of(source.name) is None:
            raise ValueError(
                f"{source} is not a kind of file that can be read ({', '.join(KINDS)}): save it as "
                "text, or a table as JSON lines"
            )
        return [TextFile(str(source), as_utf8(source.name), source.stat().st_size)]
    found = []
    for path in _walk(source):
        name, is_there = as_utf8(path.relative_to(source).as_posix()), path.is_file()
        if is_there or path.is_symlink():
            size, state = (path.stat().st_size, "") if is_there else (0, BROKEN_LINK)
            found.append(TextFile(str(path), name, size, state))
    return found


def _walk(source: Path) -> Iterator[Path]:
    """Every file below a folder. Each folder is read once, linked ones after the others."""

    def refuse(error: OSError) -> None:
        raise error

    seen: set[str] = set()
    waiting = [source]
    for start in waiting:
        for folder, folders, names in os.walk(start, onerror=refuse):
            if (real := os.path.realpath(folder)) in seen:
                folders.clear()
                continue
            seen.add(real)
            links = sorted(name for name in folders if Path(folder, name).is_symlink())
            waiting += [Path(folder, name) for name in links if not name.startswith(".")]
            folders[:] = sorted(name for name in folders if name not in links)
            yield from (Path(folder, name) for name in sorted(names))


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
        address = f"{source.partition('://')[0]}://{path}"
        state = next((str(entry[key]) for key in STATES if entry.get(key)), "")
        found.append(TextFile(address, name, int(entry["size"] or 0), state))
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


def refuse_wide_encoding(start: bytes, address: str) -> None:
    """Raise DamagedFileError if a file that begins with `start` is UTF-16 or UTF-32."""
    if (name := find_wide_encoding(start)) is not None:
        raise DamagedFileError(
            f"{address} is {name}, not UTF-8: convert it (iconv -f {name} -t UTF-8), or save it as UTF-8"
        )


def open_parquet(file: TextFile) -> Any:
    """A pyarrow ParquetFile. Raises DamagedFileError if the file is truncated or not Parquet."""
    pyarrow = import_pyarrow(file.address)
    from pyarrow import parquet

    source: Any = file.address
    if is_remote(file.address):
        source = _open_raw(file)
    else:
        require_readable(Path(file.address))
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
