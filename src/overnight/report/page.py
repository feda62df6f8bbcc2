"""The report of one run: a self-contained HTML file."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from overnight.evaluation.compressors import measure_compression
from overnight.files import write_atomically
from overnight.model.parts import describe_parts
from overnight.report import plots
from overnight.report.html import render, show_value
from overnight.report.plots import check_matplotlib
from overnight.report.run_data import WINDOWS_PER_RUN, RunData, is_finite, median, read_run
from overnight.run_directory import RunDirectory
from overnight.runs.status import RunStatus
from overnight.terminal import duration, scientific, shell_command, short, significant

OPEN_SAMPLES = 3
"""Number of steps whose samples are shown unfolded."""
TASK_TITLES = ("task", "metric", "step", "value", "95% interval", "examples", "chance")


class Table(NamedTuple):
    """A table's cells; columns from `numeric_from` on are right-aligned."""

    titles: Sequence[str]
    rows: Sequence[Sequence[object]]
    numeric_from: int = 1


class SmallChart(NamedTuple):
    """A chart with its title and caption."""

    title: str
    caption: str
    svg: Markup


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the page about `run` to runs/NAME/report.html, or to `out`; returns the path.

    The same run directory gives the same bytes. If the text that the run was trained on is on this machine,
    compressors are measured on it, which takes a few seconds the first time. Raises ValueError if matplotlib
    is not installed.
    """
    check_matplotlib()
    target = run / "report.html" if out is None else out
    data = read_run(run)
    if not data.compression and is_finite(data.last_evaluation.get("bits_per_byte")):
        data = replace(data, compression=measure_compression(RunDirectory(run)))
    write_atomically(target, report_page(data))
    return target


def report_page(run: RunData) -> str:
    """The page about one run, as HTML. For what the run did not write there is a sentence instead."""
    status, environment = run.status, run.environment
    started_at = environment.get("started_at")
    facts = [environment.get("device_name"), environment.get("precision")]
    facts.append(f"started {_readable_time(str(started_at))}" if started_at else None)
    samples = [list(lines) for _, lines in itertools.groupby(run.samples, key=lambda line: line["step"])]
    newest, older = samples[::-1][:OPEN_SAMPLES], samples[::-1][OPEN_SAMPLES:]
    every = run.settings.get("evaluate_every_steps")
    splits = {name: rows for name, value in run.data.items() if (rows := _record_table(value, 1))}
    return render(
        "run.html",
        title=f"{status.name} · {status.state}",
        run=run,
        status=status,
        model=_model_shape(run),
        state=state_sentence(status),
        facts=[fact for fact in facts if fact],
        notices=list(_notices(run)),
        headline=[*_loss_figures(run), *_speed_figures(run)],
        compressors=_compressors(run),
        loss=_loss(run),
        evaluations=_evaluations(run),
        evaluation_plan=f"; the recipe asks for one every {every:,} steps" if isinstance(every, int) else "",
        tasks=_tasks(run),
        newest_samples=list(itertools.chain.from_iterable(newest)),
        older_samples=list(itertools.chain.from_iterable(older)),
        older_steps=len(older),
        data_facts={name: value for name, value in run.data.items() if name not in splits},
        splits=splits,
        environment_facts={k: v for k, v in environment.items() if k not in {"command", "resumed"}},
        resumed=_record_table(environment.get("resumed"), 99),
        commands=_commands(status),
    )


def state_sentence(status: RunStatus) -> str:
    """The run's state: "finished: all 2,000 steps", "stopped at step 1,240 of 2,000"."""
    progress = f"step {status.step:,}" + (f" of {status.total_steps:,}" if status.total_steps else "")
    left = f", about {duration(status.seconds_left)} left" if status.seconds_left else ""
    sentences = {
        "finished": f"finished: all {status.step:,} steps",
        "running": f"running: {progress}{left}",
        "stopped": f"stopped at {progress}",
        "diverged": f"diverged at {progress}",
        "empty": "empty: no step is finished yet",
        "damaged": f"damaged; last seen at {progress}",
    }
    return sentences[status.state]


def _model_shape(run: RunData) -> str:
    """What was trained, as far as the recipe says: GPT · 12 layers, 12 heads, width 768, context 1,024."""
    formats = (
        ("n_layer", "{} layers"),
        ("n_head", "{} heads"),
        ("n_embd", "width {}"),
        ("context_length", "context {:,}"),
    )
    values = [(text, run.settings.get(name)) for name, text in formats]
    known = [text.format(value) for text, value in values if isinstance(value, int)]
    parts = describe_parts(run.settings)
    return " · ".join(["GPT", *([", ".join(known)] if known else []), *([", ".join(parts)] if parts else [])])


def _readable_time(text: str) -> str:
    """An ISO time to the minute, with its zone; any other text unchanged."""
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        return text
    return f"{time:%Y-%m-%d %H:%M} {time.tzname() or ''}".strip()


