"""Files and folders as a stream of documents.

    .txt .md     a document; a file over 20,000 bytes is several: see `end_of_piece`
    .jsonl       a document a line, its text in the text column
    .parquet     a document a row, its text in the text column

Nothing is cleaned: a document's text is the file's, character for character, line ends included.
Nothing is dropped either: text that can't be read comes as a document with `damage`, and whoever
reads the stream decides what becomes of it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

SHORTEST_PIECE_BYTES = 10_000
LONGEST_PIECE_BYTES = 20_000
ENDS_OF_PIECES = (re.compile(rb"\n[ \t\r]*\n"), re.compile(rb"\n"), re.compile(rb" "))
SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Document:
    """One text, and where it came from."""

    text: str
    origin: str
    """For people: a file and a place in it."""
    damage: str | None = None
    """What is wrong with the text and where, if it is not sound; `text` is then what could be saved of it."""


def readable_files(source: Path) -> list[Path]:
    """The files that a file or a folder of any depth has to offer, in the order of their paths inside it.

    Names beginning with a dot are left alone, and so are other kinds of file. Raises ValueError if
    nothing is left.
    """
    kinds = ", ".join(READERS)
    if source.is_file():
        if source.suffix.lower() not in READERS:
            raise ValueError(f"{source} is not a kind of file that can be read ({kinds})")
        return [source]
    found = []
    for folder, folders, names in os.walk(source):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = [Path(folder, name) for name in names if not name.startswith(".")]
        found += [path for path in paths if path.suffix.lower() in READERS and path.is_file()]
    if not found:
        raise ValueError(f"{source} holds no file that can be read ({kinds})")
    return sorted(found, key=lambda path: path.relative_to(source).parts)


def read_documents(source: Path, text_column: str = "text") -> Iterator[Document]:
    """Every document of a file or folder, in the order of `readable_files`. Memory stays flat.

    Raises ValueError if a file lacks the text column or can't be read at all.
    """
    for path in readable_files(source):
        yield from READERS[path.suffix.lower()](path, text_column)


def estimate_text_bytes(path: Path, text_column: str = "text") -> int:
    """About how many bytes of text one file holds; of a Parquet file, its text column before compression."""
    if path.suffix.lower() != ".parquet":
        return path.stat().st_size
    metadata = _open_parquet(path, text_column).metadata
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    columns = [group.column(index) for group in groups for index in range(group.num_columns)]
    return sum(column.total_uncompressed_size for column in columns if column.path_in_schema == text_column)


def end_of_piece(text: bytes) -> int:
    """Where the first document of an over-long text ends.

    A text file of up to 20,000 bytes is one document. From a longer one, documents are cut off the
    front until no more than that is left: each ends at the first blank line after 10,000 bytes; if
    there is none before 20,000, at the first line end; failing that, at the first space; failing
    that, at 20,000. Joining the documents gives the file back exactly.
    """
    for mark in ENDS_OF_PIECES:
        if found := mark.search(text, SHORTEST_PIECE_BYTES, LONGEST_PIECE_BYTES):
            return found.end()
    end = LONGEST_PIECE_BYTES
    while text[end] & 0xC0 == 0x80 and end > LONGEST_PIECE_BYTES - 3:  # between the bytes of one character
        end -= 1
    return end


def read_text_file(path: Path, text_column: str = "text") -> Iterator[Document]:
    """The documents of one text file, whatever its name ends in; it has no columns."""
    del text_column
    with path.open("rb") as file:
        for offset, piece in _pieces(file):
            text, bad = _decode(piece)
            damage = None if bad is None else f"{path} is not UTF-8 at byte {offset + bad:,}"
            yield Document(text, f"{path.name}, byte {offset:,}", damage)


def _pieces(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """(byte offset, bytes) of each document of a text file."""
    offset, waiting = 0, b""
    while block := file.read(65_536):
        waiting += block
        while len(waiting) > LONGEST_PIECE_BYTES:
            end = end_of_piece(waiting)
            yield offset, waiting[:end]
            offset, waiting = offset + end, waiting[end:]
    if waiting:
        yield offset, waiting


def _read_json_lines(path: Path, text_column: str) -> Iterator[Document]:
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                place = f"{path} line {number:,}"
                text, damage = _json_text(line, place, offset, text_column)
                yield Document(text, f"{path.name}, line {number:,}", damage)
            offset += len(line)


def _json_text(line: bytes, place: str, offset: int, text_column: str) -> tuple[str, str | None]:
    """The text of one line of JSON and its damage; `offset` is the line's first byte in the file."""
    decoded, bad = _decode(line)
    damage = None if bad is None else f"{place} is not UTF-8 at byte {offset + bad:,}"
    try:
        fields = json.loads(decoded)
    except (json.JSONDecodeError, RecursionError):
        return "", damage or f"{place} (byte {offset:,}) is not JSON"
    if not isinstance(fields, dict):
        return "", damage or f"{place} (byte {offset:,}) is not a JSON object with named fields"
    _require_column(text_column, list(fields), place)
    text = fields[text_column]
    if not isinstance(text, str):
        return "", damage or f"{place} (byte {offset:,}) holds no text in {text_column!r}"
    if SURROGATE.search(text):  # "\ud800" is legal JSON, but no UTF-8 can hold it
        text = SURROGATE.sub("\ufffd", text)
        damage = damage or f"{place} (byte {offset:,}) is not UTF-8: it escapes half a surrogate pair"
    return text, damage


