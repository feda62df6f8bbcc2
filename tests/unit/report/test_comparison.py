import json
import re

from overnight.report.compare import compare_runs, write_comparison


def rows(page: str) -> list[list[str]]:
    """The text of every table row's cells."""
    found = re.findall(r"<tr>(.*?)</tr>", page, flags=re.DOTALL)
    return [[re.sub(r"<[^>]*>", "", cell) for cell in re.findall(r"<t[dh].*?</t[dh]>", row)] for row in found]


def test_two_runs_side_by_side(make_run, tmp_path):
    runs = [
        make_run("day", steps=200, total_steps=200),
        make_run("night", steps=150, total_steps=200, seed=2),
    ]
    page = compare_runs(runs)
    table = rows(page)
    losses = [json.loads((r / "events/evaluations.jsonl").read_text().splitlines()[-1])["loss"] for r in runs]
    assert table[0][:3] == ["run", "validation", "training"]
    assert table[1][:2] == ["day", f"{losses[0]:.3f}"]
    assert table[2][:2] == ["night", f"{losses[1]:.3f}"]
    assert (table[1][-1], table[2][-1]) == ("finished", "stopped")
    assert page.count("<svg") == 2
    assert {"var(--run-1)", "var(--run-2)"} <= set(re.findall(r"var\(--run-\d\)", page))
    assert "Their recipes are the same" in page
    assert "did not all use the same data" not in page
    assert compare_runs(runs) == page
    assert write_comparison(runs, tmp_path / "c.html").read_text(encoding="utf-8") == page


def test_only_settings_that_differ_are_listed(make_run):
    page = compare_runs([make_run("a", steps=5), make_run("b", steps=5, peak=3e-4)])
    assert rows(page.split('id="what-differs"')[1]) == [
        ["setting", "a", "b"],
        ["peak_learning_rate", "0.0006", "0.0003"],
    ]


def test_the_best_run_is_marked_only_on_the_same_data(make_run):
    runs = [make_run("a", steps=20), make_run("b", steps=200)]
    page = compare_runs(runs)
    assert re.findall(r"</span>(.)</td><td class=\"number\"><span class=\"best\">", page) == ["b"]
    (runs[0] / "data.json").write_text("{}")
    page = compare_runs(runs)
    assert 'class="best"' not in page
    assert "did not all use the same data" in page


def test_runs_that_have_hardly_begun_can_be_compared(make_run):
    runs = [make_run(name, steps=steps) for name, steps in (("a", 1), ("b", 2), ("c", 1))]
    (runs[2] / "metrics.jsonl").unlink()
    (runs[2] / "events" / "evaluations.jsonl").unlink()
    assert compare_runs(runs).count("<svg") == 2
    assert "nothing to draw" in compare_runs([runs[0], runs[2]])


def test_runs_of_one_name_are_told_apart_by_their_paths(make_run):
    page = compare_runs([make_run("x/night", steps=3), make_run("y/night", steps=3)])
    assert re.search(r">[^<]*x/night<", page)
    assert re.search(r">[^<]*y/night<", page)


def test_more_runs_than_colours_are_dashed(make_run):
    page = compare_runs([make_run(f"run-{number}", steps=10, seed=number) for number in range(8)])
    assert page.count('class="swatch ring"') == 2
    assert "stroke-dasharray" in page


def test_names_are_escaped(make_run):
    page = compare_runs([make_run("<script>", steps=3), make_run("b", steps=3)])
    assert "<script" not in page
