"""A speed ladder as it was measured, and what follows from it: gains, totals, whether every rung is right."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.text import Text

from overnight.report.html import svg_file
from overnight.report.plots import ACCENT, MUTED, RUN_COLOURS, chart_style, new_axes, to_svg
from overnight.terminal import short, significant

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.text import Text

COMPARED_STEPS = 5
"""Losses are compared over so few steps: in later ones the smallest rounding has grown beyond all bounds."""


@dataclass(frozen=True, kw_only=True)
class VariantRecord:
    """One rung: what was measured, or why it was skipped."""

    name: str
    about: str
    skipped: str | None = None
    """Why it was; nothing was measured then."""
    settings: Mapping[str, object] = field(default_factory=dict)
    tolerance: float = 0.0
    """By how many nats per token its losses may differ from the first rung's."""
    milliseconds: tuple[float, ...] = ()
    """Of one step, in each round."""
    milliseconds_before: tuple[float, ...] = ()
    """Of one step of the rung before, in the same rounds; none for the first rung."""
    losses: tuple[float, ...] = ()
    """Nats per token of every step from the fresh weights on; the same rows for every rung."""
    peak_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class BenchRecord:
    """All rungs, from the ground up, and what they were measured with. The first one is never skipped."""

    model: str
    device_name: str
    tokens_per_step: int
    about_step: str
    """The step's rows and tokens, in words."""
    flops_per_token: int
    peak_flops: float
    """What MFU is a share of."""
    about_peak: str
    """Where that comes from, in words."""
    rungs: tuple[VariantRecord, ...]
    groups: tuple[tuple[str, ...], ...] = ()
    """The names of the rungs that took turns with one another, group after group."""
    environment: Mapping[str, object] = field(default_factory=dict)
    """Versions, date, threads, text."""

    @property
    def climbed(self) -> list[VariantRecord]:
        """The rungs that were measured."""
        return [rung for rung in self.rungs if rung.skipped is None]


class Figures(NamedTuple):
    """What a rung comes to."""

    milliseconds: float
    """The median round."""
    tokens_per_second: float
    mfu: float
    """Share of the peak that the model's own arithmetic makes up; recomputation not counted."""
    gain: float | None
    """How many times as fast as the rung before: the median of the rounds' ratios; None for the first."""
    total: float
    """All gains so far multiplied: how many times as fast as the first rung."""
    loss: float
    """Nats per token in the last step that is compared."""
    difference: float
    """The largest difference of a compared step's loss from the first rung's."""
    is_equal: bool
    """True if no difference is beyond the tolerance."""


def bench_figures(ladder: BenchRecord) -> dict[str, Figures]:
    """The figures of every rung that was climbed, by its name."""
    found = {}
    first, total = ladder.climbed[0], 1.0
    for rung in ladder.climbed:
        milliseconds = statistics.median(rung.milliseconds)
        speed = ladder.tokens_per_step / milliseconds * 1e3
        differences = loss_differences(rung, first)
        gain = None if rung is first else paired_ratio(rung.milliseconds, rung.milliseconds_before)
        total *= gain or 1.0
        found[rung.name] = Figures(
            milliseconds=milliseconds,
            tokens_per_second=speed,
            mfu=speed * ladder.flops_per_token / ladder.peak_flops,
            gain=gain,
            total=total,
            loss=rung.losses[len(differences) - 1],
            difference=max(
                differences, key=lambda size: (math.isnan(size), size)
            ),  # not a number is the worst
            is_equal=all(size <= rung.tolerance for size in differences),
        )
    return found


def paired_ratio(times: Sequence[float], reference: Sequence[float]) -> float:
    """How many times as fast as the reference: the median, over the rounds, of its time by ours.

    Unlike the ratio of two medians, it compares only what was measured side by side.
    """
    return statistics.median(theirs / ours for ours, theirs in zip(times, reference, strict=True))


def loss_differences(rung: VariantRecord, reference: VariantRecord) -> list[float]:
    """How far apart the two losses of each compared step are, in nats per token."""
    pairs = zip(rung.losses[:COMPARED_STEPS], reference.losses[:COMPARED_STEPS], strict=True)
    return [abs(ours - theirs) for ours, theirs in pairs]


