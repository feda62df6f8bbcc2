"""The morning page: one run as one HTML file that needs nothing else to be read."""

from __future__ import annotations

import itertools
import shlex
from pathlib import Path
from typing import Any

import numpy as np

from overnight.report import plots
from overnight.report.curves import WINDOWS_PER_RUN, median
from overnight.report.drawing import check_matplotlib
from overnight.report.headline import compression, header
from overnight.report.markup import (
    Markup,
    code,
    element,
    escape,
    folded,
    joined,
    page,
    pairs,
    paragraph,
    section,
    shown,
    table,
)
from overnight.report.record import Record, is_finite, read_run
from overnight.report.status import find_setting
from overnight.report.tasks import tasks
from overnight.report.words import scientific, short, significant
from overnight.run_directory import write_atomically

OPEN_SAMPLES = 3
"""Steps whose samples are seen at once; those of earlier steps open on a click."""


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the page about `run` to runs/<name>/report.html, or to `out`; returns where it lies.

    The same run directory gives the same bytes. Raises ValueError if matplotlib is not installed.
    """
    check_matplotlib()
    target = run / "report.html" if out is None else out
    write_atomically(target, report_page(read_run(run)))
    return target


def report_page(record: Record) -> str:
    """The page about one run, as HTML. What the run did not write is left out, with a sentence saying so."""
    status = record.status
    body = joined(
        [
            header(record),
            compression(record),
            section("Loss", _loss(record)),
            tasks(record),
            section("Samples", _samples(record)),
            section("Recipe", _recipe(record)),
            section("Data", _data(record)),
            section("Environment", _environment(record)),
            section("Check it, repeat it", _commands(record)),
        ]
    )
    return page(f"{status.name} · {status.state}", body)


def _loss(record: Record) -> Markup:
    if record.steps < 2:
        finished = "One step is finished; curves begin with the second."
        none = "No step is finished yet, so there is nothing to draw."
        return joined([paragraph(finished if record.steps else none), _evaluations(record)])
    _, top = plots.visible_loss([record], "step")
    first = record.metrics["loss"][0]
    above = f" It began at {significant(first)}, above the picture." if first > top else ""
    averaged = " is faint for each step, and averaged over about a hundredth of the run"
    how = averaged if record.steps >= 2 * WINDOWS_PER_RUN else " is shown for each step"
    caption = f"<strong>Nats per token.</strong> The training loss{how}.{escape(above + _reference(record))}"
    return joined(
        [
            Markup(f"<figure><figcaption>{caption}</figcaption>{plots.loss_charts(record)}</figure>"),
            _small_charts(record),
            _evaluations(record),
        ]
    )


def _reference(record: Record) -> str:
    """What the light areas are, if there are any."""
    if record.verdict is None or not plots.references(record):
        return ""
    band = record.verdict.band
    told = f"Healthy runs lie in the light areas: {band.recipe}, {band.source}, {band.date}. {band.notes}"
    return f" {told.strip()}"


def _small_charts(record: Record) -> Markup:
    metrics = record.metrics
    charts = []
    if (rate := metrics["learning_rate"])[np.isfinite(rate)].size:
        caption = f"peak {scientific(float(np.nanmax(rate)))}"
        charts.append(_figure("Learning rate", caption, plots.learning_rate_chart(record)))
    norm = metrics["grad_norm"]
    if (typical := median(norm)) is not None:
        finite = np.where(np.isfinite(norm), norm, -np.inf)
        highest = int(np.argmax(finite))
        caption = (
            f"before clipping; median {significant(typical, 2)}, highest {significant(finite[highest], 2)} "
            f"at step {metrics['step'][highest]:,.0f}"
        )
        charts.append(_figure("Gradient norm", caption, plots.gradient_chart(record)))
    if (speed := median(metrics["tokens_per_second"])) is not None:
        caption = f"tokens per second; median {short(speed)}"
        charts.append(_figure("Throughput", caption, plots.throughput_chart(record)))
    return Markup('<div class="charts">\n' + joined(charts) + "\n</div>") if charts else Markup("")


def _figure(title: str, caption: str, chart: Markup) -> Markup:
    return Markup(
        f"<figure><figcaption>{element('strong', title)}<br>{escape(caption)}</figcaption>{chart}</figure>"
    )


def _evaluations(record: Record) -> Markup:
    if not record.evaluations:
        every = find_setting(record.recipe, "evaluate_every_steps")
        plan = f"; the recipe asks for one every {every:,} steps" if isinstance(every, int) else ""
        return paragraph(f"No evaluation was made so far{plan}.", "quiet")
    columns = (
        *(("step", "step", "{:,}".format), ("tokens", "tokens", short), ("loss", "loss", significant)),
        *(("perplexity", "perplexity", significant), ("bits per byte", "bits_per_byte", significant)),
        ("judged on tokens", "evaluated_tokens", short),
    )
    rows = (
        [words(line[key]) if is_finite(line.get(key)) else "–" for _, key, words in columns]
        for line in record.evaluations
    )
    count = len(record.evaluations)
    titles = [title for title, _, _ in columns]
    return folded(f"All {count:,} evaluations" if count > 1 else "The evaluation", table(titles, rows, 0))


def _samples(record: Record) -> Markup:
    if not record.samples:
        return paragraph("No samples were drawn.")
    by_step = itertools.groupby(record.samples, key=lambda line: line["step"])
    groups = [list(lines) for _, lines in by_step][::-1]
    newest = joined(_sample(line) for group in groups[:OPEN_SAMPLES] for line in group)
    if len(groups) <= OPEN_SAMPLES:
        return newest
    older = joined(_sample(line) for group in groups[OPEN_SAMPLES:] for line in group)
    return joined([newest, folded(f"Samples of {len(groups) - OPEN_SAMPLES:,} earlier steps", older)])


def _sample(line: dict[str, Any]) -> Markup:
    tokens = f" · {short(line['tokens'])} tokens" if is_finite(line.get("tokens")) else ""
    when = element("header", f"step {line['step']:,}{tokens}")
    text = element("span", line.get("prompt", ""), "prompt") + escape(line.get("completion", ""))
    return Markup(f'<article class="sample">{when}<p>{text}</p></article>')


def _cards(groups: dict[str, dict[str, Any]]) -> Markup:
    """Names and values in two columns, each group under its title; the group "" has none."""
    cards = (
        f'<div class="card">{element("h3", title) if title else ""}{pairs(values)}</div>'
        for title, values in groups.items()
        if values
    )
    return Markup('<div class="cards">\n' + "\n".join(cards) + "\n</div>")


def _grouped(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The values of a file as the group "", and each of its sections as a group of its own."""
    sections = {name: value for name, value in content.items() if isinstance(value, dict)}
    return {"": {name: value for name, value in content.items() if name not in sections}, **sections}


