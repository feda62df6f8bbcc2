"""The report of a run, and the comparison of several runs.

Everything is read from run directories, and the text that compressors are measured on from the run's shards,
if they are here. Nothing imports torch, and matplotlib is imported only to draw curves, so a report can be
written again on any machine.

    run_data   the files of a run; smoothing and thinning of long series
    plots      matplotlib figures as SVG that follows the page's colours
    html       renders the templates of templates/
    page       write_report: one run
    compare    write_comparison: several runs
"""

from __future__ import annotations

from dataclasses import dataclass

from tyro.conf import Positional


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Write the report of a run: curves, samples, recipe and data; or a comparison of several runs."""

    runs: Positional[tuple[str, ...]]
    """Runs, by path or by name."""
    out: str | None = None
    """The file to write. Default: runs/NAME/report.html or runs/comparison.html."""