def wrong_variants(ladder: BenchRecord) -> list[str]:
    """The rungs that do not compute what the first one does, within their tolerances."""
    return [name for name, figures in bench_figures(ladder).items() if not figures.is_equal]


def bench_to_json(ladder: BenchRecord) -> dict[str, object]:
    """Every single measurement, and under "figures" what was made of them; what is not finite is null."""
    figures = bench_figures(ladder)
    rungs = [
        {
            **dataclasses.asdict(rung),
            "losses": [_finite(loss) for loss in rung.losses],
            "figures": {name: _finite(value) for name, value in figures[rung.name]._asdict().items()}
            if rung.name in figures
            else None,
        }
        for rung in ladder.rungs
    ]
    return {**dataclasses.asdict(ladder), "rungs": rungs}


def _finite(value: float | None) -> float | None:
    return value if value is None or math.isfinite(value) else None


# ---------------------------------------------------------------- the speed ladder as a picture


WIDTH, ROW = 880, 34
MARGINS = (80, 240, 18, 150)
"""In CSS pixels, what the bars leave free: top, right, bottom, left."""
COLUMNS = {"ms/step": 150, "total": 216}
"""Where the figures beside the bars end, in pixels from the longest bar's end."""
BAR_SHARE = 0.56
"""Of a row's height."""
WRONG = RUN_COLOURS[1]


def bench_svg(ladder: BenchRecord) -> str:
    """A bar for each rung, as long as it is fast, in order; a skipped one has its reason instead."""
    figures = bench_figures(ladder)
    top, _, bottom, left = MARGINS
    height = top + bottom + ROW * len(ladder.rungs)
    with chart_style("ladder"):
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
        return svg_file(to_svg(figure, f"Tokens per second, rung by rung: {about(ladder)}"))


def speeds(rung: VariantRecord, ladder: BenchRecord) -> list[float]:
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


# ---------------------------------------------------------------- the speed ladder as a table


TITLES = ("rung", "ms/step", "tokens/s", "MFU", "GB", "gain", "total", "loss", "off by")
LOSS = TITLES.index("loss")
GAP = 2
BLOCKS = " ▏▎▍▌▋▊▉"


