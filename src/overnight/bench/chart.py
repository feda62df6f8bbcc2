"""The results of a benchmark as a bar chart in SVG."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from overnight.bench.table import BenchRecord, Figures, bench_figures, milliseconds_text
from overnight.report.html import svg_file
from overnight.report.plots import ACCENT, MUTED, RUN_COLOURS, new_chart, to_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, ROW = 880, 34
MARGINS = (80, 240, 18, 150)
"""In CSS pixels around the bars: top, right, bottom, left."""
COLUMNS = {"ms/step": 150, "total": 216}
"""Right edges of the figures next to the bars, in pixels from the end of the longest bar."""
BAR_SHARE = 0.56
"""Share of a row's height."""
WRONG = RUN_COLOURS[1]


def bench_svg(record: BenchRecord) -> str:
    """A bar for each variant, proportional to its speed; the reason for a skipped one."""
    figures = bench_figures(record)
    top, _, bottom, left = MARGINS
    height = top + bottom + ROW * len(record.variants)
    speeds = {
        variant.name: [record.tokens_per_step / each * 1e3 for each in variant.milliseconds]
        for variant in record.measured
    }
    with new_chart("ladder", (WIDTH, height), MARGINS) as (figure, axes):
        axes.set_axis_off()
        axes.set_xlim(0, max(map(max, speeds.values())))
        axes.set_ylim(len(record.variants) - 0.5, -0.5)
        _write(axes, record.title, (0, -0.5), (24 - left, 48), size=15)
        _write(axes, "tokens per second; the line spans all rounds", (0, -0.5), (0, 14))
        _write_columns(axes, -0.5, list(COLUMNS), 14)
        for row, variant in enumerate(record.variants):
            _write(axes, variant.name, (0, row), (-12, 0), horizontalalignment="right")
            if variant.name in figures:
                _draw_bar(axes, row, speeds[variant.name], figures[variant.name])
            else:
                _write(axes, f"skipped: {variant.skipped}", (0, row), (0, 0))
        return svg_file(to_svg(figure, f"Tokens per second by variant: {record.title}"))


def _draw_bar(axes: Axes, row: int, rounds: Sequence[float], figures: Figures) -> None:
    """Bar, spread and figures of one variant; the colour shows whether its losses are right."""
    colour = ACCENT if figures.is_equal else WRONG
    opacity = 0.25 + 0.75 * figures.tokens_per_second / axes.get_xlim()[1]
    axes.barh(row, figures.tokens_per_second, BAR_SHARE, color=colour, alpha=opacity)
    axes.plot([min(rounds), max(rounds)], [row, row], color=MUTED, linewidth=1.2)
    words = f"{figures.tokens_per_second:,.0f}{'' if figures.is_equal else '  NOT EQUAL'}"
    _write(axes, words, (max(rounds), row), (10, 0), color=colour)
    _write_columns(axes, row, [milliseconds_text(figures.milliseconds), f"{figures.total:.2f}x"], 0)


def _write_columns(axes: Axes, row: float, words: Sequence[str], lift: int) -> None:
    """Figures next to the bars, `lift` pixels above the middle of the row."""
    for text, end in zip(words, COLUMNS.values(), strict=True):
        _write(axes, text, (axes.get_xlim()[1], row), (end, lift), horizontalalignment="right")


def _write(axes: Axes, text: str, at: tuple[float, float], shift: tuple[int, int], **style: Any) -> None:
    """Write `shift` pixels from a point, centred vertically."""
    axes.annotate(text, at, shift, textcoords="offset points", verticalalignment="center_baseline", **style)
