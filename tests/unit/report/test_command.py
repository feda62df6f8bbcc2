import json
from pathlib import Path

import pytest

from overnight.report import command as report_command


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working directory with the runs "day" and "night" in it."""
    monkeypatch.chdir(tmp_path)
    for name in ("day", "night"):
        run = tmp_path / "runs" / name
        run.mkdir(parents=True)
        (run / "recipe.toml").write_text("[schedule]\ntotal_steps = 9\n")
        lines = [{"step": n, "tokens": 64 * n, "loss": 4.5} for n in (1, 2, 3)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_report_writes_the_page_of_one_run(here, capsys):
    assert report_command.run(report_command.ReportConfig(runs=("night",))) == Path("runs/night/report.html")
    assert (here / "runs/night/report.html").is_file()
    assert (
        capsys.readouterr().err.splitlines()[-1] == 'next: overnight generate runs/night "Once upon a time"'
    )


def test_report_compares_several_runs(here, capsys):
    both = ("day", "runs/night", "runs/day")
    assert report_command.run(report_command.ReportConfig(runs=both)) == Path("runs/comparison.html")
    assert report_command.run(report_command.ReportConfig(runs=both, out="c.html")) == Path("c.html")
    assert "comparison of 2 runs" in capsys.readouterr().err


def test_report_refuses_what_it_cannot_do(here):
    with pytest.raises(ValueError, match="did you mean runs/night?"):
        report_command.run(report_command.ReportConfig(runs=("nigth",)))
    with pytest.raises(ValueError, match="name the run"):
        report_command.run(report_command.ReportConfig(runs=()))
    with pytest.raises(ValueError, match="is a folder; name the file"):
        report_command.run(report_command.ReportConfig(runs=("night",), out="runs"))