def bench_text(ladder: BenchRecord, columns: int = 80) -> str:
    """The table, the bars and what to know about them, no wider than `columns` where words allow it."""
    figures = bench_figures(ladder)
    lines = [Text(about(ladder)), Text()]
    lines += _table(ladder, figures, columns)
    lines += [Text(), Text("tokens per second", "dim"), *_bars(figures, columns), Text()]
    lines += [Text(sentence, "dim") for sentence in notes(ladder)]
    console = Console(stderr=True, width=columns, highlight=False)
    with console.capture() as captured:
        for line in lines:
            console.print(line)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def bench_markdown(ladder: BenchRecord) -> str:
    """Title, table, notes and what each rung changes."""
    figures = bench_figures(ladder)
    rows = [
        cells(rung, figures[rung.name]) if rung.name in figures else _skipped_cells(rung)
        for rung in ladder.rungs
    ]
    widths = [max(map(len, column)) for column in zip(TITLES, *rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        return f"| {' | '.join(_aligned(row, widths))} |"

    ruler = [
        ":" + "-" * (widths[0] - 1),
        *("-" * (width - 1) + ":" for width in widths[1:-1]),
        ":" + "-" * (widths[-1] - 1),
    ]
    table = "\n".join([line(TITLES), line(ruler), *map(line, rows)])
    rungs = "\n".join(f"* **{rung.name}**: {rung.about}{_why_skipped(rung)}." for rung in ladder.rungs)
    facts = ", ".join(f"{name} {value}" for name, value in ladder.environment.items())
    return (
        "\n\n".join(
            [f"# {about(ladder)}", table, *notes(ladder), "Each rung keeps what came before:", rungs, facts]
        )
        + "\n"
    )


def about(ladder: BenchRecord) -> str:
    """What was measured on what, in one line."""
    return f"{ladder.model} on {ladder.device_name}; {ladder.about_step}"


def notes(ladder: BenchRecord) -> list[str]:
    """What the columns mean, one sentence each."""
    rounds = len(ladder.climbed[0].milliseconds)
    tolerances = sorted({rung.tolerance for rung in ladder.climbed[1:]})
    allowed = " or ".join(f"{tolerance:g}" for tolerance in tolerances)
    steps = min(COMPARED_STEPS, len(ladder.climbed[0].losses))
    first = ladder.climbed[0].name
    peak = f"{significant(ladder.peak_flops / 1e12, 3)} TFLOP/s, {ladder.about_peak}"
    apart = (
        "Memory did not hold all rungs at once, so they took turns in groups, one after the other: ms/step "
        "and tokens/s of two groups may have met another machine, the gains have not."
    )
    return [
        f"ms/step is the median of {rounds} rounds, and gain the median of their ratios to the rung before; "
        "total is the product of the gains. GB is a step's peak memory.",
        f"MFU is the share of {peak}.",
        f"off by is the largest difference from {first} among the losses of the first {steps} steps, from "
        f"the same weights, on the same rows; in these precisions rounding may make it {allowed or 0}.",
        *([apart] if len(ladder.groups) > 1 else []),
    ]


def cells(rung: VariantRecord, figures: Figures) -> list[str]:
    """The row's plain text, in the order of TITLES."""
    verdict = "ok" if figures.is_equal else "NOT EQUAL"
    return [
        rung.name,
        milliseconds(figures.milliseconds),
        f"{figures.tokens_per_second:,.0f}",
        f"{figures.mfu:.1%}" if figures.mfu < 0.0995 else f"{figures.mfu:.0%}",
        "–" if rung.peak_bytes is None else significant(rung.peak_bytes / 1e9, 3),
        "" if figures.gain is None else f"{figures.gain:.2f}x",
        f"{figures.total:.2f}x" if figures.total < 99.95 else f"{figures.total:,.0f}x",
        f"{figures.loss:.4f}",
        "reference" if figures.gain is None else f"{figures.difference:.4f} {verdict}",
    ]


def milliseconds(value: float) -> str:
    """Three digits at least: 10,412; 93.1."""
    return f"{value:,.0f}" if value >= 99.95 else significant(value, 3)


def _table(ladder: BenchRecord, figures: dict[str, Figures], columns: int) -> list[Text]:
    """A line for each rung, under the titles; the column of losses only where it fits."""
    rows = {rung.name: cells(rung, figures[rung.name]) for rung in ladder.climbed}
    names = [rung.name for rung in ladder.rungs]
    widths = [max(map(len, column)) for column in zip(TITLES, *rows.values(), strict=True)]
    widths[0] = max(map(len, names))
    if sum(widths) + GAP * (len(widths) - 1) > columns:
        widths[LOSS] = 0
    lines = [Text(_joined(TITLES, widths), "dim")]
    for rung in ladder.rungs:
        if rung.name in rows:
            style = "" if figures[rung.name].is_equal else "bold red"
            lines.append(Text(_joined(rows[rung.name], widths), style))
        else:
            lines.append(Text(f"{rung.name:<{widths[0] + GAP}}skipped: {rung.skipped}", "dim"))
    return lines


def _joined(row: Sequence[str], widths: Sequence[int]) -> str:
    kept = [index for index, width in enumerate(widths) if width]
    return (" " * GAP).join(_aligned([row[index] for index in kept], [widths[index] for index in kept]))


def _aligned(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    """Words, which are the first cell and the last, flush left; the numbers between them right."""
    last = len(row) - 1
    return [
        cell.rjust(width) if 0 < place < last else cell.ljust(width)
        for place, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]


def _bars(figures: dict[str, Figures], columns: int) -> list[Text]:
    """A bar for each rung, as long as it is fast, in eighths of a column."""
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


def _skipped_cells(rung: VariantRecord) -> list[str]:
    return [rung.name, *["–"] * (len(TITLES) - 2), "skipped"]


def _why_skipped(rung: VariantRecord) -> str:
    return f" (skipped: {rung.skipped})" if rung.skipped else ""
