"""Copy the charts of a page that `overnight` wrote into SVG files, for the documentation.

    python tools/charts.py runs/ablate-modern/ablate.html docs/images/ablation

Writes docs/images/ablation-1.svg, -2.svg, ... in the order of the page, in the colours of its light theme.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

CHART = re.compile(r'<div class="chart [^>]*>\s*(<svg.*?</svg>)', re.DOTALL)
LIGHT = 'style="background: #fff; font-family: sans-serif" '
"""A picture inside another page does not know whether that page is light or dark."""


def read_charts(page: str) -> list[str]:
    """The charts of a page, each as a file of its own."""
    return [f"<svg {LIGHT}{chart.removeprefix('<svg ')}\n" for chart in CHART.findall(page)]


def main() -> None:
    """Write one file for each chart."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("page", type=Path, help="report.html or ablate.html")
    parser.add_argument("prefix", help="the files' names, without -1.svg")
    options = parser.parse_args()
    charts = read_charts(options.page.read_text(encoding="utf-8"))
    if not charts:
        raise SystemExit(f"{options.page} has no charts")
    for number, chart in enumerate(charts, start=1):
        path = Path(f"{options.prefix}-{number}.svg")
        path.write_text(chart, encoding="utf-8")
        print(f"{path}  {len(chart):,} bytes")


if __name__ == "__main__":
    main()
