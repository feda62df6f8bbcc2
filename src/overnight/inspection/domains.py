"""Which sites a source's texts come from, by the addresses that stand beside them."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from overnight.data.text_files import (
    DamagedFileError,
    TextFile,
    find_files,
    first_line,
    import_pyarrow,
    open_file,
    open_parquet,
)
from overnight.terminal import progress

WITH_COLUMNS = frozenset({".jsonl", ".parquet"})
MOST_DOMAINS = 1000  # that are told, in JSON; a terminal shows fewer
ROWS_AT_ONCE = 4096
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*:)?//")

Row = tuple[object, int]  # an address, or what stands there instead; bytes of text


@dataclass(frozen=True, kw_only=True)
class Domain:
    """One site."""

    name: str
    documents: int
    text_bytes: int


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
    top: tuple[Domain, ...]
    """At most 1,000."""


@dataclass(frozen=True)
class Columns:
    """Where the address and the text stand."""

    url: str = "url"
    text: str = "text"


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


def count_domains(source: str, columns: Columns, documents: int | None = None) -> Domains:
    """Count the sites of a file, a folder or a URL; of its first `documents` rows, if given.

    Memory holds two numbers a site. Raises ValueError if no file of it has such columns, or one is damaged.
    """
    files = [file for file in find_files(source) if file.kind in WITH_COLUMNS]
    if not files:
        raise ValueError(
            f"{source} holds texts without addresses: sites are read from .jsonl and .parquet files"
        )
    found: Counter[str | None] = Counter()
    text_bytes: Counter[str | None] = Counter()
    with progress("reading", sum(file.bytes for file in files) / 1e6, "MB") as advance:
        for address, size in itertools.islice(_rows(files, columns, advance), documents):
            site = domain_of(address)
            found[site] += 1
            text_bytes[site] += size
    nowhere = found.pop(None, 0)
    ordered = sorted(found.items(), key=lambda item: (-item[1], str(item[0])))
    return Domains(
        source=source,
        files=len(files),
        documents=found.total() + nowhere,
        text_bytes=text_bytes.total(),
        documents_without=nowhere,
        sites=len(found),
        top=tuple(
            Domain(name=str(site), documents=count, text_bytes=text_bytes[site])
            for site, count in ordered[:MOST_DOMAINS]
        ),
    )


def _rows(files: Sequence[TextFile], columns: Columns, advance: Callable[..., None]) -> Iterator[Row]:
    for file in files:
        yield from _json_rows(file, columns) if file.kind == ".jsonl" else _parquet_rows(file, columns)
        advance(file.bytes / 1e6)


def _json_rows(file: TextFile, columns: Columns) -> Iterator[Row]:
    with open_file(file) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError):
                fields = None
            if not isinstance(fields, dict):
                raise DamagedFileError(
                    f"{file.address} line {number:,} is not a JSON object with named fields"
                )
            _require(columns, list(fields), f"{file.address} line {number:,}")
            text = fields[columns.text]
            size = len(text.encode("utf-8", "replace")) if isinstance(text, str) else 0
            yield fields[columns.url], size


def _parquet_rows(file: TextFile, columns: Columns) -> Iterator[Row]:
    pyarrow = import_pyarrow(file.address)
    from pyarrow import compute

    opened = open_parquet(file)
    _require(columns, opened.schema_arrow.names, file.address)
    names = [columns.url, columns.text]
    try:
        for batch in opened.iter_batches(batch_size=ROWS_AT_ONCE, columns=names):
            texts = batch.column(columns.text).cast(pyarrow.large_binary())
            sizes = compute.fill_null(compute.binary_length(texts), 0)
            yield from zip(batch.column(columns.url).to_pylist(), sizes.to_pylist(), strict=True)
    except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
        raise DamagedFileError(
            f"{file.address} is damaged, or holds no text there: {first_line(error)}"
        ) from None


def _require(columns: Columns, present: Sequence[str], place: str) -> None:
    """Raise ValueError if a column is not there."""
    for column, option in ((columns.url, "--url-column"), (columns.text, "--text-column")):
        if column not in present:
            raise ValueError(
                f"{place} has no column {column!r}: name it with {option}; "
                f"there is {', '.join(map(repr, present)) or 'none'}"
            )
