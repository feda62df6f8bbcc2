"""A matplotlib figure as a small inline SVG: its text in the page's font, its colours the page's variables.

Figures are drawn in CSS pixels with placeholder colours. Each placeholder then becomes `var(--name)`,
which style.css defines once for light and once for dark.
"""

from __future__ import annotations

import importlib.util
import io
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from overnight.report.html import Markup, escape
from overnight.report.run_data import RunData, Series, smoothed, spread, thinned
from overnight.terminal import scientific, short, significant

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that no drawing would use by chance.
RUN_COLOURS = tuple(f"#0f1e{number:02x}" for number in range(16, 22))
PLACEHOLDERS = {
    "#0f1e01": "muted",
    "#0f1e02": "rule",
    "#0f1e03": "accent",
    "#0f1e04": "math",
    **{colour: f"run-{number}" for number, colour in enumerate(RUN_COLOURS, start=1)},
}
MUTED, RULE, ACCENT, PLAIN = ("#0f1e01", "#0f1e02", "#0f1e03", "#0f1e04")

TEXT_SIZE = 12.5
"""In CSS pixels at a chart's own width; style.css keeps charts near that width."""

PIXELS_PER_INCH = 72

SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # a run may be called a$b$c
    "axes.unicode_minus": True,
    "path.simplify": True,
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
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.solid_capstyle": "round",
    "lines.solid_joinstyle": "round",
}


def check_matplotlib() -> None:
    """Raise ValueError, saying what to install, if the [report] extra is not there."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("a report's curves are drawn by matplotlib: pip install 'overnight[report]'")


@contextmanager
def house_style(name: str) -> Iterator[None]:
    """Draw in here. Whatever style the user has set up elsewhere counts for nothing, and is back afterwards.

    `name` makes the ids inside the SVG unlike those of the page's other drawings, the same each time.
    """
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(SETTINGS)
        matplotlib.rcParams["svg.hashsalt"] = name
        yield


def new_axes(size: tuple[int, int], margins: tuple[int, int, int, int]) -> tuple[Figure, Axes]:
    """A figure of (width, height) CSS pixels whose axes leave (top, right, bottom, left) pixels free."""
    from matplotlib.figure import Figure

    width, height = size
    top, right, bottom, left = margins
    figure = Figure(figsize=(width / PIXELS_PER_INCH, height / PIXELS_PER_INCH), dpi=PIXELS_PER_INCH)
    axes = figure.add_axes(
        (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
    )
    return figure, axes


def to_svg(figure: Figure, description: str, css: str = "") -> Markup:
    """The figure as an <svg> element for the middle of a page; screen readers read out `description`."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    width, height = (round(inches * PIXELS_PER_INCH) for inches in figure.get_size_inches())
    attributes = f'viewBox="0 0 {width} {height}" role="img" aria-label="{escape(description)}"'
    return Markup(f'<svg class="{escape(css)}" {attributes}>{_without_ballast(buffer.getvalue())}</svg>')