def _read_parquet(path: Path, text_column: str) -> Iterator[Document]:
    for number, value in enumerate(_parquet_values(path, text_column), start=1):
        text, bad = ("", None) if value is None else _decode(value)
        damage = None
        if value is None:
            damage = f"{path} row {number:,} holds no text in {text_column!r}"
        elif bad is not None:
            damage = f"{path} row {number:,} is not UTF-8 at byte {bad:,} of its text"
        yield Document(text, f"{path.name}, row {number:,}", damage)


def _parquet_values(path: Path, text_column: str) -> Iterator[bytes | None]:
    """The text column as bytes: Parquet does not promise that a column of strings is UTF-8."""
    file = _open_parquet(path, text_column)
    import pyarrow

    rows = 0
    try:
        for batch in file.iter_batches(batch_size=256, columns=[text_column]):
            yield from batch.column(0).cast(pyarrow.large_binary()).to_pylist()
            rows += batch.num_rows
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path} is damaged after row {rows:,}: {_first_line(error)}") from None


def _open_parquet(path: Path, text_column: str) -> Any:
    """A pyarrow ParquetFile whose text column is there and holds text."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError(
            f"{path} needs pyarrow to be read, which is not installed: pip install 'overnight[data]'"
        ) from None
    try:
        file = parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path} is damaged or is not a Parquet file: {_first_line(error)}") from None
    schema = file.schema_arrow
    _require_column(text_column, schema.names, str(path))
    kind = str(schema.field(text_column).type)
    if kind not in {"string", "large_string", "string_view", "binary", "large_binary"}:
        raise ValueError(f"{path} holds {kind}, not text, in its column {text_column!r}")
    return file


def _require_column(text_column: str, columns: list[str], place: str) -> None:
    if text_column not in columns:
        raise ValueError(
            f"{place} has no column {text_column!r}; name the one that holds the text "
            f"with --text-column: {', '.join(columns) or 'there is none'}"
        )


def _decode(data: bytes) -> tuple[str, int | None]:
    """The text, with U+FFFD for what is not UTF-8, and the offset of the first such byte, if any."""
    try:
        return data.decode(), None
    except UnicodeDecodeError as error:
        return data.decode(errors="replace"), error.start


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


READERS: dict[str, Callable[[Path, str], Iterator[Document]]] = {
    ".txt": read_text_file,
    ".md": read_text_file,
    ".jsonl": _read_json_lines,
    ".parquet": _read_parquet,
}
