"""Files as a stream of documents.

    .txt .md     a document; a file over 20,000 bytes is several: see `end_of_piece`
    .jsonl       a document a line, its text in the text column
    .parquet     a document a row, its text in the text column

Nothing is cleaned: a document's text is the file's, character for character, line ends included.
Nothing is dropped either: text that can't be read comes as a document with `damage`, and whoever
reads the stream decides what becomes of it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from overnight.data.text_files import (
    DamagedFileError,
    TextFile,
    first_line,
    import_pyarrow,
    open_file,
    open_parquet,
)

SHORTEST_PIECE_BYTES = 10_000
LONGEST_PIECE_BYTES = 20_000
ENDS_OF_PIECES = (re.compile(rb"\n[ \t\r]*\n"), re.compile(rb"\n"), re.compile(rb" "))
SURROGATE = re.compile("[\ud800-\udfff]")
ROWS_AT_ONCE = 256
PACKED_TEXT_BYTES = 3  # of text in a byte of a packed file, roughly


@dataclass(frozen=True)
class Document:
    """One text, and where it came from."""

    text: str
    origin: str
    """For people: a file and a place in it."""
    damage: str | None = None
    """What is wrong with the text and where, if it is not sound; `text` is then what could be saved of it."""


@dataclass(frozen=True)
class Part:
    """A file, or some row groups of a Parquet file: what is read in one piece."""

    file: TextFile
    groups: tuple[int, int] | None = None
    """The first row group and the end of the last; None: all there is."""


def read_part(part: Part, text_column: str = "text") -> Iterator[Document]:
    """Every document of it, in its order. Memory stays flat.

    Raises ValueError if the text column is missing, DamagedFileError if it can't be read to its end.
    """
    return READERS[part.file.kind](part, text_column)


def divide_file(file: TextFile, text_column: str, part_bytes: int) -> list[Part]:
    """The file as parts of about so many bytes of text, if it is larger and can be divided.

    Raises DamagedFileError or ValueError for a Parquet file that can't be read, or has no such column.
    """
    if file.kind != ".parquet":
        return [Part(file)]
    sizes = _row_group_bytes(file, text_column)
    parts, first, held = [], 0, 0
    for group, size in enumerate(sizes):
        if held and held + size > part_bytes:
            parts.append(Part(file, (first, group)))
            first, held = group, 0
        held += size
    return [*parts, Part(file, (first, len(sizes)) if parts else None)]


def estimate_text_bytes(part: Part, text_column: str = "text") -> int:
    """About how many bytes of text it holds; of a Parquet file, its text column before compression."""
    if part.file.kind != ".parquet":
        return part.file.bytes * (PACKED_TEXT_BYTES if part.file.is_packed else 1)
    return sum(_row_group_bytes(part.file, text_column)[slice(*(part.groups or (None,)))])


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


def _read_text(part: Part, _text_column: str) -> Iterator[Document]:
    with open_file(part.file) as file:
        for offset, piece in _pieces(file):
            text, bad = _decode(piece)
            damage = None if bad is None else f"{part.file.address} is not UTF-8 at byte {offset + bad:,}"
            yield Document(text, f"{part.file.name}, byte {offset:,}", damage)


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


def _read_json_lines(part: Part, text_column: str) -> Iterator[Document]:
    offset = 0
    with open_file(part.file) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                place = f"{part.file.address} line {number:,}"
                text, damage = _json_text(line, place, offset, text_column)
                yield Document(text, f"{part.file.name}, line {number:,}", damage)
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


def _read_parquet(part: Part, text_column: str) -> Iterator[Document]:
    file, first_row = _open_column(part.file, text_column), 0
    groups = range(file.num_row_groups) if part.groups is None else range(*part.groups)
    if part.groups is not None:
        first_row = sum(file.metadata.row_group(group).num_rows for group in range(part.groups[0]))
    values = _parquet_values(file, list(groups), part.file.address, text_column)
    for number, value in enumerate(values, start=first_row + 1):
        text, bad = ("", None) if value is None else _decode(value)
        place, damage = f"{part.file.address} row {number:,}", None
        if value is None:
            damage = f"{place} holds no text in {text_column!r}"
        elif bad is not None:
            damage = f"{place} is not UTF-8 at byte {bad:,} of its text"
        yield Document(text, f"{part.file.name}, row {number:,}", damage)


def _parquet_values(file: Any, groups: list[int], address: str, text_column: str) -> Iterator[bytes | None]:
    """The text column as bytes: Parquet does not promise that a column of strings is UTF-8."""
    pyarrow = import_pyarrow(address)
    rows = 0
    try:
        for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, row_groups=groups, columns=[text_column]):
            yield from batch.column(0).cast(pyarrow.large_binary()).to_pylist()
            rows += batch.num_rows
    except (OSError, pyarrow.ArrowException) as error:
        raise DamagedFileError(f"{address} is damaged after row {rows:,}: {first_line(error)}") from None


def _open_column(file: TextFile, text_column: str) -> Any:
    """The pyarrow ParquetFile, whose text column is there and holds text."""
    opened = open_parquet(file)
    schema = opened.schema_arrow
    _require_column(text_column, schema.names, file.address)
    kind = str(schema.field(text_column).type)
    if kind not in {"string", "large_string", "string_view", "binary", "large_binary"}:
        raise ValueError(f"{file.address} holds {kind}, not text, in its column {text_column!r}")
    return opened


def _row_group_bytes(file: TextFile, text_column: str) -> list[int]:
    """Bytes of the text column in each row group, before compression."""
    metadata = _open_column(file, text_column).metadata
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    columns = ([group.column(index) for index in range(group.num_columns)] for group in groups)
    return [
        sum(column.total_uncompressed_size for column in each if column.path_in_schema == text_column)
        for each in columns
    ]


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


READERS: dict[str, Callable[[Part, str], Iterator[Document]]] = {
    ".txt": _read_text,
    ".md": _read_text,
    ".jsonl": _read_json_lines,
    ".parquet": _read_parquet,
}


# ---------------------------------------------------------------- what becomes of each document, and on which side of the split it is


Fate = Literal["kept", "repaired", "duplicate", "empty", "skipped", "near-duplicate", "contaminated"]
FATES: tuple[Fate, ...] = get_args(Fate)
KEPT: frozenset[Fate] = frozenset({"kept", "repaired"})

RECORD = np.dtype(
    [("hash_high", "<u8"), ("hash_low", "<u8"), ("tokens", "<u4"), ("bytes", "<u4"), ("fate", "u1")]
)
"""What is remembered of a document: its hash's halves, what it is long, and its place in FATES."""

