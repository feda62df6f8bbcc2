import json
import re
from pathlib import Path

import pytest

from overnight.report import ReportConfig
from overnight.report.command import run
from overnight.report.compare import comparison_page

from .test_page import change_lines


def rows(page: str) -> list[list[str]]:
    """The text of every table row's cells."""
    found = re.findall(r"<tr>(.*?)</tr>", page, flags=re.DOTALL)
    return [[re.sub(r"<[^>]*>", "", cell) for cell in re.findall(r"<t[dh].*?</t[dh]>", row)] for row in found]


def test_two_runs_side_by_side(make_run, tmp_path, monkeypatch):
    runs = [
        make_run("day", steps=200, total_steps=200),
        make_run("night", steps=150, total_steps=200, seed=2),
    ]
    page = comparison_page(runs)
    _, day, night = rows(page)[:3]
    losses = [json.loads((r / "events/evaluations.jsonl").read_text().splitlines()[-1])["loss"] for r in runs]
    assert day[:2] == ["day", f"{losses[0]:.3f}"]
    assert night[:2] == ["night", f"{losses[1]:.3f}"]
    assert (day[-1], night[-1]) == ("finished", "stopped")
    assert page.count("<svg") == 1
    assert rows(page.split('id="what-differs"')[1]) == []
    assert 'class="notice"' not in page
    assert comparison_page(runs) == page
    # By the command, which names a run once.
    monkeypatch.chdir(tmp_path)
    both = ("day", "runs/night", "runs/day")
    assert run(ReportConfig(runs=both)) == Path("runs/comparison.html")
    assert run(ReportConfig(runs=both, out="new/c.html")).read_text(encoding="utf-8") == page


def test_only_settings_that_differ_are_listed(make_run):
    runs = [make_run("a", steps=5), make_run("b", steps=5, peak=3e-4), make_run("c", steps=5)]
    with (runs[2] / "recipe.toml").open("a") as recipe:
        recipe.write("[compute]\nbitwise = true\n")  # today's deterministic_reduce
    assert rows(comparison_page(runs).split('id="what-differs"')[1])[1:] == [
        ["peak_learning_rate", "0.0006", "0.0003", "0.0006"],
        ["deterministic_reduce", "–", "–", "yes"],
    ]


def test_best_run_is_marked_only_on_the_same_data(make_run):
    runs = [make_run("a", steps=20), make_run("b", steps=200)]
    page = comparison_page(runs)
    assert re.findall(r"</span>(.)</td><td class=\"number\"><span class=\"best\">", page) == ["b"]
    (runs[0] / "data.json").write_text("{}")
    page = comparison_page(runs)
    assert 'class="best"' not in page
    assert 'class="notice"' in page


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, "do not tell which run is best"),
        ({"low": None, "high": None}, "do not tell which run is best"),
        ({"loss": 9.0, "low": 8.9, "high": 9.1}, None),
    ],
)
def test_no_run_is_best_unless_its_interval_is_apart(make_run, changes, sentence):
    runs = [make_run(name, steps=200) for name in ("a", "b")]
    change_lines(runs[1] / "events" / "evaluations.jsonl", {-1: changes})
    page = comparison_page(runs)
    assert ('best">' in page) == (sentence is None), "the last case is the negative control"
    assert (sentence or "95% interval") in page
    assert ("--baseline" in page) == (sentence is not None)


def test_runs_of_other_precision_are_not_ranked(make_run):
    runs = [make_run("a", steps=20), make_run("b", steps=200)]
    environment = json.loads((runs[0] / "environment.json").read_text())
    (runs[0] / "environment.json").write_text(json.dumps(environment | {"precision": "fp32"}))
    page = comparison_page(runs)
    assert "different precisions, bfloat16, fp32" in page
    assert 'class="best"' not in page


def test_runs_of_one_step_can_be_compared(make_run):
    runs = [make_run(name, steps=steps) for name, steps in (("x/<b>", 1), ("b", 2), ("y/<b>", 1))]
    (runs[2] / "metrics.jsonl").unlink()
    (runs[2] / "events" / "evaluations.jsonl").unlink()
    assert comparison_page(runs).count("<svg") == 1
    page = comparison_page([runs[0], runs[2]])
    assert page.count("<svg") == 0
    assert re.search(r">[^<]*x/&lt;b&gt;<", page), "runs of one name have their paths"
    assert re.search(r">[^<]*y/&lt;b&gt;<", page)
    assert "<b>" not in page


def test_more_runs_than_colours_are_dashed(make_run):
    page = comparison_page([make_run(f"run-{number}", steps=10, seed=number) for number in range(8)])
    assert page.count('class="swatch ring"') == 2
    assert "stroke-dasharray" in page
