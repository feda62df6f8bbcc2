import html
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from overnight.report.compare import comparison_page
from overnight.report.html import show_value, svg_file
from overnight.report.page import write_report
from overnight.report.plots import CHART_COLOURS

VOID = {"meta", "br", "link", "img", "hr", "input"}
SECTIONS = ["loss", "samples", "recipe", "data", "environment", "check-it-repeat-it"]


class Document(HTMLParser):
    """A page taken apart: fails on a tag closed out of turn; collects tags, attributes and text."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> out of turn"

    def handle_data(self, data):
        self.text += data

    def values(self, name: str) -> list[str]:
        return [value for key, value in self.attributes if key == name]

    def loads(self) -> list[str]:
        """Everything a browser would fetch or run for this page."""
        found = [tag for tag in self.tags if tag in {"script", "link", "img", "iframe", "object", "embed"}]
        for name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            found += [value for value in self.values(name) if not value.startswith("#")]
        found += [name for name, _ in self.attributes if name.startswith("on")]
        styles = " ".join([self.text, *self.values("style"), *self.values("clip-path")])
        found += [
            url for url in re.findall(r"url\(([^)]*)\)", styles) if not url.strip("\"'").startswith("#")
        ]
        return found + re.findall(r"@import|https?://", styles)


def report(run: Path) -> str:
    return write_report(run).read_text(encoding="utf-8")


def report_text(run: Path) -> str:
    return re.sub(r"\s+", " ", Document(report(run)).text)


def write_lines(path: Path, lines: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def change_lines(path: Path, changes: dict[int, dict[str, object]]) -> None:
    """Change the values of some lines of a JSON-lines file."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for at, values in changes.items():
        lines[at] |= values
    write_lines(path, lines)


@pytest.mark.parametrize(
    "loading",
    [
        '<img src="x.png">',
        '<p style="background: url(x)"></p>',
        '<p onclick="x()"></p>',
        "<style>@import 'x'</style>",
    ],
)
def test_the_check_of_a_page_can_fail(loading):
    assert Document(loading).loads()
    for broken in ("<p><b></p></b>", "<p>"):
        with pytest.raises(AssertionError, match="out of turn|never closed"):
            Document(broken)


def test_page_is_whole_escaped_and_loads_nothing(make_run):
    page = report(make_run("a<b>&'\"$night$"))
    document = Document(page)
    ids = document.values("id")
    assert document.loads() == []
    assert "default-src 'none'" in page
    assert len(page) < 200_000
    assert len(ids) == len(set(ids))
    assert [name for name in ids if name in {"as-a-compressor", *SECTIONS}] == ["as-a-compressor", *SECTIONS]
    assert document.tags.count("svg") == 4
    for shown in (
        "a<b>&'\"$night$",
        "<script>alert('out')</script> & so on.",
        "def f(x):\n    return x < 1 and x > 0 or \"quoted\" and 'single'\n    x = x + 1\n",
        "月が出た。Ça alors! \u202eright to left\u202c 🌙 \ufffd\ufffd[31m \ufffd \u2028 end",
        '["a <b>", "c"]',
        'overnight train gpt2-124m.toml --run-name="<night> & day"',
    ):
        assert shown in document.text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", page)

    # Each colour that matplotlib writes is replaced by a rule of the style sheet, in light and dark.
    drawings = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))
    drawn = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]+)", drawings))
    assert drawn == {CHART_COLOURS[name] for name in ("accent", "muted", "plain", "rule")}
    assert len(set(CHART_COLOURS.values())) == len(CHART_COLOURS)
    for name, colour in CHART_COLOURS.items():
        assert f'[style*="stroke: {colour}"] {{ stroke: var(--{name}) !important; }}' in page
        assert len(re.findall(rf"--{name}: #", page)) == 2, "light and dark"
    assert "--accent: " in svg_file("<svg></svg>")
    assert "main {" not in svg_file("<svg></svg>"), "the page's own rules stay in the page"