REPLACEMENTS: Sequence[tuple[str, str]] = (
    (r"(?s)^.*?<svg[^>]*>|</svg>\s*$", ""),
    (r"(?s)<metadata>.*?</metadata>", ""),
    (r"(?s)<style.*?</style>", ""),  # its rules would hold for the whole page
    (r'(<g) id="[^"]*"', r"\1"),  # numbered from 1 in each drawing, so not unique in a page
    (r"font-size: ([\d.]+)px; font-family: [^;\"]*", r"font-size: \1px"),
    (r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px"),  # the shorthand of matplotlib before 3.9
    (r' transform="rotate\(-0 [^"]*"', ""),
    (r"\s*\n\s*", " "),
    (r"<defs>\s*</defs>", ""),
    (r"> +<", "><"),
)


def _without_ballast(svg: str) -> str:
    for pattern, replacement in REPLACEMENTS:
        svg = re.sub(pattern, replacement, svg)
    svg = re.sub(r' (?:d|x|y)="[^"]*"', _rounded, svg)
    for placeholder, name in PLACEHOLDERS.items():
        svg = svg.replace(placeholder, f"var(--{name})")
    return svg


def _rounded(coordinates: re.Match[str]) -> str:
    """A tenth of a pixel is enough."""
    return re.sub(r"(\.\d)\d+", r"\1", coordinates[0])


# ---------------------------------------------------------------- the charts of a report


REFERENCES = {"loss": PLAIN, "validation_loss": ACCENT}
"""The curves of a reference that are drawn, in the colours of the run's own."""
TASK_COLUMNS = ("step", "value", "low", "high", "chance")
RAW_POINTS = 1_500
SMOOTH_POINTS = 500


@dataclass(frozen=True, kw_only=True)
class ChartLayout:
    """A chart's size in CSS pixels, and how much fits into it."""

    css: str
    size: tuple[int, int]
    margins: tuple[int, int, int, int]
    """Top, right, bottom, left."""
    ticks: int
    raw_points: int


WIDE = ChartLayout(css="wide", size=(880, 400), margins=(30, 132, 30, 40), ticks=8, raw_points=RAW_POINTS)
NARROW = ChartLayout(
    css="narrow", size=(400, 330), margins=(30, 78, 30, 34), ticks=3, raw_points=RAW_POINTS // 2
)
SMALL = ChartLayout(css="", size=(300, 180), margins=(10, 22, 26, 44), ticks=3, raw_points=RAW_POINTS // 2)


@dataclass(frozen=True, kw_only=True)
class LineEnd:
    """What to write beside the end of a line, `height` in the axis' units."""

    height: float
    text: str
    colour: str


def run_style(index: int) -> dict[str, Any]:
    """How the run at `index` of a comparison is drawn: six colours, then the same six dashed."""
    repeated, number = divmod(index, len(RUN_COLOURS))
    return {"color": RUN_COLOURS[number], "linestyle": "--" if repeated % 2 else "-"}


def loss_charts(record: RunData) -> Markup:
    """Training and validation loss over steps (below) and tokens (above)."""
    return Markup(_loss_chart(record, WIDE) + _loss_chart(record, NARROW))


def overlay_charts(records: Sequence[RunData], names: Sequence[str]) -> Markup:
    """The losses of several runs over tokens. Narrow, it has no names: the table's colours tell."""
    return Markup(_overlay_chart(records, names, WIDE) + _overlay_chart(records, [], NARROW))


def learning_rate_chart(record: RunData) -> Markup:
    """The learning rate of every step."""
    return _small_chart(record, "learning_rate", scientific, is_smoothed=False)


def gradient_chart(record: RunData) -> Markup:
    """The gradient's norm before clipping; on a logarithmic axis if single steps tower above the rest."""
    return _small_chart(record, "grad_norm", "{:g}".format, is_smoothed=True)


def throughput_chart(record: RunData) -> Markup:
    """Tokens per second of every step."""
    return _small_chart(record, "tokens_per_second", short, is_smoothed=True)


def task_chart(lines: Sequence[dict[str, Any]], description: str) -> Markup:
    """A task's results over steps, with their intervals, and a dashed line where guessing is."""
    columns = [np.array([line.get(name, np.nan) for line in lines], float) for name in TASK_COLUMNS]
    steps, values, low, high, chance = columns
    with house_style(description):
        figure, axes = new_axes(SMALL.size, SMALL.margins)
        axes.fill_between(steps, low, high, color=PLAIN, alpha=0.15, linewidth=0)
        axes.plot(steps, values, color=PLAIN, linewidth=1.6, marker="o", markersize=3)
        axes.plot(steps, chance, color=PLAIN, linewidth=0.9, linestyle=(0, (3, 3)))
        axes.set_xlim(0, steps[-1])
        _set_ticks(axes, SMALL, "")
        return to_svg(figure, description)


def visible_loss(records: Sequence[RunData], against: str) -> tuple[float, float]:
    """The ends of the loss axis over `against`, which the first twentieth of a long run may exceed.

    The fall from ln V would otherwise flatten all that comes after it.
    """
    longest = max(records, key=lambda record: record.metrics[against][-1:].sum())
    settled_at = longest.metrics[against][-1] / 20 if longest.steps >= 100 else 0
    parts = []
    for record in records:
        evaluated_at, evaluated = evaluated_losses(record, against)
        at = np.concatenate([record.metrics[against], evaluated_at])
        losses = np.concatenate([record.smoothed_loss(), evaluated])
        parts.append(losses[np.isfinite(losses) & (at >= settled_at)])
        if against == "step":  # over tokens, several runs are drawn, without their references
            parts += [
                edge[(steps >= settled_at) & (steps <= at.max(initial=0))]
                for steps, *edges in references(record).values()
                for edge in edges
            ]
    finite = np.concatenate(parts)
    if not finite.size:
        return 0.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def evaluated_losses(record: RunData, against: str) -> tuple[Series, Series]:
    """(`against`, loss) of every evaluation; `against` is "step" or "tokens"."""
    rows = np.array([[line[against], line["loss"]] for line in record.evaluations], np.float64).reshape(-1, 2)
    return rows[:, 0], rows[:, 1]


def references(record: RunData) -> dict[str, tuple[Series, Series, Series]]:
    """(steps, low, high) of each curve of the reference that is drawn; {} if there is no reference.

    What was taken over a stretch of steps lies in its middle.
    """
    curves = record.verdict.band.curves if record.verdict and record.steps >= 2 else {}
    seen = np.append(0.0, record.metrics["tokens"])
    steps = np.append(0.0, record.metrics["step"])
    found = {}
    for name in REFERENCES.keys() & curves.keys():
        curve = curves[name]
        tokens = np.array(curve.tokens, np.float64)
        if name == "loss":
            tokens = (tokens + np.append(0.0, tokens[:-1])) / 2
        ahead = np.maximum(tokens - seen[-1], 0.0) / (seen[-1] - seen[-2])
        found[name] = (np.interp(tokens, seen, steps) + ahead, np.array(curve.low), np.array(curve.high))
    return found


def _loss_chart(record: RunData, layout: ChartLayout) -> Markup:
    steps, smooth = record.metrics["step"], record.smoothed_loss()
    evaluated_at, evaluated = evaluated_losses(record, "step")
    with house_style(f"loss {layout.css}"):
        figure, axes = new_axes(layout.size, layout.margins)
        for name, (at, low, high) in references(record).items():
            axes.fill_between(at, low, high, color=REFERENCES[name], alpha=0.16, linewidth=0)
        _plot(axes, steps, record.metrics["loss"], layout.raw_points, color=PLAIN, alpha=0.28, linewidth=0.7)
        _plot(axes, steps, smooth, SMOOTH_POINTS, color=PLAIN, linewidth=1.6)
        ends = [LineEnd(height=smooth[-1], text=_labelled("training", smooth[-1], layout), colour=PLAIN)]
        if evaluated.size:
            axes.plot(evaluated_at, evaluated, color=ACCENT, linewidth=1.8, marker="o", markersize=5)
            label = _labelled("validation", evaluated[-1], layout)
            ends.append(LineEnd(height=evaluated[-1], text=label, colour=ACCENT))
        axes.set_xlim(0, steps[-1])
        axes.set_ylim(visible_loss([record], "step"))
        _set_ticks(axes, layout, "steps")
        _write_tokens_above(axes, record, layout)
        _write_line_ends(axes, ends, layout)
        return to_svg(figure, "Training and validation loss over steps and tokens", layout.css)


def _overlay_chart(records: Sequence[RunData], names: Sequence[str], layout: ChartLayout) -> Markup:
    drawn = [index for index, record in enumerate(records) if record.steps >= 2]
    ends = []
    with house_style(f"overlay {layout.css}"):
        figure, axes = new_axes(layout.size, layout.margins if names else (10, 66, 30, 34))
        for index in drawn:
            height = _plot_run(axes, records[index], **run_style(index))
            if names:
                ends.append(
                    LineEnd(height=height, text=_clipped(names[index]), colour=run_style(index)["color"])
                )
        axes.set_xlim(0, max(records[index].metrics["tokens"][-1] for index in drawn) or 1)
        axes.set_ylim(visible_loss([records[index] for index in drawn], "tokens"))
        _set_ticks(axes, layout, "tokens")
        _write_line_ends(axes, ends, layout)
        return to_svg(figure, "Training and validation loss of every run over tokens", layout.css)


def _plot_run(axes: Axes, record: RunData, **style: Any) -> float:
    """Draw one run's two losses over tokens; returns the height at which they end."""
    smooth = record.smoothed_loss()
    evaluated_at, evaluated = evaluated_losses(record, "tokens")
    _plot(axes, record.metrics["tokens"], smooth, SMOOTH_POINTS, alpha=0.5, linewidth=1.2, **style)
    axes.plot(evaluated_at, evaluated, linewidth=1.8, marker="o", markersize=4, **style)
    return float(evaluated[-1] if evaluated.size else smooth[-1])


def _small_chart(record: RunData, name: str, words: Callable[[float], str], is_smoothed: bool) -> Markup:
    steps, series = record.metrics["step"], record.metrics[name]
    finite = series[np.isfinite(series)]
    top = float(finite.max()) or 1.0
    with house_style(name):
        figure, axes = new_axes(SMALL.size, SMALL.margins)
        if is_smoothed:
            _plot(axes, steps, series, SMALL.raw_points, color=PLAIN, alpha=0.28, linewidth=0.7)
            _plot(axes, steps, smoothed(series), SMOOTH_POINTS, color=PLAIN, linewidth=1.6)
        else:
            _plot(axes, steps, series, SMALL.raw_points, color=PLAIN, linewidth=1.6)
        axes.set_xlim(0, steps[-1])
        if finite.min() > 0 and top > 20 * float(np.median(finite)):
            axes.set_yscale("log")
        else:
            axes.set_ylim(0, 1.08 * top)
        _set_ticks(axes, SMALL, "", words)
        return to_svg(figure, f"{name.replace('_', ' ')} over steps")


def _plot(axes: Axes, x: Series, y: Series, points: int, **style: Any) -> None:
    kept = thinned(y, points)
    axes.plot(x[kept], y[kept], **style)


def _set_ticks(
    axes: Axes, layout: ChartLayout, unit: str, words: Callable[[float], str] | None = None
) -> None:
    """Few round numbers on both axes, and the horizontal axis' unit behind its last number."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    axes.xaxis.set_major_locator(MaxNLocator(layout.ticks, steps=[1, 2, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda number, _: short(number)))
    axes.yaxis.set_major_locator(
        LogLocator(numticks=4)
        if axes.get_yscale() == "log"
        else MaxNLocator(5 if layout.css else 3, steps=[1, 2, 2.5, 5, 10])
    )
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda number, _: words(number) if words else f"{number:g}"))
    axes.tick_params(axis="x", pad=7)
    _write(axes, unit, (1, 0), (24, -7), xycoords="axes fraction", va="top")


def _write_tokens_above(axes: Axes, record: RunData, layout: ChartLayout) -> None:
    """Round numbers of tokens above the steps that reached them; the batch may have grown in between."""
    from matplotlib.ticker import MaxNLocator

    steps = np.append(0.0, record.metrics["step"])
    tokens = np.append(0.0, record.metrics["tokens"])
    place = axes.get_xaxis_transform()
    for number in MaxNLocator(layout.ticks, steps=[1, 2, 5, 10]).tick_values(0, tokens[-1]):
        if number <= tokens[-1]:
            at = float(np.interp(number, tokens, steps))
            _write(axes, short(number), (at, 1), (0, 8), xycoords=place, ha="center")
    _write(axes, "tokens", (1, 1), (24, 8), xycoords="axes fraction")


def _write(axes: Axes, text: str, at: tuple[float, float], shift: tuple[int, int], **style: Any) -> None:
    """Write `shift` pixels from the place `at`, which is in the units of `xycoords`."""
    axes.annotate(text, at, shift, textcoords="offset points", **style)


def _write_line_ends(axes: Axes, ends: Iterable[LineEnd], layout: ChartLayout) -> None:
    """Names beside the lines' ends instead of a legend, moved apart where they would overlap."""
    ends = [end for end in ends if np.isfinite(end.height)]
    low, high = axes.get_ylim()
    top, _, bottom, _ = layout.margins
    units_per_pixel = (high - low) / (layout.size[1] - top - bottom)
    gap = 1.35 * TEXT_SIZE * units_per_pixel
    heights = spread([min(max(end.height, low), high) for end in ends], gap)
    lift = max(0.0, low + gap / 2 - min(heights, default=high))
    for end, height in zip(ends, heights, strict=True):
        place = axes.get_yaxis_transform()
        _write(axes, end.text, (1, height + lift), (10, 0), xycoords=place, va="center", color=end.colour)


def _labelled(name: str, value: float, layout: ChartLayout) -> str:
    return f"{name} {significant(value)}" if layout is WIDE else name


def _clipped(name: str, length: int = 17) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"
