"""The speed ladder as a table: for a terminal of 80 columns, with bars beneath it, and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from overnight.report.ladder import COMPARED_STEPS, Figures, LadderRecord, RungRecord, ladder_figures
from overnight.report.words import short, significant

if TYPE_CHECKING:
    from rich.text import Text

TITLES = ("rung", "ms/step", "tokens/s", "MFU", "GB", "gain", "total", "loss", "off by")
LOSS = TITLES.index("loss")
GAP = 2
BLOCKS = " ▏▎▍▌▋▊▉"


def ladder_text(ladder: LadderRecord, columns: int = 80) -> str:
    """The table, the bars and what to know about them, no wider than `columns` where words allow it."""
    from rich.console import Console
    from rich.text import Text

    figures = ladder_figures(ladder)
    lines = [Text(about(ladder)), Text()]
    lines += _table(ladder, figures, columns)
    lines += [Text(), Text("tokens per second", "dim"), *_bars(figures, columns), Text()]
    lines += [Text(sentence, "dim") for sentence in notes(ladder)]
    console = Console(stderr=True, width=columns, highlight=False)
    with console.capture() as captured:
        for line in lines:
            console.print(line)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def ladder_markdown(ladder: LadderRecord) -> str:
    """Title, table, notes and what each rung changes."""
    figures = ladder_figures(ladder)
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


def about(ladder: LadderRecord) -> str:
    """What was measured on what, in one line."""
    return f"{ladder.model} on {ladder.device_name}; {ladder.about_step}"


def notes(ladder: LadderRecord) -> list[str]:
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


def cells(rung: RungRecord, figures: Figures) -> list[str]:
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


def _table(ladder: LadderRecord, figures: dict[str, Figures], columns: int) -> list[Text]:
    """A line for each rung, under the titles; the column of losses only where it fits."""
    from rich.text import Text

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
    from rich.text import Text

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


def _skipped_cells(rung: RungRecord) -> list[str]:
    return [rung.name, *["–"] * (len(TITLES) - 2), "skipped"]


def _why_skipped(rung: RungRecord) -> str:
    return f" (skipped: {rung.skipped})" if rung.skipped else ""
