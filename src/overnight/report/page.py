"""The morning page: one run as one HTML file that needs nothing else to be read."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from overnight.report import plots
from overnight.report.html import (
    Markup,
    code,
    element,
    escape,
    folded,
    joined,
    notice,
    page,
    pairs,
    paragraph,
    section,
    shown,
    table,
)
from overnight.report.plots import check_matplotlib
from overnight.report.run_data import WINDOWS_PER_RUN, RunData, is_finite, median, read_run
from overnight.run_directory import write_atomically
from overnight.runs.status import RunStatus, find_setting
from overnight.terminal import duration, scientific, short, significant

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


def report_page(record: RunData) -> str:
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


def _loss(record: RunData) -> Markup:
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


def _reference(record: RunData) -> str:
    """What the light areas are, if there are any."""
    if record.verdict is None or not plots.references(record):
        return ""
    band = record.verdict.band
    told = f"Healthy runs lie in the light areas: {band.recipe}, {band.source}, {band.date}. {band.notes}"
    return f" {told.strip()}"


def _small_charts(record: RunData) -> Markup:
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


def _evaluations(record: RunData) -> Markup:
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


def _samples(record: RunData) -> Markup:
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


def _recipe(record: RunData) -> Markup:
    if not record.recipe:
        return paragraph("The run directory holds no readable recipe.toml.")
    return _cards(_grouped(record.recipe))


def _data(record: RunData) -> Markup:
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


def _environment(record: RunData) -> Markup:
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


def _commands(record: RunData) -> Markup:
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


# ---------------------------------------------------------------- the top of a run's page


def state_sentence(status: RunStatus) -> str:
    """Where the run stands: "finished: all 2,000 steps", "stopped at step 1,240 of 2,000"."""
    of_all = f"step {status.step:,}" + (f" of {status.total_steps:,}" if status.total_steps else "")
    if status.state == "finished":
        return f"finished: all {status.step:,} steps"
    if status.state == "running":
        left = f", about {duration(status.seconds_left)} left" if status.seconds_left else ""
        return f"running: {of_all}{left}"
    if status.state == "stopped":
        return f"stopped at {of_all}"
    return "empty: no step is finished yet" if status.state == "empty" else f"damaged; last seen at {of_all}"


def header(record: RunData) -> Markup:
    """The run's name and state, what to know before believing a number, and the numbers looked for first."""
    return joined(
        [
            Markup("<header>"),
            paragraph(_model_words(record), "kicker"),
            element("h1", record.status.name),
            paragraph(_lead(record), "lead"),
            _notices(record),
            _headline(record),
            Markup("</header>"),
        ]
    )


def _model_words(record: RunData) -> str:
    """What was trained, as far as the recipe tells: GPT · 12 layers, 12 heads, width 768, context 1,024."""
    shape = (
        ("n_layer", "{} layers"),
        ("n_head", "{} heads"),
        ("n_embd", "width {}"),
        ("context_length", "context {:,}"),
    )
    values = [(words, find_setting(record.recipe, name)) for name, words in shape]
    known = [words.format(value) for words, value in values if isinstance(value, int)]
    return " · ".join(["GPT", ", ".join(known)] if known else ["GPT"])


def _lead(record: RunData) -> Markup:
    """How the run stands, on what it ran, and since when."""
    environment = record.environment
    started_at = environment.get("started_at")
    words = [
        element("span", state_sentence(record.status), "state"),
        *(environment.get(name) for name in ("device_name", "precision")),
        f"started {_readable_time(str(started_at))}" if started_at else None,
    ]
    return Markup(" · ".join(element("span", word, "together") for word in words if word))


def _readable_time(text: str) -> str:
    """An ISO time to the minute, with its zone; any other text as it is."""
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        return text
    return f"{time:%Y-%m-%d %H:%M} {time.tzname() or ''}".strip()


def _notices(record: RunData) -> Markup:
    """What a reader must know before believing a number: damaged files, losses that are not finite."""
    notices = list(record.problems)
    broken = record.metrics["step"][~np.isfinite(record.metrics["loss"])]
    if broken.size:
        steps = "step" if broken.size == 1 else "steps"
        notices.append(
            f"the training loss was not finite at {broken.size:,} {steps}, first at step {broken[0]:,.0f}"
        )
    notices += [
        f"steps {line.get('first_bad_step')} to {line.get('last_bad_step')} went wrong: the run went back to "
        f"step {line['step'] - 1:,} and on without their {line.get('rows')} rows"
        for line in record.rollbacks
    ]
    skipped = np.count_nonzero(~np.isfinite(record.metrics["grad_norm"]))
    if skipped and find_setting(record.recipe, "precision") == "fp16":
        steps = "step" if skipped == 1 else "steps"
        notices.append(f"{skipped:,} {steps} skipped: float16 overflow")
    if record.verdict is not None and not record.verdict.is_on_track:
        notices += map(_capitalised, record.verdict.sentences())
    return notice(notices)


