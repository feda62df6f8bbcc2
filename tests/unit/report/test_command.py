import shutil
from pathlib import Path

import pytest

from overnight.report import ReportConfig
from overnight.report.command import run


@pytest.fixture
def here(make_run, tmp_path, monkeypatch) -> Path:
    """A working directory with the runs "day" and "night"."""
    shutil.copytree(make_run("night", steps=3), tmp_path / "runs" / "day")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_report_writes_the_page_of_one_run(here, capsys):
    assert run(ReportConfig(runs=("night",))) == Path("runs/night/report.html")
    assert (here / "runs/night/report.html").is_file()
    assert capsys.readouterr().err.splitlines()[-1].startswith("next: overnight generate runs/night ")


def test_report_compares_several_runs(here):
    both = ("day", "runs/night", "runs/day")
    assert run(ReportConfig(runs=both)) == Path("runs/comparison.html")
    assert run(ReportConfig(runs=both, out="new/c.html")) == Path("new/c.html")
    assert (here / "new/c.html").read_text() == (here / "runs/comparison.html").read_text()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"runs": ("nigth",)}, "runs/night"),
        ({"runs": ()}, "name a run"),
        ({"runs": ("night",), "out": "runs"}, "--out=runs"),
    ],
)
def test_report_refuses(here, options, message):
    with pytest.raises(ValueError, match=message):
        run(ReportConfig(**options))
