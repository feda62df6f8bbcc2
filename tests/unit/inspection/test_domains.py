from __future__ import annotations

import gzip
import json

import pytest

from overnight.inspection.domains import Domains, count_domains, domain_of

ROWS = [
    {"url": "https://www.example.org/a?b=c", "text": "zwölf"},
    {"url": "http://example.org:8080/", "text": "bb"},
    {"url": "https://user@News.Example.com/x", "text": "ccc"},
    {"url": "example.net/path", "text": "d"},
    {"url": None, "text": "ee"},
    {"url": "", "text": "f"},
    {"url": "http://[bad", "text": "g"},
]
TOP = (
    {"name": "example.org", "documents": 2, "text_bytes": 8},
    {"name": "example.net", "documents": 1, "text_bytes": 1},
    {"name": "news.example.com", "documents": 1, "text_bytes": 3},
)


def write_lines(path, rows):
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


@pytest.mark.parametrize("write_table", [True, False])
def test_domains_of_a_folder_of_all_kinds(tmp_path, write_table):
    if write_table:
        parquet = pytest.importorskip("pyarrow.parquet")
        table = pytest.importorskip("pyarrow").Table.from_pylist(ROWS[:3])
        parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    else:
        write_lines(tmp_path / "a.jsonl", ROWS[:3])
    write_lines(tmp_path / "b.jsonl", ROWS[3:4])
    (tmp_path / "d.json").write_text(json.dumps(ROWS[4:5], indent=1))
    write_lines(tmp_path / "c.jsonl.gz", ROWS[5:])
    (tmp_path / "notes.txt").write_text("no addresses here")
    counts = {"documents": 7, "text_bytes": 16, "documents_without": 3, "sites": 3}
    assert count_domains(str(tmp_path)) == Domains(source=str(tmp_path), files=4, **counts, top=TOP)
    first = count_domains(str(tmp_path), documents=2)
    assert (first.documents, first.top) == (2, TOP[:1])


def test_domains_need_their_columns(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"site": "https://a.org", "body": "x"}])
    assert count_domains(path, ("site", "body")).sites == 1
    with pytest.raises(ValueError, match=r"a\.jsonl line 1 .* 'url'.* --url-column"):
        count_domains(path, ("url", "body"))
    with pytest.raises(ValueError, match=r"'text'.* --text-column.* 'site', 'body'"):
        count_domains(path, ("site", "text"))


@pytest.mark.parametrize(
    "name, content, complaint",
    [
        ("a.txt", "x", "holds texts without addresses"),
        ("b.jsonl", '{"url": "https://a.org", "text": "x"}\n[1]\n', r"b\.jsonl line 2"),
        ("b.json", '[{"url": "https://a.org", "text": "x"}, 7]', r"b\.json item 2 is not a JSON object"),
        ("b.json", '[{"url": "https://a.org", "text": "x"}, ', r"b\.json item 2 is not JSON"),
        ("b.parquet", '{"url": "https://a.org", "text": "x"}\n', r"b\.parquet is damaged"),
    ],
)
def test_domains_refuse_files_without_columns_and_damaged_ones(tmp_path, name, content, complaint):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=complaint):
        count_domains(str(tmp_path))


@pytest.mark.parametrize(
    "addresses, domain",
    [
        (
            ["https://www.a.org", "HTTPS://A.ORG.", "//a.org/x", "a.org", "a.org/b//c?d=https://e.org"],
            "a.org",
        ),
        (["https://www2.a.org"], "www2.a.org"),
        (["see here", "https://", 7], None),
    ],
)
def test_domain_of_address(addresses, domain):
    assert {domain_of(address) for address in addresses} == {domain}
