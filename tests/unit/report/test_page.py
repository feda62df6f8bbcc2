import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from overnight.report.compare import compare_runs
from overnight.report.page import write_report

VOID = {"meta", "br", "link", "img", "hr", "input"}
SECTIONS = ["loss", "samples", "recipe", "data", "environment", "check-it-repeat-it"]


class Document(HTMLParser):
    """A page taken apart: fails on a tag closed out of turn; collects tags, attributes, text and sections."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []
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
        self.text.append(data)

    def values(self, name: str) -> list[str]:
        return [value for key, value in self.attributes if key == name]


def loads(document: Document, page: str) -> list[str]:
    """Everything a browser would fetch, or run, for this page."""
    found = [tag for tag in document.tags if tag in {"script", "link", "img", "iframe", "object", "embed"}]
    for name in ("src", "href", "xlink:href", "srcset", "action", "data"):
        found += [value for value in document.values(name) if not value.startswith("#")]
    found += [name for name, _ in document.attributes if name.startswith("on")]
    found += [url for url in re.findall(r"url\(([^)]*)\)", page) if not url.strip("\"'").startswith("#")]
    return found + re.findall(r"@import|https?://", page)


def report(run: Path) -> str:
    return write_report(run).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(tmp_path_factory, request) -> str:
    write_run = request.getfixturevalue("write_a_run")
    return report(write_run(tmp_path_factory.mktemp("page") / "a<b>&'\"$night$"))


def test_the_balance_and_the_loads_can_fail():
    with pytest.raises(AssertionError, match="out of turn"):
        Document("<p><b></p></b>")
    with pytest.raises(AssertionError, match="never closed"):
        Document("<p>")
    for bad in (
        '<img src="x.png">',
        '<p style="background: url(x)">',
        '<p onclick="x()">',
        "<style>@import 'x'",
    ):
        parser = Document.__new__(Document)
        HTMLParser.__init__(parser)
        parser.open, parser.tags, parser.attributes, parser.text = [], [], [], []
        parser.feed(bad)
        assert loads(parser, bad), bad


def test_a_page_is_whole_and_loads_nothing(page):
    document = Document(page)
    assert loads(document, page) == []
    assert "default-src 'none'" in page
    assert len(page) < 200_000


def test_a_page_has_every_section_once(page):
    document = Document(page)
    ids = document.values("id")
    assert len(ids) == len(set(ids))
    assert [name for name in ids if name in {"as-a-compressor", *SECTIONS}] == ["as-a-compressor", *SECTIONS]
    assert document.tags.count("svg") == 5


def test_what_comes_from_files_is_escaped_and_kept(page):
    document = Document(page)
    text = "".join(document.text)
    assert "a<b>&'\"$night$" in text
    assert "<script>alert('out')</script> & so on." in text
    assert "def f(x):\n    return x < 1 and x > 0 or \"quoted\" and 'single'\n    x = x + 1\n" in text
    assert "月が出た。Ça alors! \u202eright to left\u202c 🌙 \ufffd\ufffd[31m \ufffd \u2028 end" in text
    assert '["a <b>", "c"]' in text
    assert 'overnight train gpt2-124m.toml --run-name="<night> & day"' in text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", page)


def test_the_figures_are_the_last_ones_the_run_wrote(make_run):
    run = make_run()
    text = "".join(Document(report(run)).text)
    last = json.loads((run / "events" / "evaluations.jsonl").read_text().splitlines()[-1])
    for name in ("loss", "perplexity", "bits_per_byte"):
        assert f"{last[name]:.4g}" in text
    assert "finished: all 2,000 steps" in text
    assert "1.05B" in text
    assert "124M" in text
    assert "started 2026-11-20 22:14 UTC" in text
    assert "xz given the training text" in text


def test_the_same_run_gives_the_same_bytes(make_run):
    import matplotlib

    run = make_run(steps=300)
    first = report(run)
    assert report(run) == first
    with matplotlib.rc_context({"lines.linewidth": 9, "text.color": "red", "svg.fonttype": "path"}):
        assert report(run) == first
        assert matplotlib.rcParams["lines.linewidth"] == 9
    program = (
        "import sys, pathlib; from overnight.report.page import write_report\n"
        "write_report(pathlib.Path(sys.argv[1]))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", program, str(run)], check=True, env=environment)
    assert (run / "report.html").read_text(encoding="utf-8") == first


def test_colours_follow_the_page(page):
    pictures = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))
    assert set(re.findall(r"var\(--[a-z0-9-]+\)", pictures)) == {
        *("var(--accent)", "var(--muted)", "var(--plain)", "var(--rule)")
    }
    assert re.findall(r"(?:fill|stroke): #[0-9a-f]+", pictures) == []
    assert "prefers-color-scheme: dark" in page


def test_a_report_imports_no_torch(make_run):
    run = make_run(steps=20)
    program = (
        "import sys, pathlib\n"
        "from overnight.report.page import write_report\n"
        "from overnight.report.comparison import compare_runs\n"
        "assert 'matplotlib' not in sys.modules\n"
        "write_report(pathlib.Path(sys.argv[1])); compare_runs([pathlib.Path(sys.argv[1])] * 2)\n"
        "print([name for name in ('torch', 'matplotlib.pyplot') if name in sys.modules])"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program, str(run)], capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "[]"


def test_without_matplotlib_the_remedy_is_named(make_run, monkeypatch):
    run = make_run(steps=3)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'overnight\[report\]'"):
        write_report(run)
    with pytest.raises(ValueError, match=r"pip install 'overnight\[report\]'"):
        compare_runs([run, run])
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(
    "file, sentence",
    [
        ("events/evaluations.jsonl", "No evaluation was made so far"),
        ("events/samples.jsonl", "No samples were drawn."),
        ("compression.json", "finished: all 40 steps"),
        ("recipe.toml", "The run directory holds no readable recipe.toml."),
        ("environment.json", "The run directory holds no readable environment.json."),
        ("data.json", "The run directory holds no readable data.json."),
        ("metrics.jsonl", "No step is finished yet, so there is nothing to draw."),
    ],
)
def test_a_part_that_is_missing_is_left_out_with_a_sentence(make_run, file, sentence):
    run = make_run(steps=40, total_steps=40)
    everything = "".join(Document(report(run)).text)
    (run / file).unlink()
    page = report(run)
    document = Document(page)
    assert sentence in "".join(document.text)
    assert (sentence in everything) == (file == "compression.json")
    assert [name for name in document.values("id") if name in SECTIONS] == SECTIONS
    has_rivals = file not in {"compression.json", "events/evaluations.jsonl"}
    assert ("as-a-compressor" in document.values("id")) == has_rivals


def test_a_folder_with_nothing_but_a_recipe_has_a_page(make_run):
    run = make_run(steps=1)
    for name in ("metrics.jsonl", "environment.json", "data.json", "compression.json"):
        (run / name).unlink()
    for name in ("evaluations", "samples"):
        (run / "events" / f"{name}.jsonl").unlink()
    page = report(run)
    assert "empty: no step is finished yet" in page
    assert loads(Document(page), page) == []


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_run_of_very_few_steps_has_a_page(make_run, steps):
    page = report(make_run(steps=steps, total_steps=2))
    document = Document(page)
    assert ("svg" in document.tags) == (steps > 1)
    assert ("One step is finished; curves begin with the second." in page) == (steps == 1)


def test_a_stopped_run_says_how_to_go_on(make_run):
    run = make_run(steps=30, total_steps=50)
    text = "".join(Document(report(run)).text)
    assert "stopped at step 30 of 50" in text
    assert f"overnight train --resume '{run}'" in text or f"overnight train --resume {run}" in text


def test_a_resumed_run_says_when_and_on_what_else(make_run):
    run = make_run(steps=30)
    assert "Resumed" not in report(run)
    environment = json.loads((run / "environment.json").read_text())
    starts = [
        {"started_at": "2026-11-21T09:00:00+00:00", "command": "overnight train --resume 'runs/a b'"},
        {"started_at": "2026-11-22T09:00:00+00:00", "command": "overnight train", "compiled": False},
    ]
    (run / "environment.json").write_text(json.dumps({**environment, "resumed": starts}))
    text = "".join(Document(report(run)).text)
    assert "Resumed 2 times" in text
    assert starts[0]["command"] in text
    assert text.index("2026-11-22T09:00:00+00:00") < text.index("no", text.index("Resumed"))
    assert environment["command"] in text


def test_damage_is_named_on_the_page_and_the_rest_is_shown(make_run):
    run = make_run(steps=120)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[49] = "<damaged>"
    lines[60] = lines[61]
    (run / "metrics.jsonl").write_text("\n".join(lines) + '\n{"torn')
    (run / "data.json").write_text("{")
    text = "".join(Document(report(run)).text)
    assert "metrics.jsonl line 50 is damaged and left out; it begins '<damaged>'" in text
    assert "metrics.jsonl has a torn last line" in text
    assert "metrics.jsonl tells of 1 steps more than once" in text
    assert "data.json cannot be read and is left out" in text
    assert "damaged; last seen at step 120" in text


def test_a_loss_that_is_not_finite_is_told(make_run):
    run = make_run(steps=120)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines[70]["loss"], lines[71]["loss"], lines[71]["grad_norm"] = None, float("inf"), float("nan")
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "not finite at 2 steps, first at step 71" in report(run)


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_a_run_that_only_diverged_still_has_a_page(make_run, missing):
    run = make_run(steps=5)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    keys = ("loss", "grad_norm", "tokens_per_second", "milliseconds", "learning_rate", "mfu")
    broken = [{**line, **dict.fromkeys(keys, missing)} for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in broken))
    document = Document(report(run))
    assert "not finite at 5 steps" in "".join(document.text)


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
    with (run / "recipe.toml").open("a") as recipe:
        recipe.write(f'\n[compute]\nprecision = "{precision}"\n')
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for step in skipped:
        lines[step] |= {"grad_norm": None, "loss": None}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = report(run)
    assert re.findall(r"\d+ steps? skipped: float16 overflow", page) == ([sentence] if sentence else [])
    assert ("the training loss was not finite" in page) == bool(skipped)
    if skipped == [70, 71]:  # two strokes of the pen for each thin line instead of one
        assert gaps(page) > gaps(report(make_run("full", steps=120)))


def gaps(page: str) -> int:
    """How often a curve of the page begins anew."""
    return sum(path.count("M ") - 1 for path in re.findall(r'<path d="(M [^"]*)"', page))


def test_both_definitions_of_mfu_have_their_names(make_run):
    run = make_run(steps=20)
    text = "".join(Document(report(run)).text)
    assert "MFU, median (6N + 12LCT)" in text
    assert "executed FLOPs" not in text
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [{**line, "mfu": 0.456, "mfu_executed": 0.431} for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = re.sub(r"\s+", " ", "".join(Document(report(run)).text))
    assert "MFU, median (6N + 12LCT)45.6%" in text
    assert "MFU, median (executed FLOPs)43.1%" in text


def test_older_samples_are_folded_and_the_newest_come_first(make_run):
    page = report(make_run(steps=100))
    at = [page.index(f"step {step} · ") for step in (100, 80, 60)]
    assert at == sorted(at)
    assert page.index("Samples of 2 earlier steps") < page.index("step 40 · ")


def test_texts_of_unequal_length_are_admitted(make_run):
    run = make_run(steps=20)
    assert "The compressors were given" not in report(run)
    rivals = json.loads((run / "compression.json").read_text())
    (run / "compression.json").write_text(json.dumps({**rivals, "bytes": 1_000_000}))
    assert "The compressors were given 1M bytes of it, the model 4.72M." in report(run)


def test_a_report_can_be_written_elsewhere(make_run, tmp_path):
    run = make_run(steps=3)
    assert write_report(run, tmp_path / "new" / "page.html") == tmp_path / "new" / "page.html"
    assert not (run / "report.html").exists()
