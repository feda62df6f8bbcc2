"""The charts of a report, drawn by matplotlib as inline SVG.

Matplotlib writes each colour into a style attribute. style.css selects these attributes and replaces the
colours by the page's variables, so the drawings follow the page's light and dark themes.
"""

from __future__ import annotations

import importlib.util
import io
import logging
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from overnight.baselines.band import Series, columns_of
from overnight.report.run_data import RunData, smoothed
from overnight.terminal import scientific, short, significant

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CHART_COLOURS = {
    "muted": "#666b75",
    "rule": "#e3e3de",
    "plain": "#7b818c",
    "accent": "#2b50d8",
    "run-1": "#2b50d9",
    "run-2": "#b8471b",
    "run-3": "#147d64",
    "run-4": "#8e3fb0",
    "run-5": "#8a6a00",
    "run-6": "#c02b62",
}
"""The colours of the light theme by the names of their CSS variables. No two are equal: see above."""
MUTED, RULE, PLAIN, ACCENT, *RUN_COLOURS = CHART_COLOURS.values()
BAND_COLOURS = {"loss": PLAIN, "validation_loss": ACCENT}
"""The reference bands that are drawn, in the colours of the run's curves."""

TEXT_SIZE = 12.5
"""In CSS pixels at a chart's own width; style.css keeps charts near that width."""
PIXELS_PER_INCH = 72
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # a run may be called a$b$c
    "font.sans-serif": ["sans-serif", "DejaVu Sans"],
    "font.size": TEXT_SIZE,
    "text.color": MUTED,
    "axes.labelcolor": MUTED,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.edgecolor": RULE,
    "axes.linewidth": 1.0,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 1.0,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.solid_capstyle": "round",
}

SMOOTH_POINTS = 500
LOSS_COLUMNS = ("loss", "low", "high")
TASK_COLUMNS = ("step", "value", "low", "high", "chance")


class ChartLayout(NamedTuple):
    """A chart's size and margins in CSS pixels, and how much fits into it."""

    name: str
    size: tuple[int, int]
    """Width and height."""
    margins: tuple[int, int, int, int]
    """Top, right, bottom, left."""
    x_ticks: int
    y_ticks: int
    points: int
    """Most points of a curve that is not smoothed."""


WIDE = ChartLayout("wide", (880, 400), (30, 132, 30, 40), 8, 5, 1_500)
SMALL = ChartLayout("small", (300, 180), (10, 22, 26, 44), 3, 3, 750)


class LineEnd(NamedTuple):
    """The text at the end of a line, at `height` in the axis' units."""

    height: float
    text: str
    colour: str