def test_values_of_files_as_text():
    shown = {True: "yes", None: "–", 9_999: "9999", 12_345: "12,345", "x": "x", "0": "0"}
    assert {value: show_value(value) for value in shown} == shown
    assert show_value(["ä", None]) == '["ä", null]'
    fingerprint = "0123456789abcdef" * 4
    assert Document(show_value(fingerprint)).text == "0123456789ab…"
    assert fingerprint in show_value(fingerprint)


TASK = {"task": "hellaswag", "metric": "accuracy_per_token", "low": 0.2, "high": 0.3, "examples": 1000}
OTHER = {"task": "copa & more", "metric": "perplexity_per_word", "value": 1234.0, "low": 1000.0, "high": None}


def add_tasks(run: Path) -> None:
    results = [{"step": step, "value": 0.24 + step / 1000, "chance": 0.25, **TASK} for step in (2, 4)]
    results += [{"step": step, **each} for step in (2, 4) for each in (OTHER, {"task": "x", "value": None})]
    write_lines(run / "events" / "tasks.jsonl", results)


def damage(run: Path) -> None:
    """Stopped in the middle, resumed, rolled back; some lines are damaged, and float16 has overflowed."""
    speeds = {at: {"mfu": 0.456, "mfu_executed": 0.431} for at in range(100)}
    change_lines(run / "metrics.jsonl", speeds | {70: {"grad_norm": None, "loss": None}})
    change_lines(run / "events" / "evaluations.jsonl", {-1: {"evaluated_bytes": 1_000_000}})
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[49] = "<damaged>"
    lines[60] = lines[61]
    (run / "metrics.jsonl").write_text("\n".join(lines) + '\n{"torn')
    (run / "data.json").write_text("{")
    with (run / "recipe.toml").open("a") as recipe:
        recipe.write('[compute]\nprecision = "fp16"\n')
    rollback = {"step": 3, "first_bad_step": 4, "last_bad_step": 6, "rows": 24}
    write_lines(run / "events" / "rollbacks.jsonl", [rollback])
    environment = json.loads((run / "environment.json").read_text())
    starts = [
        {"started_at": "2026-11-21T09:00:00+00:00", "command": "overnight train --resume 'runs/a b'"},
        {"started_at": "2026-11-22T09:00:00+00:00", "command": "overnight train", "compiled": False},
    ]
    (run / "environment.json").write_text(json.dumps({**environment, "resumed": starts}))


@pytest.mark.parametrize("change", [add_tasks, damage])
def test_page_shows_the_golden_text(make_run, tmp_path, change, pytestconfig):
    """The text without the drawings, a line for each line of the page; --golden-update rewrites it."""
    run = make_run(steps=100, total_steps=100 if change is add_tasks else 200)
    change(run)
    page = re.sub("<head>.*?</head>|<svg.*?</svg>", "", report(run), flags=re.DOTALL)
    lines = html.unescape(re.sub("<[^>]*>", " ", page)).replace(str(tmp_path), ".").split("\n")
    text = "".join(f"{' '.join(line.split())}\n" for line in lines if line.strip())
    golden = Path(__file__).parent / "golden" / f"{change.__name__}.txt"
    if pytestconfig.getoption("--golden-update"):
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8")


