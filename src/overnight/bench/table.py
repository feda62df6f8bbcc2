"""The results of a benchmark as a terminal table, Markdown, JSON and SVG."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.text import Text

from overnight.report.html import svg_file, text_templates
from overnight.report.plots import ACCENT, MUTED, RUN_COLOURS, new_chart, to_svg
from overnight.run_directory import finite_values
from overnight.terminal import short, significant

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COMPARED_STEPS = 5
"""Number of steps whose losses are compared; later steps amplify rounding without bound."""
TITLES = ("variant", "ms/step", "tokens/s", "MFU", "GB", "gain", "total", "loss", "off by")
LOSS = TITLES.index("loss")
GAP = 2
BLOCKS = " ▏▎▍▌▋▊▉"

# The chart, in CSS pixels.
WIDTH, ROW = 880, 34
MARGINS = (80, 240, 18, 150)
"""Around the bars: top, right, bottom, left."""
CHART_COLUMNS = {"ms/step": 150, "total": 216}
"""Right edges of the figures next to the bars, from the end of the longest bar."""
BAR_SHARE = 0.56
"""Share of a row's height."""
WRONG = RUN_COLOURS[1]


class Figures(NamedTuple):
    """Figures computed from the measurements of one variant."""

    milliseconds: float
    """Median of the rounds."""
    tokens_per_second: float
    mfu: float
    """Model FLOPs utilization; recomputation is not counted."""
    gain: float | None
    """Speed relative to the previous variant: the median of the rounds' ratios; None for the first."""
    total: float
    """Product of all gains so far."""
    loss: float
    """Nats per token in the last compared step."""
    difference: float
    """The largest difference of a compared step's loss from the first variant's."""
    is_equal: bool
    """True if no difference exceeds the tolerance."""


@dataclass(frozen=True, kw_only=True)
class VariantRecord:
    """The measurements of one variant, or the reason why it was skipped."""

    name: str
    about: str
    skipped: str | None = None
    """The reason why it was skipped; None if it was measured."""
    settings: Mapping[str, object] = field(default_factory=dict)
    tolerance: float = 0.0
    """Largest difference of its losses from the first variant's, in nats per token."""
    milliseconds: tuple[float, ...] = ()
    """Duration of one step in each round."""
    milliseconds_before: tuple[float, ...] = ()
    """Duration of one step of the previous variant in the same rounds; empty for the first."""
    losses: tuple[float, ...] = ()
    """Nats per token of every step from the initial weights on; the same rows for every variant."""
    peak_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class BenchRecord:
    """All variants in order, and the machine and model. The first variant is never skipped."""

    model: str
    device_name: str
    tokens_per_step: int
    about_step: str
    """The step's rows and tokens, as text."""
    flops_per_token: int
    peak_flops: float
    """The peak FLOP/s that MFU is relative to."""
    about_peak: str
    """The source of the peak."""
    variants: tuple[VariantRecord, ...]
    groups: tuple[tuple[str, ...], ...] = ()
    """The names of the variants that were interleaved with one another."""
    environment: Mapping[str, object] = field(default_factory=dict)
    """Versions, date, threads, text."""

    @property
    def measured(self) -> list[VariantRecord]:
        """The variants that were not skipped."""
        return [variant for variant in self.variants if variant.skipped is None]

    @property
    def title(self) -> str:
        """Model, device and step."""
        return f"{self.model} on {self.device_name}; {self.about_step}"

    @cached_property
    def figures(self) -> dict[str, Figures]:
        """The figures of every measured variant, by name."""
        found: dict[str, Figures] = {}
        first, total = self.measured[0], 1.0
        for variant in self.measured:
            milliseconds = statistics.median(variant.milliseconds)
            speed = self.tokens_per_step / milliseconds * 1e3
            pairs = zip(variant.losses[:COMPARED_STEPS], first.losses[:COMPARED_STEPS], strict=True)
            differences = [abs(ours - theirs) for ours, theirs in pairs]
            # Unlike a ratio of medians, it compares only what was measured in the same round.
            rounds = zip(variant.milliseconds_before, variant.milliseconds, strict=True)
            gain = statistics.median([before / now for before, now in rounds]) if found else None
            total *= gain or 1.0
            found[variant.name] = Figures(
                milliseconds=milliseconds,
                tokens_per_second=speed,
                mfu=speed * self.flops_per_token / self.peak_flops,
                gain=gain,
                total=total,
                loss=variant.losses[len(differences) - 1],
                difference=max(differences, key=lambda each: (math.isnan(each), each)),  # NaN is the worst
                is_equal=all(each <= variant.tolerance for each in differences),
            )
        return found

    @property
    def wrong(self) -> list[str]:
        """The variants whose losses differ from the first one's by more than their tolerance."""
        return [name for name, figures in self.figures.items() if not figures.is_equal]


def bench_to_json(record: BenchRecord) -> dict[str, Any]:
    """All measurements, with the derived "figures"; null where a value is not finite."""
    figures = {name: each._asdict() for name, each in record.figures.items()}
    found = dataclasses.asdict(record)
    found["rungs"] = [{**each, "figures": figures.get(each["name"])} for each in found.pop("variants")]
    values: dict[str, Any] = finite_values(found)
    return values