def check_matplotlib() -> None:
    """Raise ValueError, with the command to install it, if the [report] extra is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("matplotlib draws a report's curves: pip install 'overnight[report]'")


@contextmanager
def new_chart(
    name: str, size: tuple[int, int], margins: tuple[int, int, int, int]
) -> Iterator[tuple[Figure, Axes]]:
    """A figure of (width, height) CSS pixels whose axes leave (top, right, bottom, left) pixels free.

    `name` must be unique on a page: it makes the ids inside the SVG unique and reproducible. The user's own
    matplotlib settings do not apply inside the context and are restored afterwards.
    """
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it can do without its cache, and says so
    import matplotlib
    from matplotlib.figure import Figure

    width, height = size
    top, right, bottom, left = margins
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE | {"svg.hashsalt": name})
        figure = Figure(figsize=(width / PIXELS_PER_INCH, height / PIXELS_PER_INCH), dpi=PIXELS_PER_INCH)
        inside = (width - left - right) / width, (height - top - bottom) / height
        yield figure, figure.add_axes((left / width, bottom / height, *inside))


def to_svg(figure: Figure, name: str) -> Markup:
    """The figure as an <svg> element. Its ids start with a hash of `name`, so a page may hold several."""
    figure.draw_without_rendering()  # creates the ticks, which need ids too
    prefix = f"c{zlib.crc32(name.encode()):08x}"
    for number, artist in enumerate(figure.findobj()):
        artist.set_gid(f"{prefix}-{number}")
    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    svg = buffer.getvalue()
    return Markup(svg[svg.index("<svg") :])  # without the XML declaration, which HTML does not allow


def loss_chart(run: RunData) -> Markup:
    """Training and validation loss over steps (below) and tokens (above), with the reference's bands."""
    steps, smooth = run.metrics["step"], run.smoothed_loss()
    evaluated_at, evaluated, lowest, highest = columns_of(run.evaluations, ("step", *LOSS_COLUMNS)).values()
    description = "Training and validation loss over steps and tokens"
    with new_chart(description, WIDE.size, WIDE.margins) as (figure, axes):
        for name, (at, low, high) in reference_bands(run).items():
            axes.fill_between(at, low, high, color=BAND_COLOURS[name], alpha=0.16, linewidth=0)
        _plot(axes, steps, run.metrics["loss"], WIDE.points, color=PLAIN, alpha=0.28, linewidth=0.7)
        _plot(axes, steps, smooth, SMOOTH_POINTS, color=PLAIN, linewidth=1.6)
        ends = [LineEnd(smooth[-1], f"training {significant(smooth[-1])}", PLAIN)]
        if evaluated.size:
            axes.fill_between(evaluated_at, lowest, highest, color=ACCENT, alpha=0.2, linewidth=0)
            axes.plot(evaluated_at, evaluated, color=ACCENT, linewidth=1.8, marker="o", markersize=5)
            ends.append(LineEnd(evaluated[-1], f"validation {significant(evaluated[-1])}", ACCENT))
        axes.set_xlim(0, steps[-1])
        axes.set_ylim(visible_loss([run], "step"))
        _set_ticks(axes, WIDE, "steps")
        _write_tokens_above(axes, run)
        _write_line_ends(axes, ends)
        return in_box(figure, description)


def comparison_chart(
    runs: Sequence[RunData], names: Sequence[str], styles: Sequence[int] | None = None
) -> Markup:
    """Training and validation loss of several runs over tokens.

    Runs of equal `styles` look alike; each has its own if they are left out. A run with the name "" has no
    name at the end of its line.
    """
    numbers = range(len(runs)) if styles is None else styles
    drawn = [(run, name, run_style(at)) for run, name, at in zip(runs, names, numbers, strict=True)]
    drawn = [each for each in drawn if each[0].steps >= 2]
    description = "Training and validation loss of every run over tokens"
    with new_chart(description, WIDE.size, WIDE.margins) as (figure, axes):
        ends = []
        for run, name, style in drawn:
            tokens, smooth = run.metrics["tokens"], run.smoothed_loss()
            at, evaluated, low, high = columns_of(run.evaluations, ("tokens", *LOSS_COLUMNS)).values()
            axes.fill_between(at, low, high, color=style["color"], alpha=0.12, linewidth=0)
            _plot(axes, tokens, smooth, SMOOTH_POINTS, alpha=0.5, linewidth=1.2, **style)
            axes.plot(at, evaluated, linewidth=1.8, marker="o", markersize=4, **style)
            text = name if len(name) <= 17 else f"{name[:16]}…"
            if name:
                ends.append(LineEnd(evaluated[-1] if evaluated.size else smooth[-1], text, style["color"]))
        axes.set_xlim(0, max(run.metrics["tokens"][-1] for run, _, _ in drawn) or 1)
        axes.set_ylim(visible_loss([run for run, _, _ in drawn], "tokens"))
        _set_ticks(axes, WIDE, "tokens")
        _write_line_ends(axes, ends)
        return in_box(figure, description)


def metric_chart(run: RunData, name: str) -> Markup:
    """A column of the metrics over steps; logarithmic if single values are far above the rest."""
    steps, series = run.metrics["step"], run.metrics[name]
    finite = series[np.isfinite(series)]
    top = float(finite.max()) or 1.0
    description = f"{name.replace('_', ' ')} over steps"
    with new_chart(description, SMALL.size, SMALL.margins) as (figure, axes):
        if name == "learning_rate":
            _plot(axes, steps, series, SMALL.points, color=PLAIN, linewidth=1.6)
        else:
            _plot(axes, steps, series, SMALL.points, color=PLAIN, alpha=0.28, linewidth=0.7)
            _plot(axes, steps, smoothed(series), SMOOTH_POINTS, color=PLAIN, linewidth=1.6)
        axes.set_xlim(0, steps[-1])
        if finite.min() > 0 and top > 20 * float(np.median(finite)):
            axes.set_yscale("log")
        else:
            axes.set_ylim(0, 1.08 * top)
        formats = {"learning_rate": scientific, "tokens_per_second": short}
        _set_ticks(axes, SMALL, "", formats.get(name, "{:g}".format))
        return in_box(figure, description, SMALL)