def test_same_run_gives_the_same_bytes(make_run):
    import matplotlib

    run = make_run(steps=300)
    first = report(run)
    with matplotlib.rc_context({"lines.linewidth": 9, "text.color": "red", "svg.fonttype": "path"}):
        assert report(run) == first
        assert matplotlib.rcParams["lines.linewidth"] == 9
    program = (
        "import sys, pathlib\n"
        "from overnight.report import compare, page\n"
        "assert 'matplotlib' not in sys.modules\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "page.write_report(path); compare.comparison_page([path] * 2)\n"
        "print([name for name in ('torch', 'matplotlib.pyplot') if name in sys.modules])"
    )
    command, environment = [sys.executable, "-c", program, str(run)], {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "[]"
    assert (run / "report.html").read_text(encoding="utf-8") == first


def test_missing_matplotlib_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for write in (write_report, lambda path: comparison_page([path, path])):
        with pytest.raises(ValueError, match=r"pip install 'overnight\[report\]'"):
            write(tmp_path)


@pytest.mark.parametrize(
    "file, sentence",
    [
        ("events/evaluations.jsonl", "No evaluation"),
        ("events/samples.jsonl", "No samples"),
        ("compression.json", ""),
        ("recipe.toml", "no readable recipe.toml"),
        ("environment.json", "no readable environment.json"),
        ("data.json", "no readable data.json"),
        ("metrics.jsonl", "No step is finished"),
    ],
)
def test_missing_file_is_replaced_by_a_sentence(make_run, file, sentence):
    run = make_run(steps=40, total_steps=40)
    assert not sentence or sentence not in report_text(run)
    (run / file).unlink()
    document = Document(report(run))
    assert sentence in document.text
    assert [name for name in document.values("id") if name in SECTIONS] == SECTIONS
    has_compressors = file not in {"compression.json", "events/evaluations.jsonl"}
    assert ("as-a-compressor" in document.values("id")) == has_compressors


@pytest.mark.parametrize("steps", [1, 2])
def test_run_of_very_few_steps_has_a_page(make_run, steps):
    run = make_run(steps=steps, total_steps=2)
    document = Document(report(run))
    assert ("svg" in document.tags) == (steps > 1)
    assert ("One step is finished" in document.text) == (steps == 1)
    for path in run.rglob("*.json*"):
        path.unlink()
    assert "damaged; " in report_text(run)  # there is a checkpoint
    shutil.rmtree(run / "checkpoints")
    assert "empty: " in report_text(run)


def test_stopped_run_shows_how_to_resume(make_run):
    run = make_run(steps=30, total_steps=50)
    text = report_text(run)
    assert "stopped at step 30 of 50" in text
    assert re.search(f"overnight train --resume '?{run}'? ", text)
    (run / "ended.json").write_text(json.dumps({"step": 30, "reason": "FloatingPointError: nan"}))
    assert "diverged at step 30 of 50" in report_text(run)


def test_numbers_that_are_not_finite_are_reported(make_run):
    run = make_run(steps=120)
    keys = ("loss", "grad_norm", "tokens_per_second", "milliseconds", "learning_rate", "mfu")
    for count, missing in ((1, float("inf")), (120, None), (120, float("nan"))):
        change_lines(run / "metrics.jsonl", {at: dict.fromkeys(keys, missing) for at in range(count)})
        assert re.search(f"not finite at {count} steps?, first at step 1", report_text(run))


@pytest.mark.parametrize(
    "precision, skipped, sentence",
    [
        ("fp16", [70, 71], "2 steps skipped: float16 overflow"),
        ("fp16", [0], "1 step skipped: float16 overflow"),
        ("fp16", [], None),
        ("bf16", [70, 71], None),  # nothing is skipped there: such a gradient ends in the weights
    ],
)
def test_steps_skipped_for_an_overflow_are_counted_and_leave_a_gap(make_run, precision, skipped, sentence):
    run = make_run(steps=120)
    whole = report(run)
    with (run / "recipe.toml").open("a") as recipe:
        recipe.write(f'\n[compute]\nprecision = "{precision}"\n')
    change_lines(run / "metrics.jsonl", {step: {"grad_norm": None, "loss": None} for step in skipped})
    page = report(run)
    assert re.findall(r"\d+ steps? skipped: float16 overflow", page) == ([sentence] if sentence else [])
    assert ("loss was not finite" in page) == bool(skipped)
    assert (gaps(page) > gaps(whole)) == (skipped == [70, 71])


def gaps(page: str) -> int:
    """The number of interruptions of the page's curves."""
    return sum(path.count("M ") - 1 for path in re.findall(r'<path d="(M [^"]*)"', page))
