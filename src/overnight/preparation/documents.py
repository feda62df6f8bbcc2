"""Files as a stream of documents, and the status of each: kept, left out, training or validation.

    .txt .md     a document; a file over 20,000 bytes is several: see `end_of_piece`
    .jsonl       a document per line, its text in the text column
    .json        the same, or one array with a document per item
    .parquet     a document per row, its text in the text column

Nothing is cleaned: a document's text is the file's, character for character, line ends included.
Nothing is dropped by the readers: text that can't be read is a document with `damage`.
"""

from __future__ import annotations

import codecs
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from overnight.data.text_files import (
    BYTE_ORDER_MARK,
    DamagedFileError,
    TextFile,
    first_line,
    import_pyarrow,
    open_file,
    open_parquet,
    refuse_wide_encoding,
)

SHORTEST_PIECE_BYTES = 10_000
LONGEST_PIECE_BYTES = 20_000
ENDS_OF_PIECES = (re.compile(rb"\n[ \t\r]*\n"), re.compile(rb"\n"), re.compile(rb" "))
JSON_BLANK = re.compile(r"[ \t\r\n]*")
JSON_DECODER = json.JSONDecoder()
SURROGATE = re.compile("[\ud800-\udfff]")
ROWS_AT_ONCE = 256
PACKED_TEXT_BYTES = 3  # bytes of text in a byte of a packed file, roughly
TEXT_TYPES = {"string", "large_string", "string_view", "binary", "large_binary"}

DocumentStatus = Literal[
    "kept", "repaired", "duplicate", "empty", "skipped", "near-duplicate", "contaminated"
]
STATUSES: tuple[DocumentStatus, ...] = get_args(DocumentStatus)
KEPT: frozenset[DocumentStatus] = frozenset({"kept", "repaired"})

RECORD = np.dtype(
    [
        *(("hash_high", "<u8"), ("hash_low", "<u8"), ("shared", "<u8")),
        *(("tokens", "<u4"), ("bytes", "<u4"), ("status", "u1")),
    ]
)
"""What is stored of a document: the halves of its hash, a bit for each benchmark that it shares a passage
with, its lengths, and the index of its status."""

Records = NDArray[Any]


class Document(NamedTuple):
    """One text as it was read."""

    text: str
    damage: str | None = None
    """The damage and its position; `text` is then the readable part."""


class FilteredDocument(NamedTuple):
    """A text and its status, decided from the document alone."""

    text: str
    status: DocumentStatus


@dataclass(frozen=True)
class Part:
    """A file, or some row groups of a Parquet file."""

    file: TextFile
    groups: tuple[int, int] | None = None
    """(first row group, end); None for all row groups."""


def read_part(part: Part, text_column: str = "text") -> Iterator[Document]:
    """Every document of a part, in order. Needs little memory, however long it is.

    Raises ValueError if the text column is missing, DamagedFileError if the file is damaged.
    """
    if part.file.kind == ".parquet":
        return _read_parquet(part, text_column)
    return _read_text(part) if part.file.kind in {".txt", ".md"} else _read_json_file(part, text_column)


def divide_file(file: TextFile, text_column: str, part_bytes: int) -> dict[Part, int]:
    """The parts of a file and the bytes of text in each: about `part_bytes`, if the file can be divided.

    The sizes are estimates; of a Parquet file, the text column before compression. Raises DamagedFileError
    or ValueError for a Parquet file that can't be read or has no such column.
    """
    if file.kind != ".parquet":
        return {Part(file): file.bytes * (PACKED_TEXT_BYTES if file.is_packed else 1)}
    metadata = _open_parquet_text(file, text_column).metadata
    column = [metadata.schema.column(n).path for n in range(metadata.num_columns)].index(text_column)
    groups = (metadata.row_group(n).column(column) for n in range(metadata.num_row_groups))
    sizes = [group.total_uncompressed_size for group in groups]
    spans = spans_of(sizes, part_bytes)
    if len(spans) == 1:
        return {Part(file): sum(sizes)}
    return {Part(file, span): sum(sizes[slice(*span)]) for span in spans}


def spans_of(sizes: Sequence[int], limit: int) -> list[tuple[int, int]]:
    """Spans (first, end) of consecutive items of up to `limit` together, or of one larger item."""
    starts, held = [0], 0
    for number, size in enumerate(sizes):
        if held and held + size > limit:
            starts.append(number)
            held = 0
        held += size
    return list(itertools.pairwise([*starts, len(sizes)]))


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


