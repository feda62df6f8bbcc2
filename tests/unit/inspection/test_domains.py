from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from overnight.inspection.domains import count_domains, domain_of

ROWS = [
    {"url": "https://www.example.org/a?b=c", "text": "zwölf"},
    {"url": "http://example.org:8080/", "text": "bb"},
    {"url": "https://user@News.Example.com/x", "text": "ccc"},
    {"url": "example.net/path", "text": "d"},
    {"url": None, "text": "ee"},
    {"url": "", "text": "f"},
    {"url": "http://[bad", "text": "g"},
]
EXPECTED = (
    {"name": "example.org", "documents": 2, "text_bytes": 8},
    {"name": "example.net", "documents": 1, "text_bytes": 1},
    {"name": "news.example.com", "documents": 1, "text_bytes": 3},
)


def write_lines(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return str(path)


@pytest.mark.parametrize("write_table", [True, False])
def test_domains_of_a_folder_of_all_kinds(tmp_path: Path, write_table: bool) -> None:
    if write_table:
        parquet = pytest.importorskip("pyarrow.parquet")
        table = pytest.importorskip("pyarrow").Table.from_pylist(ROWS[:3])
        parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    else:
        write_lines(tmp_path / "a.jsonl", ROWS[:3])
    write_lines(tmp_path / "b.jsonl", ROWS[3:5])
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write("\n".join(map(json.dumps, ROWS[5:])))
    (tmp_path / "notes.txt").write_text("no addresses here")
    found = count_domains(str(tmp_path))
    assert found.top == EXPECTED
    assert (found.files, found.documents, found.documents_without, found.sites) == (3, 7, 3, 3)
    assert found.text_bytes == 16
    first = count_domains(str(tmp_path), documents=2)
    assert (first.documents, first.top) == (2, EXPECTED[:1])


def test_domains_need_their_columns(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"site": "https://a.org", "body": "x"}])
    assert count_domains(path, ("site", "body")).sites == 1
    with pytest.raises(ValueError, match=r"a\.jsonl line 1 .* 'url'.* --url-column"):
        count_domains(path, ("url", "body"))
    with pytest.raises(ValueError, match=r"'text'.* --text-column.* 'site', 'body'"):
        count_domains(path, ("site", "text"))


def test_domains_refuse_files_without_columns_and_damaged_ones(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=str(tmp_path)):
        count_domains(str(tmp_path))
    (tmp_path / "b.jsonl").write_text('{"url": "https://a.org", "text": "x"}\n[1]\n')
    with pytest.raises(ValueError, match=r"b\.jsonl line 2"):
        count_domains(str(tmp_path))
    (tmp_path / "b.jsonl").rename(tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"b\.parquet is damaged"):
        count_domains(str(tmp_path))


def test_domain_of_address() -> None:
    for address in (
        "https://www.a.org",
        "HTTPS://A.ORG.",
        "//a.org/x",
        "a.org",
        "a.org/b//c?d=https://e.org",
    ):
        assert domain_of(address) == "a.org"
    assert domain_of("https://www2.a.org") == "www2.a.org"
    for address in ("see here", "https://", 7):
        assert domain_of(address) is None
