"""The command `overnight report`: the page about one run, or a comparison of several."""

from __future__ import annotations

from pathlib import Path

from overnight.report import ReportConfig
from overnight.report.compare import write_comparison
from overnight.report.page import write_report
from overnight.runs.status import find_run
from overnight.terminal import echo, shell_command


def run(config: ReportConfig) -> Path:
    """Write the page and return its path. Raises ValueError if there is no such run."""
    if not config.runs:
        raise ValueError("name a run, as in `overnight report runs/quickstart`")
    runs = list(dict.fromkeys(find_run(name) for name in config.runs))
    out = Path(config.out) if config.out else None
    if out and out.is_dir():
        raise ValueError(f"--out={config.out} is a folder; name the file, as in --out={out / 'report.html'}")
    if len(runs) > 1:
        written = write_comparison(runs, out or runs[0].parent / "comparison.html")
        echo(f"wrote {written}, a comparison of {len(runs)} runs; open it in a browser")
        echo(f"next: {shell_command('report', runs[0])}")
    else:
        written = write_report(runs[0], out)
        echo(f"wrote {written}; open it in a browser")
        echo(f'next: {shell_command("generate", runs[0])} "Once upon a time"')
    return written