def _notices(run: RunData) -> Iterator[str]:
    """Warnings about the run's figures: damaged files, losses that are not finite, rollbacks."""
    yield from run.problems
    if run.status.state == "damaged":
        yield f"figures and charts cover only the {run.steps:,} steps that are on record"
    broken = run.metrics["step"][~np.isfinite(run.metrics["loss"])]
    if broken.size:
        steps = "step" if broken.size == 1 else "steps"
        yield f"the training loss was not finite at {broken.size:,} {steps}, first at step {broken[0]:,.0f}"
    for line in run.rollbacks:
        bad_steps = f"{line.get('first_bad_step')} to {line.get('last_bad_step')}"
        yield (
            f"steps {bad_steps} were bad: the run was rolled back to step {line['step'] - 1:,} and skipped "
            f"their {line.get('rows')} rows"
        )
    skipped = np.count_nonzero(~np.isfinite(run.metrics["grad_norm"]))
    if skipped and run.settings.get("precision") == "fp16":
        yield f"{skipped:,} {'step' if skipped == 1 else 'steps'} skipped: float16 overflow"
    if "low" in run.last_evaluation and run.loss_interval is None:
        tokens = short(run.last_evaluation["evaluated_tokens"])
        yield f"the validation loss has no interval: it rests on only {tokens} tokens of held-out text"
    if run.comparison is not None and not run.comparison.is_on_track:
        yield from (f"{sentence[0].upper()}{sentence[1:]}" for sentence in run.comparison.sentences())


def _loss_figures(run: RunData) -> Iterator[tuple[str, str]]:
    """Labels and values of the headline: losses, and the position in the reference's band."""
    evaluation = run.last_evaluation
    if evaluation:
        at = "" if evaluation["step"] == run.status.step else f", at step {evaluation['step']:,}"
        yield f"validation loss, nats per token{at}", significant(evaluation["loss"])
        if is_finite(evaluation.get("evaluated_tokens")):
            text = f"of that loss, on {short(evaluation['evaluated_tokens'])} tokens of held-out text"
            ends = run.loss_interval
            yield f"95% interval {text}", " to ".join(map(significant, ends)) if ends else "–"
    elif run.steps:
        yield "training loss, nats per token (no evaluation yet)", significant(run.smoothed_loss()[-1])
    if is_finite(evaluation.get("perplexity")):
        yield "perplexity per token", significant(evaluation["perplexity"])
    if is_finite(evaluation.get("bits_per_byte")):
        yield "bits per byte of text", significant(evaluation["bits_per_byte"])
    if run.comparison is not None:
        yield f"compared with {run.comparison.band.source}", run.comparison.word


def _speed_figures(run: RunData) -> Iterator[tuple[str, str]]:
    """Labels and values of the headline: tokens, speed, time, size."""
    metrics = run.metrics
    if run.steps:
        yield "tokens seen", short(metrics["tokens"][-1])
    if (speed := median(metrics["tokens_per_second"])) is not None:
        yield "tokens per second, median", short(speed)
    for name, label in (("mfu", "6N + 12LCT"), ("mfu_executed", "executed FLOPs")):
        if (share := median(metrics[name])) is not None:
            yield f"MFU, median ({label})", f"{share:.1%}"
    if run.training_seconds is not None:
        steps = "training steps" if run.status.state != "damaged" else "the steps on record"
        yield f"spent in {steps}", duration(run.training_seconds)
    if is_finite(run.environment.get("parameters")):
        yield "parameters", short(run.environment["parameters"])


def _compressors(run: RunData) -> dict[str, Any] | None:
    """Bits per byte of the model and of general compressors; None if either is missing."""
    measured, bits = run.compression.get("bits_per_byte"), run.last_evaluation.get("bits_per_byte")
    if not isinstance(measured, dict) or not is_finite(bits):
        return None
    others = [(float(value), str(name), False) for name, value in measured.items() if is_finite(value)]
    ranked = sorted([*others, (float(bits), run.status.name, True)], reverse=True)
    names = ("bits", "name", "is_model")
    return {"bars": [dict(zip(names, bar, strict=True)) for bar in ranked], "note": _how_compressed(run)}


def _how_compressed(run: RunData) -> str:
    """How the compressors were measured, as far as the run's files say."""
    theirs, training = run.compression.get("bytes"), run.compression.get("training_bytes")
    ours, note = run.last_evaluation.get("evaluated_bytes"), ""
    if is_finite(theirs) and is_finite(ours) and theirs != ours:
        note += f" The compressors were given {short(theirs)} bytes of it, the model {short(ours)}."
    if is_finite(training):
        note += (
            " gzip, bz2 and xz compress at their highest level. The figure of xz given training text is the "
            f"size of {short(training)} bytes of training text together with the validation text, less that "
            "of the training text alone."
        )
    return note