def filter_documents(documents: Iterable[Document], on_bad_text: str) -> Iterator[FilteredDocument]:
    """Each document with its status: kept, repaired, empty or skipped.

    Raises ValueError at the first damaged text if on_bad_text is "fail".
    """
    for text, damage in documents:
        if damage is not None and on_bad_text == "fail":
            raise ValueError(f"{damage}; fix it, or give --on-bad-text replace or skip")
        status: DocumentStatus = "kept" if damage is None else "repaired"
        if status == "repaired" and on_bad_text == "skip":
            status = "skipped"
        elif not text:
            status = "empty"
        yield FilteredDocument(text, status)


def document_hash(text: str | bytes) -> tuple[int, int]:
    """128 bits that identify a text (or its UTF-8): two numbers below 2^64."""
    content = text.encode() if isinstance(text, str) else text
    digest = hashlib.blake2b(content, digest_size=16).digest()
    return int.from_bytes(digest[:8]), int.from_bytes(digest[8:])


def split_of(text: str, validation_fraction: float) -> str:
    """The split of a text, "train" or "validation".

    A pure function of the text: no document changes its split when others are added, removed or reordered.
    """
    return "validation" if document_hash(text)[0] / 2**64 < validation_fraction else "train"


def is_validation(records: Records, validation_fraction: float) -> NDArray[np.bool_]:
    """`split_of` for many documents at once, by their hashes."""
    falls_below: NDArray[np.bool_] = records["hash_high"] / 2.0**64 < validation_fraction
    return falls_below