def _headline(record: RunData) -> Markup:
    """The handful of numbers one looks for first."""
    entries = [*_loss_figures(record), *_place_figure(record), *_speed_figures(record)]
    items = (f"<div>{element('dt', label)}{element('dd', value)}</div>" for label, value in entries)
    return Markup('<dl class="figures">\n' + "\n".join(items) + "\n</dl>") if entries else Markup("")


def _loss_figures(record: RunData) -> Iterator[tuple[str, str]]:
    evaluation = record.evaluations[-1] if record.evaluations else {}
    if evaluation:
        at = "" if evaluation["step"] == record.status.step else f", at step {evaluation['step']:,}"
        yield f"validation loss, nats per token{at}", significant(evaluation["loss"])
    elif record.steps:
        yield "training loss, nats per token (no evaluation yet)", significant(record.smoothed_loss()[-1])
    if is_finite(evaluation.get("perplexity")):
        yield "perplexity per token", significant(evaluation["perplexity"])
    if is_finite(evaluation.get("bits_per_byte")):
        yield "bits per byte of text", significant(evaluation["bits_per_byte"])


def _place_figure(record: RunData) -> Iterator[tuple[str, str]]:
    """One word, and beside what."""
    if (verdict := record.verdict) is not None:
        yield f"beside {verdict.band.source}", verdict.word


def _capitalised(sentence: str) -> str:
    return f"{sentence[0].upper()}{sentence[1:]}"


def _speed_figures(record: RunData) -> Iterator[tuple[str, str]]:
    metrics = record.metrics
    if record.steps:
        yield "tokens seen", short(metrics["tokens"][-1])
    if (speed := median(metrics["tokens_per_second"])) is not None:
        yield "tokens per second, median", short(speed)
    if (share := median(metrics["mfu"])) is not None:
        yield "MFU, median (6N + 12LCT)", f"{share:.1%}"
    if (share := median(metrics["mfu_executed"])) is not None:
        yield "MFU, median (executed FLOPs)", f"{share:.1%}"
    if np.isfinite(metrics["milliseconds"]).any():
        yield "spent in training steps", duration(float(np.nansum(metrics["milliseconds"])) / 1000)
    if is_finite(record.environment.get("parameters")):
        yield "parameters", short(record.environment["parameters"])


def compression(record: RunData) -> Markup:
    """Ours among the general compressors, as bars; nothing if either side is missing."""
    measured = record.compression.get("bits_per_byte")
    evaluation = record.evaluations[-1] if record.evaluations else {}
    ours = evaluation.get("bits_per_byte")
    if not isinstance(measured, dict) or not is_finite(ours):
        return Markup("")
    bars = {str(name): float(bits) for name, bits in measured.items() if is_finite(bits)}
    longest = max([ours, *bars.values()])
    rows = sorted(
        [*((bits, name, "") for name, bits in bars.items()), (float(ours), record.status.name, "ours")]
    )
    bars_drawn = "\n".join(_bar(*row, longest) for row in rows[::-1])
    return section(
        "As a compressor",
        paragraph(
            "Bits needed for each byte of the validation text; fewer is better. The model's own size is not "
            f"counted.{_unequal_texts(record.compression.get('bytes'), evaluation.get('evaluated_bytes'))}",
            "quiet",
        ),
        Markup(f'<table class="bars"><tbody>\n{bars_drawn}\n</tbody></table>'),
    )


def _unequal_texts(theirs: object, ours: object) -> str:
    """A sentence if the compressors and the model were not given the same number of bytes."""
    if not is_finite(theirs) or not is_finite(ours) or theirs == ours:
        return ""
    return f" The compressors were given {short(theirs)} bytes of it, the model {short(ours)}."


def _bar(bits: float, name: str, css: str, longest: float) -> str:
    share = bits / longest if longest > 0 else 0
    return (
        f'<tr class="{css}">{element("th", name)}<td><div class="bar">'
        f'<span style="width: calc((100% - 4rem) * {share:.4f})"></span>{bits:.3f}</div></td></tr>'
    )


# ---------------------------------------------------------------- the part of a run's page on the tasks that it was judged on while it trained


Line = dict[str, Any]


def tasks(record: RunData) -> Markup:
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