def task_chart(lines: Sequence[dict[str, Any]], description: str) -> Markup:
    """A task's results over steps with their intervals, and a dashed line at chance."""
    steps, values, low, high, chance = columns_of(lines, TASK_COLUMNS).values()
    with new_chart(description, SMALL.size, SMALL.margins) as (figure, axes):
        axes.fill_between(steps, low, high, color=PLAIN, alpha=0.15, linewidth=0)
        axes.plot(steps, values, color=PLAIN, linewidth=1.6, marker="o", markersize=3)
        axes.plot(steps, chance, color=PLAIN, linewidth=0.9, linestyle=(0, (3, 3)))
        axes.set_xlim(0, steps[-1])
        _set_ticks(axes, SMALL, "")
        return in_box(figure, description, SMALL)


def run_style(index: int) -> dict[str, Any]:
    """Colour and line style of the run at `index` of a comparison: six colours, then the same six dashed."""
    repeated, number = divmod(index, len(RUN_COLOURS))
    return {"color": RUN_COLOURS[number], "linestyle": "--" if repeated % 2 else "-"}


def visible_loss(runs: Sequence[RunData], against: str) -> tuple[float, float]:
    """The limits of the loss axis over `against`, "step" or "tokens".

    The first twentieth of a long run may exceed them: its fall from ln V would flatten the rest.
    """
    longest = max(runs, key=lambda run: run.metrics[against][-1:].sum())
    settled_at = longest.metrics[against][-1] / 20 if longest.steps >= 100 else 0
    parts = []
    for run in runs:
        evaluated_at, evaluated = columns_of(run.evaluations, (against, "loss")).values()
        at = np.concatenate([run.metrics[against], evaluated_at])
        losses = np.concatenate([run.smoothed_loss(), evaluated])
        parts.append(losses[np.isfinite(losses) & (at >= settled_at)])
        if against == "step":  # over tokens, several runs are drawn, without their references
            parts += [
                edge[(steps >= settled_at) & (steps <= at.max(initial=0))]
                for steps, *edges in reference_bands(run).values()
                for edge in edges
            ]
    finite = np.concatenate(parts)
    if not finite.size:
        return 0.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def reference_bands(run: RunData) -> dict[str, tuple[Series, Series, Series]]:
    """(steps, low, high) of each band that is drawn; {} without a reference.

    An average over a window of steps is drawn in the window's middle.
    """
    curves = run.comparison.band.curves if run.comparison and run.steps >= 2 else {}
    run_tokens = np.append(0.0, run.metrics["tokens"])
    run_steps = np.append(0.0, run.metrics["step"])
    found = {}
    for name in BAND_COLOURS.keys() & curves.keys():
        curve = curves[name]
        tokens = np.array(curve.tokens, np.float64)
        if name == "loss":
            tokens = (tokens + np.append(0.0, tokens[:-1])) / 2
        steps_ahead = np.maximum(tokens - run_tokens[-1], 0.0) / (run_tokens[-1] - run_tokens[-2])
        steps = np.interp(tokens, run_tokens, run_steps) + steps_ahead
        found[name] = (steps, np.array(curve.low), np.array(curve.high))
    return found


