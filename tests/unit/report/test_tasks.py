"""What a page shows of the tasks that a run was judged on."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from overnight.report.page import report_page
from overnight.report.run_data import read_run

LINE = {"metric": "accuracy_per_token", "low": 0.2, "high": 0.3, "examples": 1000, "chance": 0.25}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of four steps, judged twice on two tasks."""
    (tmp_path / "events").mkdir()
    (tmp_path / "recipe.toml").write_text("total_steps = 4\n")
    steps = [{"step": step, "tokens": 10 * step, "loss": 4.0 - step / 10} for step in range(1, 5)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))
    judged = [
        {"step": step, "tokens": 10 * step, "task": task, "value": 0.24 + step / 1000, **LINE}
        for step in (2, 4)
        for task in ("hellaswag", "copa & more")
    ]
    perplexity = {
        "metric": "perplexity_per_word",
        "value": 1234.0,
        "low": 1000.0,
        "high": None,
        "chance": None,
    }
    judged.append({**judged[-1], "task": "hellaswag", **perplexity})
    (tmp_path / "events" / "tasks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in judged))
    return tmp_path


def rows(page: str) -> list[list[str]]:
    found = re.search(r"<h2>Tasks</h2>(.*?)</section>", page, re.DOTALL)
    assert found is not None
    return [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", found[1])]


def test_the_last_results_stand_open_and_all_of_them_folded(run: Path) -> None:
    page = report_page(read_run(run))
    found = [row for row in rows(page) if row]
    newest = ["hellaswag", "accuracy per token", "4", "0.2440", "0.2000 to 0.3000", "1,000", "0.2500"]
    assert found[0] == newest
    assert found[1][0] == "copa &amp; more"
    assert found[2][1:5] == ["perplexity per word", "4", "1,234", "1,000 to –"]
    assert len(found) == 3 + 5
    assert page.count('aria-label="accuracy per token of hellaswag over steps"') == 1
    assert "perplexity per word of hellaswag over steps" not in page, "one chart a task"


def test_without_tasks_there_is_no_such_part(run: Path) -> None:
    (run / "events" / "tasks.jsonl").unlink()
    assert "<h2>Tasks</h2>" not in report_page(read_run(run))


def test_a_damaged_line_is_named_and_the_others_are_shown(run: Path) -> None:
    with (run / "events" / "tasks.jsonl").open("a") as file:
        file.write('{"task": 5}\n{"step": 4, "task": "x", "metric": "y", "value": null}\n')
    page = report_page(read_run(run))
    assert "tasks.jsonl" in page
    assert len([row for row in rows(page) if row]) == 3 + 5


def test_a_run_that_went_back_says_so(run: Path) -> None:
    event = {"step": 3, "first_bad_step": 4, "last_bad_step": 6, "rows": 24}
    (run / "events" / "rollbacks.jsonl").write_text(json.dumps(event) + "\n")
    told = "steps 4 to 6 went wrong: the run went back to step 2 and on without their 24 rows"
    assert told in report_page(read_run(run))
