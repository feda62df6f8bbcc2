"""Counts the sites that the texts of a source come from, by a column of addresses."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from overnight.data.text_files import (
    BYTE_ORDER_MARK,
    TABLES,
    DamagedFileError,
    TextFile,
    first_line,
    import_pyarrow,
    list_files,
    open_file,
    open_parquet,
    refuse_wide_encoding,
)
from overnight.preparation.documents import json_items
from overnight.terminal import progress

MOST_DOMAINS = 1000  # in the JSON output; a terminal shows fewer
ROWS_AT_ONCE = 4096
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*:)?//")

Columns = tuple[str, str]  # the names of those that hold the address and the text
Row = tuple[object, int]  # value of the address column; bytes of text


@dataclass(frozen=True, kw_only=True)
class Domains:
    """The sites of a source, those with most documents first."""

    source: str
    files: int
    documents: int
    text_bytes: int
    documents_without: int
    """Documents whose address names no site."""
    sites: int
    top: tuple[dict[str, Any], ...]
    """name, documents, text_bytes; at most 1,000."""


def domain_of(address: object) -> str | None:
    """The host that an address names, without "www."; None if it names none."""
    if not isinstance(address, str):
        return None
    try:
        host = urlsplit(address if SCHEME.match(address) else f"//{address}").hostname
    except ValueError:
        return None
    if not host or any(character.isspace() for character in host):
        return None
    return host.removeprefix("www.").rstrip(".") or None


def count_domains(source: str, columns: Columns = ("url", "text"), documents: int | None = None) -> Domains:
    """Count the sites of a file, a folder or a URL, or of its first `documents` rows.

    Memory holds two numbers per site. Raises ValueError if no file has such columns, or one is damaged.
    """
    files = [file for file in list_files(source, columns[1]).files if file.kind in TABLES]
    if not files:
        raise ValueError(
            f"{source} holds texts without addresses: sites are read from .jsonl, .json and .parquet files"
        )
    counts: Counter[str | None] = Counter()
    text_bytes: Counter[str | None] = Counter()
    with progress("reading", sum(file.bytes for file in files) / 1e6, "MB") as advance:
        for address, size in itertools.islice(_rows(files, columns, advance), documents):
            site = domain_of(address)
            counts[site] += 1
            text_bytes[site] += size
    documents_without = counts.pop(None, 0)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], str(item[0])))
    return Domains(
        source=source,
        files=len(files),
        documents=counts.total() + documents_without,
        text_bytes=text_bytes.total(),
        documents_without=documents_without,
        sites=len(counts),
        top=tuple(
            {"name": site, "documents": count, "text_bytes": text_bytes[site]}
            for site, count in ordered[:MOST_DOMAINS]
        ),
    )


def _rows(files: Sequence[TextFile], columns: Columns, advance: Callable[..., None]) -> Iterator[Row]:
    for file in files:
        yield from _parquet_rows(file, columns) if file.kind == ".parquet" else _json_rows(file, columns)
        advance(file.bytes / 1e6)


def _json_rows(file: TextFile, columns: Columns) -> Iterator[Row]:
    with open_file(file) as lines:
        for number, line in enumerate(lines, start=1):
            if number == 1:
                refuse_wide_encoding(line, file.address)
            content = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
            if file.kind == ".json" and number == 1 and content.lstrip().startswith(b"["):
                for location, item in json_items(content, lines, file.address):
                    yield _json_row(item, location, columns)
                return
            if not content.strip():
                continue
            location = f"{file.address} line {number:,}"
            fields = None
            with contextlib.suppress(ValueError, RecursionError):
                fields = json.loads(content)
            yield _json_row(fields, location, columns)


def _json_row(fields: Any, location: str, columns: Columns) -> Row:
    if not isinstance(fields, dict):
        raise DamagedFileError(f"{location} is not a JSON object with named fields")
    _require(columns, list(fields), location)
    url, text = map(fields.get, columns)
    return url, len(text.encode("utf-8", "replace")) if isinstance(text, str) else 0


def _parquet_rows(file: TextFile, columns: Columns) -> Iterator[Row]:
    pyarrow = import_pyarrow(file.address)
    from pyarrow import compute

    opened = open_parquet(file)
    _require(columns, opened.schema_arrow.names, file.address)
    try:
        for batch in opened.iter_batches(batch_size=ROWS_AT_ONCE, columns=list(columns)):
            urls, texts = map(batch.column, columns)
            sizes = compute.fill_null(compute.binary_length(texts.cast(pyarrow.large_binary())), 0)
            yield from zip(urls.to_pylist(), sizes.to_pylist(), strict=True)
    except (OSError, KeyError, UnicodeDecodeError, pyarrow.ArrowException) as error:
        raise DamagedFileError(
            f"{file.address} is damaged, or its column is not text: {first_line(error)}"
        ) from None


def _require(columns: Columns, present: Sequence[str], location: str) -> None:
    """Raise ValueError if a column is missing."""
    for column, option in zip(columns, ("--url-column", "--text-column"), strict=True):
        if column not in present:
            raise ValueError(
                f"{location} has no column {column!r}: name it with {option}; "
                f"there is {', '.join(map(repr, present)) or 'none'}"
            )