def thinned(series: Series, points: int) -> NDArray[np.int64]:
    """Indices of at most `points` values that look like the whole series: each part's lowest and highest.

    A spike of a single step stays visible. The first and the last value are always kept.
    """
    count = len(series)
    if count <= points:
        return np.arange(count)
    edges = np.linspace(0, count, max(1, (points - 2) // 2) + 1).astype(int)
    kept = {0, count - 1}
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        part = series[start:stop]
        if np.isfinite(part).any():
            kept |= {start + int(np.nanargmin(part)), start + int(np.nanargmax(part))}
    return np.array(sorted(kept), np.int64)


def spread(positions: Sequence[float], gap: float) -> list[float]:
    """Positions at least `gap` apart, in the same order and as near to the given ones as possible."""
    order = np.argsort(positions, kind="stable")
    groups: list[tuple[float, int]] = []  # (centre, number of members) of each run of touching labels
    for index in order:
        groups.append((positions[index], 1))
        while len(groups) > 1 and groups[-1][0] - groups[-2][0] < gap * (groups[-1][1] + groups[-2][1]) / 2:
            (low, before), (high, after) = groups[-2:]
            groups[-2:] = [((low * before + high * after) / (before + after), before + after)]
    placed = [centre + (rank - (count - 1) / 2) * gap for centre, count in groups for rank in range(count)]
    return [placed[rank] for rank in np.argsort(order)]


def in_box(figure: Figure, description: str, layout: ChartLayout = WIDE) -> Markup:
    """The chart in a box that scrolls where it is too wide; screen readers read out `description`."""
    svg = to_svg(figure, description)
    box = Markup('<div class="chart {}" role="img" aria-label="{}" tabindex="{}">{}</div>')
    return box.format(layout.name, description, 0 if layout is WIDE else -1, svg)


def _plot(axes: Axes, x: Series, y: Series, points: int, **style: Any) -> None:
    kept = thinned(y, points)
    axes.plot(x[kept], y[kept], **style)


def _set_ticks(
    axes: Axes, layout: ChartLayout, unit: str, format_y: Callable[[float], str] = "{:g}".format
) -> None:
    """Few round numbers on both axes, and the horizontal axis' unit after its last number."""
    axes.locator_params(axis="x", nbins=layout.x_ticks, steps=[1, 2, 5, 10], integer=True)
    axes.xaxis.set_major_formatter(lambda number, _: short(number))
    if axes.get_yscale() == "log":
        axes.locator_params(axis="y", numticks=4)
    else:
        axes.locator_params(axis="y", nbins=layout.y_ticks, steps=[1, 2, 2.5, 5, 10])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda number, _: format_y(number))
    axes.tick_params(axis="x", pad=7)
    _write(axes, unit, (1, 0), (24, -7), xycoords="axes fraction", va="top")


def _write_tokens_above(axes: Axes, run: RunData) -> None:
    """Round numbers of tokens above the steps that reached them; the batch size may have changed."""
    steps = np.append(0.0, run.metrics["step"])
    tokens = np.append(0.0, run.metrics["tokens"])
    for number in axes.xaxis.get_major_locator().tick_values(0, tokens[-1]):
        if number <= tokens[-1]:
            at = float(np.interp(number, tokens, steps))
            _write(axes, short(number), (at, 1), (0, 8), xycoords=axes.get_xaxis_transform(), ha="center")
    _write(axes, "tokens", (1, 1), (24, 8), xycoords="axes fraction")


def _write(axes: Axes, text: str, at: tuple[float, float], shift: tuple[int, int], **style: Any) -> None:
    """Write `text` `shift` pixels from the point `at`, which is in units of `xycoords`."""
    axes.annotate(text, at, shift, textcoords="offset points", **style)


def _write_line_ends(axes: Axes, ends: Iterable[LineEnd]) -> None:
    """Names at the lines' ends instead of a legend, moved apart where they would overlap."""
    ends = [end for end in ends if np.isfinite(end.height)]
    low, high = axes.get_ylim()
    top, _, bottom, _ = WIDE.margins
    gap = 1.35 * TEXT_SIZE * (high - low) / (WIDE.size[1] - top - bottom)
    heights = spread([min(max(end.height, low), high) for end in ends], gap)
    lift = max(0.0, low + gap / 2 - min(heights, default=high))
    for end, height in zip(ends, heights, strict=True):
        at = (1, height + lift)
        _write(
            axes, end.text, at, (10, 0), xycoords=axes.get_yaxis_transform(), va="center", color=end.colour
        )
