"""The morning page, the comparison of several runs, and how each run is doing.

Everything here is read from run directories alone; nothing imports torch, and matplotlib only where
a curve is drawn, so that a report can be made again on any laptop.

    words        numbers as a person reads them
    lines        JSON-lines files, read tolerantly: what is damaged is named, not hidden
    status       one line about each run, from the ends of its files
    record       everything a run wrote, read for a page
    curves       smoothing and thinning of long series
    drawing      matplotlib figure -> small SVG whose colours follow the page
    plots        the loss chart, the small charts, the overlay of several runs
    markup       escaping, tables, the page around them (style.css)
    headline     the top of a run's page: state, numbers, rivals
    page         write_report: one run
    comparison   compare_runs: several
    ladder       what `overnight ladder` measured, and what follows from it
    ladder_table the same as a table, for a terminal and as Markdown
    ladder_plot  the same as a picture
"""

from __future__ import annotations

from dataclasses import dataclass

from tyro.conf import Positional


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """One page about a run: its curves, samples, recipe and data. With several runs: a comparison."""

    runs: Positional[tuple[str, ...]]
    """Runs, by path or by name."""
    out: str | None = None
    """Where the page is written; runs/NAME/report.html or runs/comparison.html if left out."""
