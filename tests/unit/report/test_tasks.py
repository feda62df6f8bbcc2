"""What a page shows of tasks."""

import json
import re

import pytest

from overnight.report.page import report_page
from overnight.report.run_data import read_run

LINE = {"metric": "accuracy_per_token", "low": 0.2, "high": 0.3, "examples": 1000, "chance": 0.25}
PERPLEXITY = {"metric": "perplexity_per_word", "value": 1234.0, "low": 1000.0, "high": None, "chance": None}


@pytest.fixture
def run(make_run):
    """A run of four steps, evaluated twice on two tasks."""
    path = make_run(steps=4)
    lines = [
        {"step": step, "tokens": 10 * step, "task": task, "value": 0.24 + step / 1000, **LINE}
        for step in (2, 4)
        for task in ("hellaswag", "copa & more")
    ]
    lines.append({**lines[-1], "task": "hellaswag", **PERPLEXITY})
    (path / "events" / "tasks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def rows(page: str) -> list[list[str]]:
    found = re.search(r'<section id="tasks">(.*?)</section>', page, re.DOTALL)
    assert found is not None
    return [
        re.findall(r"<td[^>]*>(.*?)</td>", row)
        for row in re.findall(r"<tr>(.*?)</tr>", found[1])
        if "<td" in row
    ]


def test_latest_results_are_open_and_all_are_folded(run):
    page = report_page(read_run(run))
    newest = ["hellaswag", "accuracy per token", "4", "0.2440", "0.2000 to 0.3000", "1,000", "0.2500"]
    found = rows(page)
    assert found[0] == newest
    assert found[1][0] == "copa &amp; more"
    assert found[2][1:5] == ["perplexity per word", "4", "1,234", "1,000 to –"]
    assert len(found) == 3 + 5
    assert page.count('aria-label="accuracy per token of hellaswag over steps"') == 1
    assert "perplexity per word of hellaswag over steps" not in page, "one chart for each task"


def test_damaged_line_is_reported_and_a_missing_file_leaves_no_section(run):
    with (run / "events" / "tasks.jsonl").open("a") as file:
        file.write('{"task": 5}\n{"step": 4, "task": "x", "metric": "y", "value": null}\n')
    page = report_page(read_run(run))
    assert "tasks.jsonl line 6" in page
    assert len(rows(page)) == 3 + 5
    (run / "events" / "tasks.jsonl").unlink()
    assert 'id="tasks"' not in report_page(read_run(run))