def _loss(run: RunData) -> dict[str, Any]:
    """The loss chart with its caption and the small charts; without two steps, a sentence instead."""
    if run.steps < 2:
        one = "One step is finished; curves begin with the second."
        return {"chart": None, "text": one if run.steps else "No step is finished yet: nothing to draw."}
    is_averaged = run.steps >= 2 * WINDOWS_PER_RUN
    how = "is faint for each step, and averaged over about a hundredth of the run"
    text = f"The training loss {how if is_averaged else 'is shown for each step'}."
    first, (_, top) = run.metrics["loss"][0], plots.visible_loss([run], "step")
    if first > top:
        text += f" It began at {significant(first)}, above the chart."
    if run.comparison is not None and plots.reference_bands(run):
        band = run.comparison.band
        text += (
            f" Healthy runs lie in the light areas: {band.recipe}, {band.source}, {band.date}. {band.notes}"
        )
    return {"chart": plots.loss_chart(run), "text": text.strip(), "small_charts": list(_small_charts(run))}


def _small_charts(run: RunData) -> Iterator[SmallChart]:
    metrics = run.metrics
    if (rate := metrics["learning_rate"])[np.isfinite(rate)].size:
        caption = f"peak {scientific(float(np.nanmax(rate)))}"
        yield SmallChart("Learning rate", caption, plots.metric_chart(run, "learning_rate"))
    norm = metrics["grad_norm"]
    if (typical := median(norm)) is not None:
        finite = np.where(np.isfinite(norm), norm, -np.inf)
        highest = int(np.argmax(finite))
        caption = (
            f"before clipping; median {significant(typical, 2)}, highest {significant(finite[highest], 2)} "
            f"at step {metrics['step'][highest]:,.0f}"
        )
        yield SmallChart("Gradient norm", caption, plots.metric_chart(run, "grad_norm"))
    if (speed := median(metrics["tokens_per_second"])) is not None:
        caption = f"tokens per second; median {short(speed)}"
        yield SmallChart("Throughput", caption, plots.metric_chart(run, "tokens_per_second"))


def _evaluations(run: RunData) -> Table:
    columns = (
        *(("step", "step", "{:,}".format), ("tokens", "tokens", short), ("loss", "loss", significant)),
        *(("perplexity", "perplexity", significant), ("bits per byte", "bits_per_byte", significant)),
        ("evaluated tokens", "evaluated_tokens", short),
    )
    rows = [
        [
            *(as_text(line[key]) if is_finite(line.get(key)) else "–" for _, key, as_text in columns),
            _interval(line),
        ]
        for line in run.evaluations
    ]
    return Table([*(title for title, _, _ in columns), "95% interval of the loss"], rows, numeric_from=0)


def _tasks(run: RunData) -> dict[str, Any] | None:
    """A chart for each task and the tables of its results; None if there are none."""
    by_metric: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in run.tasks:
        if is_finite(line.get("value")):
            name = (str(line.get("task")), str(line.get("metric")).replace("_", " "))
            by_metric.setdefault(name, []).append(line)
    if not by_metric:
        return None
    charts: dict[str, SmallChart] = {}
    for (task, metric), lines in by_metric.items():
        if task not in charts:  # a task's first metric is drawn
            last = lines[-1]
            chance = f"; chance {_number(last['chance'])}" if is_finite(last.get("chance")) else ""
            caption = f"{metric}, {_number(last['value'])} at the end{chance}"
            svg = plots.task_chart(lines, f"{metric} of {task} over steps")
            charts[task] = SmallChart(task, caption, svg)
    latest = [_task_row(*name, lines[-1]) for name, lines in by_metric.items()]
    rows = [_task_row(*name, line) for name, lines in by_metric.items() for line in lines]
    tables = {"latest": Table(TASK_TITLES, latest, 2), "all": Table(TASK_TITLES, rows, 2)}
    return {"charts": list(charts.values()), **tables}


def _task_row(task: str, metric: str, line: dict[str, Any]) -> list[str]:
    value, chance = (_number(line.get(name)) for name in ("value", "chance"))
    step, examples = f"{line['step']:,}", f"{line.get('examples', 0):,}"
    return [task, metric, step, value, _interval(line), examples, chance]


def _interval(line: dict[str, Any]) -> str:
    ends = [line.get("low"), line.get("high")]
    return " to ".join(map(_number, ends)) if all(map(is_finite, ends)) else "–"


def _number(value: object) -> str:
    """An accuracy to four decimals, larger numbers to four significant digits."""
    if not is_finite(value):
        return "–"
    return f"{value:.4f}" if abs(value) < 10 else significant(value)


def _record_table(value: object, numeric_from: int) -> Table | None:
    """A list of JSON objects as a table with a column for each of their keys; None for anything else."""
    if not isinstance(value, list) or not value or not all(isinstance(row, dict) for row in value):
        return None
    titles = list(dict.fromkeys(key for row in value for key in row))
    return Table(titles, [[show_value(row.get(key, "")) for key in titles] for row in value], numeric_from)


def _commands(status: RunStatus) -> str:
    """The shell commands that use the run, check it and repeat it."""
    path, again = Path(status.path), f"{status.name}-again"
    is_open = status.state in {"stopped", "damaged"}
    resume = f"{shell_command('train', '--resume', path)}\n\n" if is_open else ""
    return resume + "\n".join(
        (
            f'{shell_command("generate", path)} "Once upon a time"',
            shell_command("evaluate", path),
            shell_command("train", path / "recipe.toml", f"--run-name={again}"),
            shell_command("report", path, path.parent / again),
        )
    )