HASHES_AT_ONCE = 16_000_000  # in which duplicates are looked for: about a gigabyte with what sorting takes

Records = NDArray[Any]


def filter_documents(documents: Iterable[Document], on_bad_text: str) -> Iterator[tuple[Document, Fate]]:
    """Each document and what becomes of it, looked at alone: kept, repaired, empty or skipped.

    Raises ValueError at the first unsound text if on_bad_text is "fail".
    """
    for document in documents:
        if document.damage is not None and on_bad_text == "fail":
            raise ValueError(f"{document.damage}; mend it, or give --on-bad-text replace or skip")
        if document.damage is not None and on_bad_text == "skip":
            yield document, "skipped"
        elif not document.text:
            yield document, "empty"
        else:
            yield document, "kept" if document.damage is None else "repaired"


def document_hash(text: str) -> bytes:
    """16 bytes that stand for a text."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def split_of(text: str, validation_fraction: float) -> str:
    """The side a text is on, "train" or "validation".

    A pure function of the text: no document changes sides when others are added, lost or reordered.
    """
    place = int.from_bytes(document_hash(text)[:8]) / 2**64
    return "validation" if place < validation_fraction else "train"


def is_validation(records: Records, validation_fraction: float) -> NDArray[np.bool_]:
    """`split_of` for many documents at once, by their hashes."""
    falls_below: NDArray[np.bool_] = records["hash_high"] / 2.0**64 < validation_fraction
    return falls_below


def kept_mask(fates: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which of the documents go into the shards."""
    return np.isin(fates, [FATES.index(fate) for fate in KEPT])


def find_duplicates(groups: Sequence[Records]) -> list[NDArray[np.bool_]]:
    """For each group of records which documents are equal to one before, in this group or an earlier one.

    Only documents to be kept count. Memory holds the hashes of a range at a time, so any number will do.
    """
    found = [np.zeros(len(records), dtype=bool) for records in groups]
    ranges = -(-max(1, sum(map(len, groups))) // HASHES_AT_ONCE)
    edges = [2**64 * number // ranges for number in range(ranges + 1)]
    for begin, end in zip(edges, edges[1:], strict=False):
        places = [_in_range(records, begin, end) for records in groups]
        high, low = (
            np.concatenate([records[half][place] for records, place in zip(groups, places, strict=True)])
            for half in ("hash_high", "hash_low")
        )
        order = np.lexsort((low, high))  # stable: equal ones stay in their order
        equal = (high[order][1:] == high[order][:-1]) & (low[order][1:] == low[order][:-1])
        again = np.zeros(len(order), dtype=bool)
        again[order[1:][equal]] = True
        sizes = np.cumsum([len(place) for place in places])[:-1]
        for duplicate, place, part in zip(found, places, np.split(again, sizes), strict=True):
            duplicate[place] = part
    return found


def _in_range(records: Records, begin: int, end: int) -> NDArray[np.intp]:
    """Where the documents to be kept stand whose hash begins so."""
    high = records["hash_high"]
    inside = (high >= np.uint64(begin)) & (high <= np.uint64(end - 1)) & kept_mask(records["fate"])
    return np.flatnonzero(inside)
