"""The speed ladder as a picture: an SVG file that stands by itself, light or dark as its reader has it."""

from __future__ import annotations

import importlib.resources
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from overnight.report.drawing import ACCENT, MUTED, RUN_COLOURS, house_style, new_axes, to_svg
from overnight.report.ladder import Figures, LadderRecord, RungRecord, ladder_figures
from overnight.report.ladder_table import about, milliseconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, ROW = 880, 34
MARGINS = (80, 240, 18, 150)
"""In CSS pixels, what the bars leave free: top, right, bottom, left."""
COLUMNS = {"ms/step": 150, "total": 216}
"""Where the figures beside the bars end, in pixels from the longest bar's end."""
BAR_SHARE = 0.56
"""Of a row's height."""
WRONG = RUN_COLOURS[1]


def ladder_svg(ladder: LadderRecord) -> str:
    """A bar for each rung, as long as it is fast, in order; a skipped one has its reason instead."""
    figures = ladder_figures(ladder)
    top, _, bottom, left = MARGINS
    height = top + bottom + ROW * len(ladder.rungs)
    with house_style("ladder"):
        figure, axes = new_axes((WIDTH, height), MARGINS)
        axes.set_axis_off()
        axes.set_xlim(0, max(max(speeds(rung, ladder)) for rung in ladder.climbed))
        axes.set_ylim(len(ladder.rungs) - 0.5, -0.5)
        _write(axes, about(ladder), (0, -0.5), (24 - left, 48), size=15)
        _write(axes, "tokens per second; the line spans all rounds", (0, -0.5), (0, 14))
        _write_columns(axes, -0.5, list(COLUMNS), 14)
        for place, rung in enumerate(ladder.rungs):
            _write(axes, rung.name, (0, place), (-12, 0), horizontalalignment="right")
            if rung.name in figures:
                _draw_rung(axes, place, speeds(rung, ladder), figures[rung.name])
            else:
                _write(axes, f"skipped: {rung.skipped}", (0, place), (0, 0))
        return _standalone(to_svg(figure, f"Tokens per second, rung by rung: {about(ladder)}"), height)


def speeds(rung: RungRecord, ladder: LadderRecord) -> list[float]:
    """Tokens per second of each round."""
    return [ladder.tokens_per_step / each * 1e3 for each in rung.milliseconds]


def _draw_rung(axes: Axes, place: int, rounds: list[float], figures: Figures) -> None:
    """Bar, spread and figures of one rung; the colour says whether it computes what it should."""
    colour = ACCENT if figures.is_equal else WRONG
    opacity = 0.25 + 0.75 * figures.tokens_per_second / axes.get_xlim()[1]
    axes.barh(place, figures.tokens_per_second, BAR_SHARE, color=colour, alpha=opacity)
    axes.plot([min(rounds), max(rounds)], [place, place], color=MUTED, linewidth=1.2)
    words = f"{figures.tokens_per_second:,.0f}{'' if figures.is_equal else '  NOT EQUAL'}"
    _write(axes, words, (max(rounds), place), (10, 0), color=colour)
    _write_columns(axes, place, [milliseconds(figures.milliseconds), f"{figures.total:.2f}x"], 0)


def _write_columns(axes: Axes, place: float, words: Sequence[str], lift: int) -> None:
    """One row of the figures beside the bars, `lift` pixels above its place."""
    for text, end in zip(words, COLUMNS.values(), strict=True):
        at = (axes.get_xlim()[1], place)
        _write(axes, text, at, (end, lift), horizontalalignment="right")


def _write(axes: Axes, text: str, at: tuple[float, float], shift: tuple[int, int], **style: Any) -> None:
    """Write `shift` pixels from a place, in the middle of its height."""
    axes.annotate(text, at, shift, textcoords="offset points", verticalalignment="center_baseline", **style)


def _standalone(svg: str, height: int) -> str:
    """An <svg> element for a page as a file: with the page's colours and fonts, on its paper."""
    page = importlib.resources.files("overnight.report").joinpath("style.css").read_text(encoding="utf-8")
    colours = page.split("\n* {")[0]  # its variables, light and dark, stand before its rules
    style = (
        colours + "\ntext { font-family: var(--text); font-variant-numeric: tabular-nums; white-space: pre; }"
    )
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    paper = '<rect width="100%" height="100%" fill="var(--paper)"/>'
    opening, content = svg.split(">", 1)
    size = f'width="{WIDTH}" height="{height}"'
    return f"{opening} {spaces} {size}>\n<style>\n{style}\n</style>\n{paper}{content}\n"
