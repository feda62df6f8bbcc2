"""A matplotlib figure as a small inline SVG: its text in the page's font, its colours the page's variables.

Figures are drawn in CSS pixels with placeholder colours. Each placeholder then becomes `var(--name)`,
which style.css defines once for light and once for dark.
"""

from __future__ import annotations

import importlib.util
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from overnight.report.markup import Markup, escape

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that no drawing would use by chance.
RUN_COLOURS = tuple(f"#0f1e{number:02x}" for number in range(16, 22))
PLACEHOLDERS = {
    "#0f1e01": "muted",
    "#0f1e02": "rule",
    "#0f1e03": "accent",
    "#0f1e04": "plain",
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