def _recipe(record: Record) -> Markup:
    if not record.recipe:
        return paragraph("The run directory holds no readable recipe.toml.")
    return _cards(_grouped(record.recipe))


def _data(record: Record) -> Markup:
    """The manifest's facts, and the shards of each split as a table."""
    if not record.data:
        return paragraph("The run directory holds no readable data.json.")
    splits = {name: value for name, value in record.data.items() if _is_table(value)}
    facts = {name: value for name, value in record.data.items() if name not in splits}
    return joined([_cards(_grouped(facts)), *(_shards(name, rows) for name, rows in splits.items())])


def _is_table(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _shards(split: str, rows: list[dict[str, Any]]) -> Markup:
    titles = list(dict.fromkeys(key for row in rows for key in row))
    cells = ([_cell(row.get(key, "")) for key in titles] for row in rows)
    total = sum(row["tokens"] for row in rows if isinstance(row.get("tokens"), int))
    shards = "1 shard" if len(rows) == 1 else f"{len(rows):,} shards"
    return folded(f"{split}: {shards}, {total:,} tokens", table(titles, cells))


def _cell(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _environment(record: Record) -> Markup:
    if not record.environment:
        return paragraph("The run directory holds no readable environment.json.")
    facts = dict(record.environment)
    command = facts.pop("command", None)
    resumed = facts.pop("resumed", [])
    return joined(
        [
            _cards(_grouped(facts)),
            code(str(command)) if command else "",
            _resumptions(resumed) if _is_table(resumed) else "",
        ]
    )


def _resumptions(starts: list[dict[str, Any]]) -> Markup:
    """When and how the run went on, and on what else than at first."""
    titles = list(dict.fromkeys(name for start in starts for name in start))
    rows = ([shown(start.get(name, "")) for name in titles] for start in starts)
    times = "once" if len(starts) == 1 else f"{len(starts):,} times"
    return folded(f"Resumed {times}", table(titles, rows, numeric_from=len(titles)))


def _commands(record: Record) -> Markup:
    status = record.status
    run = shlex.quote(status.path)
    recipe = shlex.quote(f"{status.path}/recipe.toml")
    again = shlex.quote(f"{status.name}-again")
    lines = [f"overnight train --resume {run}", ""] if status.state in {"stopped", "damaged"} else []
    lines += [
        f'overnight generate {run} "Once upon a time"',
        f"overnight evaluate {run}",
        f"overnight train {recipe} --run-name={again}",
        f"overnight report {run} {shlex.quote(str(Path(status.path).parent / f'{status.name}-again'))}",
    ]
    commit = record.environment.get("git_commit")
    source = f" The code was at commit {commit}." if commit else ""
    return joined(
        [
            paragraph(
                "The same recipe on the same data sees the same tokens in the same order, however many "
                f"devices share the work.{source}"
            ),
            code("\n".join(lines)),
        ]
    )