def kept_mask(status: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which documents go into the shards."""
    return np.isin(status, [STATUSES.index(name) for name in KEPT])


def _read_text(part: Part) -> Iterator[Document]:
    with open_file(part.file) as file:
        for offset, piece in _pieces(file, part.file.address):
            yield _decode(piece, part.file.address, offset)


def _pieces(file: BinaryIO, address: str) -> Iterator[tuple[int, bytes]]:
    """(byte offset, bytes) of each document of a text file, without a byte order mark."""
    block = file.read(65_536)
    refuse_wide_encoding(block, address)
    offset = len(BYTE_ORDER_MARK) if block.startswith(BYTE_ORDER_MARK) else 0
    buffer, block = b"", block[offset:]
    while block:
        buffer += block
        while len(buffer) > LONGEST_PIECE_BYTES:
            end = end_of_piece(buffer)
            yield offset, buffer[:end]
            offset, buffer = offset + end, buffer[end:]
        block = file.read(65_536)
    if buffer:
        yield offset, buffer


def _read_json_file(part: Part, text_column: str) -> Iterator[Document]:
    offset, is_first = 0, True
    with open_file(part.file) as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                refuse_wide_encoding(line, part.file.address)
            content = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
            if part.file.kind == ".json" and is_first and content.lstrip().startswith(b"["):
                yield from _read_json_array(content, file, part.file.address, text_column)
                return
            if content.strip():
                is_first = False
                yield _read_json(content, f"{part.file.address} line {number:,}", offset, text_column)
            offset += len(line)


def _read_json_array(start: bytes, file: BinaryIO, address: str, text_column: str) -> Iterator[Document]:
    """The documents of an array; the last one is damaged if the rest is not JSON."""
    try:
        for where, item in json_items(start, file, address):
            yield _find_text(item, where, where, text_column, None)
    except DamagedFileError as error:
        yield Document("", str(error))


def json_items(start: bytes, file: BinaryIO, address: str) -> Iterator[tuple[str, Any]]:
    """(where it is, value) of each item of an array that begins with `start`.

    Reads a part of the file at a time: at least 64 KiB, or one item. Raises DamagedFileError.
    """
    decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
    text, place, number = decode(start).lstrip()[1:], 0, 1
    while True:
        where = f"{address} item {number:,}"
        try:
            item, place = _next_item(text, place, is_first=number == 1)
        except (ValueError, RecursionError):
            more = file.read(max(65_536, len(text) - place))
            if not more:
                raise DamagedFileError(f"{where} is not JSON, or the array has no end") from None
            text, place = text[place:] + decode(more), 0
            continue
        if item is None:
            if (text[place:] + decode(file.read())).strip():
                raise DamagedFileError(f"{address} has more after the end of its array: write one array")
            return
        yield where, item.value
        number += 1


class _Item(NamedTuple):
    """An item of an array, which may be null."""

    value: Any


def _next_item(text: str, place: int, *, is_first: bool) -> tuple[_Item | None, int]:
    """(the item of an array at `place` or None at the array's end, the place after it).

    Raises ValueError if the text is not JSON, or ends within the item or directly after it.
    """
    place = _after_blank(text, place)
    if text.startswith("]", place):
        return None, place + 1
    if not is_first:
        if not text.startswith(",", place):
            raise ValueError("no comma")
        place = _after_blank(text, place + 1)
    value, end = JSON_DECODER.raw_decode(text, place)
    return _Item(value), end


def _after_blank(text: str, place: int) -> int:
    return JSON_BLANK.match(text, place).end()  # type: ignore[union-attr]  # matches also nothing


def _read_json(line: bytes, where: str, offset: int, text_column: str) -> Document:
    """The document in one line of JSON; `offset` is the position of the line in the file."""
    decoded, damage = _decode(line, where, offset)
    where_in_bytes = f"{where} (byte {offset:,})"
    try:
        fields = json.loads(decoded)
    except (ValueError, RecursionError):
        return Document("", damage or f"{where_in_bytes} is not JSON")
    return _find_text(fields, where, where_in_bytes, text_column, damage)


def _find_text(fields: Any, where: str, exactly: str, text_column: str, damage: str | None) -> Document:
    """The document in an object of JSON; a column `data.text` is the field `text` of the field `data`."""
    if not isinstance(fields, dict):
        return Document("", damage or f"{exactly} is not a JSON object with named fields")
    names = [text_column] if text_column in fields else text_column.split(".")
    text: Any = fields
    for name in names:
        if not isinstance(text, dict):
            return Document("", damage or f"{exactly} holds no text in {text_column!r}")
        _require_column(name, list(text), where)
        text = text[name]
    if not isinstance(text, str):
        return Document("", damage or f"{exactly} holds no text in {text_column!r}")
    if SURROGATE.search(text):  # "\ud800" is legal JSON, but UTF-8 can't encode it
        text = SURROGATE.sub("\ufffd", text)
        damage = damage or f"{exactly} is not UTF-8: it escapes half a surrogate pair"
    return Document(text, damage)


def _read_parquet(part: Part, text_column: str) -> Iterator[Document]:
    file = _open_parquet_text(part.file, text_column)
    first, end = part.groups or (0, file.num_row_groups)
    first_row = sum(file.metadata.row_group(group).num_rows for group in range(first))
    values = _parquet_values(file, list(range(first, end)), part.file.address, text_column)
    for number, value in enumerate(values, start=first_row + 1):
        where = f"{part.file.address} row {number:,}"
        if value is None:
            yield Document("", f"{where} holds no text in {text_column!r}")
        else:
            text, damage = _decode(value, where)
            yield Document(text, damage and f"{damage} of its text")


def _parquet_values(file: Any, groups: list[int], address: str, text_column: str) -> Iterator[bytes | None]:
    """The text column as bytes: Parquet does not guarantee that a column of strings is UTF-8."""
    pyarrow = import_pyarrow(address)
    rows = 0
    try:
        for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, row_groups=groups, columns=[text_column]):
            values = batch.column(0)
            while pyarrow.types.is_struct(values.type):  # the one field that was asked for
                values = values.flatten()[0]
            if pyarrow.types.is_dictionary(values.type):  # a categorical column of pandas
                values = values.dictionary_decode()
            yield from values.cast(pyarrow.large_binary()).to_pylist()
            rows += batch.num_rows
    except (OSError, pyarrow.ArrowException) as error:
        raise DamagedFileError(f"{address} is damaged after row {rows:,}: {first_line(error)}") from None


def _open_parquet_text(file: TextFile, text_column: str) -> Any:
    """The pyarrow ParquetFile, once its text column is found to hold text."""
    opened = open_parquet(file)
    schema = opened.schema_arrow
    names = [text_column] if text_column in schema.names else text_column.split(".")
    _require_column(names[0], schema.names, file.address)
    if (count := schema.names.count(names[0])) > 1:
        raise ValueError(f"{file.address} has {count} columns {names[0]!r}: write it again with one of them")
    kind = schema.field(names[0]).type
    for name in names[1:]:
        fields = [kind.field(index).name for index in range(kind.num_fields)]
        _require_column(name, fields, f"{file.address} in {names[0]!r}")
        kind = kind.field(fields.index(name)).type
    kind = str(getattr(kind, "value_type", kind) if str(kind).startswith("dictionary") else kind)
    if kind not in TEXT_TYPES:
        raise ValueError(f"{file.address} holds {kind}, not text, in its column {text_column!r}")
    return opened


def _require_column(text_column: str, columns: list[str], where: str) -> None:
    if text_column not in columns:
        raise ValueError(
            f"{where} has no column {text_column!r}; name the one that holds the text "
            f"with --text-column: {', '.join(columns) or 'there is none'}"
        )


def _decode(data: bytes, where: str, offset: int = 0) -> Document:
    """The text, with U+FFFD for what is not UTF-8; `offset` is the position of the data in its file."""
    try:
        return Document(data.decode())
    except UnicodeDecodeError as error:
        damage = f"{where} is not UTF-8 at byte {offset + error.start:,}"
        return Document(data.decode(errors="replace"), damage)