def bench_text(record: BenchRecord, columns: int = 80) -> str:
    """The table, a bar chart and notes, no wider than `columns`."""
    lines = [Text(record.title), Text(), *_terminal_table(record, columns)]
    lines += [Text(), Text("tokens per second", "dim"), *_bars(record.figures, columns), Text()]
    lines += [Text(sentence, "dim") for sentence in _render("notes.txt", record=record).splitlines()]
    console = Console(stderr=True, width=columns, highlight=False)
    with console.capture() as captured:
        for line in lines:
            console.print(line)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def bench_markdown(record: BenchRecord) -> str:
    """Title, table, notes and what each variant changes."""
    notes = _render("notes.txt", record=record).splitlines()
    return _render("ladder.md", record=record, titles=TITLES, rows=table_rows(record), notes=notes)


def _render(template: str, **values: object) -> str:
    environment = text_templates("overnight.bench")
    environment.filters["significant"] = significant
    return environment.get_template(template).render(compared_steps=COMPARED_STEPS, **values)


def table_rows(record: BenchRecord) -> dict[str, list[str]]:
    """The cells of every measured variant in the order of TITLES, by name."""
    found = {}
    for variant in record.measured:
        figures = record.figures[variant.name]
        verdict = "ok" if figures.is_equal else "NOT EQUAL"
        found[variant.name] = [
            variant.name,
            milliseconds_text(figures.milliseconds),
            f"{figures.tokens_per_second:,.0f}",
            f"{figures.mfu:.1%}" if figures.mfu < 0.0995 else f"{figures.mfu:.0%}",
            "–" if variant.peak_bytes is None else significant(variant.peak_bytes / 1e9, 3),
            "" if figures.gain is None else f"{figures.gain:.2f}x",
            f"{figures.total:.2f}x" if figures.total < 99.95 else f"{figures.total:,.0f}x",
            f"{figures.loss:.4f}",
            "reference" if figures.gain is None else f"{figures.difference:.4f} {verdict}",
        ]
    return found


def milliseconds_text(value: float) -> str:
    """At least three digits: 10,412; 93.1."""
    return f"{value:,.0f}" if value >= 99.95 else significant(value, 3)


def _terminal_table(record: BenchRecord, columns: int) -> list[Text]:
    """A line for each variant, under the titles; the column of losses only where it fits."""
    rows = table_rows(record)
    widths = [max(map(len, column)) for column in zip(TITLES, *rows.values(), strict=True)]
    widths[0] = max(len(variant.name) for variant in record.variants)
    if sum(widths) + GAP * (len(widths) - 1) > columns:
        widths[LOSS] = 0
    lines = [Text(_aligned(TITLES, widths), "dim")]
    for variant in record.variants:
        if variant.name in rows:
            style = "bold red" if variant.name in record.wrong else ""
            lines.append(Text(_aligned(rows[variant.name], widths), style))
        else:
            lines.append(Text(f"{variant.name:<{widths[0] + GAP}}skipped: {variant.skipped}", "dim"))
    return lines


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    """The cells of a row whose width is not 0: the first and the last flush left, numbers flush right."""
    last = len(row) - 1
    return (" " * GAP).join(
        cell.rjust(width) if 0 < index < last else cell.ljust(width)
        for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        if width
    )


def _bars(figures: Mapping[str, Figures], columns: int) -> list[Text]:
    """A bar for each variant, proportional to its speed, in eighths of a column."""
    name_width = max(map(len, figures))
    fastest = max(each.tokens_per_second for each in figures.values())
    labels = {name: f" {short(each.tokens_per_second)}" for name, each in figures.items()}
    room = columns - name_width - GAP - max(map(len, labels.values()))
    lines = []
    for name, each in figures.items():
        eighths = round(8 * room * each.tokens_per_second / fastest)
        bar = "█" * (eighths // 8) + BLOCKS[eighths % 8].strip()
        lines.append(Text.assemble(f"{name:<{name_width + GAP}}", (bar, "blue"), (labels[name], "dim")))
    return lines


def bench_svg(record: BenchRecord) -> str:
    """A bar for each variant, proportional to its speed; the reason for a skipped one."""
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
        _write_columns(axes, -0.5, list(CHART_COLUMNS), 14)
        for row, variant in enumerate(record.variants):
            _write(axes, variant.name, (0, row), (-12, 0), horizontalalignment="right")
            if variant.name in record.figures:
                _draw_bar(axes, row, speeds[variant.name], record.figures[variant.name])
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
    for text, end in zip(words, CHART_COLUMNS.values(), strict=True):
        _write(axes, text, (axes.get_xlim()[1], row), (end, lift), horizontalalignment="right")


def _write(axes: Axes, text: str, at: tuple[float, float], shift: tuple[int, int], **style: Any) -> None:
    """Write `shift` pixels from a point, centred vertically."""
    axes.annotate(text, at, shift, textcoords="offset points", verticalalignment="center_baseline", **style)
