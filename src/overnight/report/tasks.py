"""The part of a run's page on the tasks that it was judged on while it trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from overnight.report import plots
from overnight.report.markup import Markup, element, escape, folded, joined, paragraph, section, table
from overnight.report.record import Record, is_finite
from overnight.report.words import significant

Line = dict[str, Any]


def tasks(record: Record) -> Markup:
    """A small chart for each task, and every result as a table; nothing if the run was judged on none."""
    by_metric: dict[tuple[str, str], list[Line]] = {}
    for line in record.tasks:
        if is_finite(line.get("value")):
            by_metric.setdefault((str(line.get("task")), str(line.get("metric"))), []).append(line)
    if not by_metric:
        return Markup("")
    first = {task: metric for task, metric in reversed(by_metric)}  # of each task the metric told first
    charts = [
        _chart(task, metric, lines) for (task, metric), lines in by_metric.items() if first[task] == metric
    ]
    results = [_row(*name, lines[-1]) for name, lines in by_metric.items()]
    everything = [_row(*name, line) for name, lines in by_metric.items() for line in lines]
    titles = ("task", "metric", "step", "value", "95% interval", "examples", "chance")
    return section(
        "Tasks",
        paragraph(
            "The intervals say how far a figure would move on other examples of the same kind, not with "
            "another seed of training.",
            "quiet",
        ),
        Markup('<div class="charts">\n' + joined(charts) + "\n</div>"),
        table(titles, results, 2),
        folded(f"All {len(everything):,} results", table(titles, everything, 2)),
    )


def _chart(task: str, metric: str, lines: Sequence[Line]) -> Markup:
    last = lines[-1]
    chance = f"; chance {_number(last['chance'])}" if is_finite(last.get("chance")) else ""
    caption = f"{metric.replace('_', ' ')}, {_number(last['value'])} in the end{chance}"
    chart = plots.task_chart(lines, f"{metric.replace('_', ' ')} of {task} over steps")
    return Markup(
        f"<figure><figcaption>{element('strong', task)}<br>{escape(caption)}</figcaption>{chart}</figure>"
    )


def _row(task: str, metric: str, line: Line) -> list[str]:
    low, high, chance = (_number(line.get(name)) for name in ("low", "high", "chance"))
    return [
        task,
        metric.replace("_", " "),
        f"{line['step']:,}",
        _number(line["value"]),
        f"{low} to {high}",
        f"{line.get('examples', 0):,}",
        chance,
    ]


def _number(value: object) -> str:
    """An accuracy to four places, anything larger to four figures."""
    if not is_finite(value):
        return "–"
    return f"{value:.4f}" if abs(value) < 10 else significant(value)
