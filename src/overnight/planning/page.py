"""The text of a plan: questions, answers, and the figures behind them, 80 columns wide."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from overnight.planning.estimate import Forecast
from overnight.planning.network import Cluster
from overnight.planning.parallel_layout import Communication
from overnight.planning.plan import Plan
from overnight.terminal import duration, short
from overnight.training.memory import fits_into

COLUMNS = 80
BUSY = 0.5  # of a load average
MEMORY_USES = {
    "weights": ("weights", "float32"),
    "gradients": ("gradients", "float32"),
    "moments": ("optimizer", "AdamW's two moments, float32"),
    "copies": ("weights again", "in 16 bits, for the matrix products"),
    "activations": ("activations", ""),
    "logits": ("logits", "and what the loss makes of them"),
    "new_gradients": ("gradients again", "returned by a compiled backward pass"),
    "gathered": ("gathered", "weights that are whole for a while, and their gradients"),
}
SHARDINGS = {
    "none": "nothing: each process holds it all",
    "zero1": "AdamW's moments (ZeRO-1)",
    "fsdp": "weights, gradients, moments (FSDP2)",
    "hsdp": "the same, within each machine",
}


class Line(NamedTuple):
    """One line of the page."""

    label: str
    figure: str = ""
    note: str = ""


class Section(NamedTuple):
    """A question, its answer, and the lines behind it."""

    question: str
    figure: str
    note: str
    lines: Sequence[Line]


def plan_text(plan: Plan) -> str:
    """The page; headings are bold where stderr is a terminal."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, min_width=22)
    table.add_column(no_wrap=True, justify="right", min_width=10)
    table.add_column()
    for section in _sections(plan):
        table.add_row("")
        table.add_row(Text(section.question, "bold"), Text(section.figure, "bold"), section.note)
        for line in section.lines:
            table.add_row(f"  {line.label}", line.figure, Text(line.note, "dim"))
    console = Console(stderr=True, width=COLUMNS, highlight=False)
    with console.capture() as captured:
        console.print(_title(plan))
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def _title(plan: Plan) -> str:
    compute, model = plan.resolved.compute, plan.resolved.model
    settings = [compute.precision, "compiled" if compute.compile else "not compiled"]
    settings += [f"attention {compute.attention}", f"loss {compute.loss}"]
    if compute.activation_checkpointing != "none":
        settings.append(f"activation checkpointing {compute.activation_checkpointing}")
    basis = "measured here and now"
    if plan.assumption:
        basis = f"ESTIMATE, not measured: {plan.assumption}"
    elif plan.layout.processes > 1:
        basis += " with one process; of several, a PREDICTION"
    size = f"{model.parameter_count():,} parameters"
    return f"{plan.name}, {size}\non {plan.device_name}: {', '.join(settings)}\n{basis}"


def _sections(plan: Plan) -> Iterator[Section]:
    yield _memory(plan)
    if plan.layout.processes > 1:
        yield _sharding(plan)
    if plan.communication and plan.layout.cluster:
        yield _communication(plan.communication, plan.layout.cluster)
    if plan.forecast:
        yield _speed(plan, plan.forecast)
        yield _time(plan, plan.forecast)
    yield _disk(plan)
    if plan.forecast and plan.forecast.dollars is not None:
        yield _money(plan.forecast, plan.dollars_per_hour or 0)


def _memory(plan: Plan) -> Section:
    rows, available = plan.resolved.plan.micro_batch_size, plan.device_memory_bytes
    batch = f"micro-batch of {plural(rows, 'row')} of {plan.resolved.model.context_length:,} tokens"
    lines = [
        Line(MEMORY_USES[name][0], size(count), MEMORY_USES[name][1] or batch)
        for name, count in vars(plan.memory).items()
    ]
    lines += [
        Line("the process", size(plan.process_memory_bytes), "torch and its libraries"),
        Line("estimated together", size(plan.needed_bytes)),
        Line("measured peak", size(plan.peak_memory_bytes or 0), "while training"),
    ]
    evaluating = plan.evaluation_peak_memory_bytes or 0
    if evaluating > (plan.peak_memory_bytes or 0):
        lines.append(Line("", size(evaluating), "while evaluating"))
    if plan.resolved.recipe.checkpoints.async_checkpoint:
        held = plan.counts.checkpoint_bytes // plan.layout.processes
        lines.append(Line("besides", size(held), "of the CPU's memory, while a checkpoint is written"))
    options = [*plan.fit_options, *([plan.fit_in_processes] if plan.fit_in_processes else [])]
    lines += [
        Line("would fit", size(option.needed_bytes), option.options.replace(" --", "\n--"))
        for option in options
    ]
    if plan.largest_fitting and not plan.fit_options:
        name, count = plan.largest_fitting
        lines.append(Line("largest that would", size(count), f"{name}, with one row"))
    owner = "each process has" if plan.layout.processes > 1 else "there are"
    note = f"{owner} {size(available)}" if available else "the chip shares the memory of its machine"
    answer = {True: "yes", False: "no", None: "see below"}[plan.fits]
    return Section("Does it fit?", answer, note, [line for line in lines if line.figure != size(0)])


def _sharding(plan: Plan) -> Section:
    """What the processes shard, and why."""
    layout, available = plan.layout, plan.device_memory_bytes
    lines = []
    if len(layout.needed_bytes_by_sharding) > 1:
        for sharding, needed in layout.needed_bytes_by_sharding.items():
            fits = available is not None and fits_into(available, needed)
            lines.append(Line(f"sharding {sharding}", size(needed), "fits" if fits else "does not fit"))
    if layout.cluster is None:
        lines.append(Line("communication", "?", "not counted: the processes share one CPU"))
    reason = "the first that fits" if plan.fits else "takes least"
    if layout.is_sharding_requested:
        reason = "as asked"
    elif available is None:
        reason = "not chosen: the memory is unknown"
    question = f"What do {layout.processes} divide?"
    return Section(question, layout.sharding, f"{SHARDINGS[layout.sharding]}; {reason}", lines)


def _communication(step: Communication, cluster: Cluster) -> Section:
    """How long the processes communicate in a step, and what share of it they compute."""
    overlap = "overlap unknown" if step.communication_overlaps else "after all is computed"
    sent = f"{size(round(step.communication_bytes_per_step))} sent by each, {overlap}"
    lines = [
        Line("computing", brief(step.compute_seconds_per_step), "of a step, in each process"),
        Line("communication", brief(step.communication_seconds_per_step), sent),
        Line("within a machine", per_second(cluster.within.bytes_per_second), cluster.within.name),
        Line("", "", cluster.within.source),
    ]
    if cluster.between is not None:
        rate = per_second(cluster.between.bytes_per_second)
        lines.append(Line("between machines", rate, f"of each machine: {cluster.between.name}"))
        lines.append(Line("", "", cluster.between.source))
    for name, efficiency in step.efficiency_range_by_network.items():
        lines.append(Line(f"over {name}", percent_range(efficiency), "with that network instead"))
    if step.faster_options:
        options = step.faster_options.replace(" --", "\n--")
        lines.append(Line("would be faster", brief(step.faster_step_seconds or 0), options))
    lines.append(Line("model", "", "ring collectives at these rates, no stragglers"))
    answer = percent_range(step.efficiency_range)
    return Section("How well together?", answer, "of a step is computing: a PREDICTION", lines)


def _speed(plan: Plan, forecast: Forecast) -> Section:
    processes, rows = plan.layout.processes, plural(plan.resolved.plan.micro_batch_size, "row")
    lines = [
        Line(
            "a step", brief(forecast.step_seconds), f"{plan.resolved.recipe.batch.tokens_per_step:,} tokens"
        ),
        Line("", "", f"{plural(plan.micro_batches, 'micro-batch', 'es')} of {rows}"),
    ]
    if processes > 1:
        each = plural(plan.micro_batches // processes, "micro-batch", "es")
        lines.append(Line("", "", f"{each} in each process"))
    if forecast.update_seconds:
        reduction = " and its communication" if processes > 1 else ""
        lines.append(Line("its update", brief(forecast.update_seconds), f"AdamW{reduction}, once a step"))
    if forecast.mfu:
        lines.append(Line("MFU", f"{forecast.mfu:.1%}", "of the peak; 6 N + 12 L C T a token"))
    if plan.load_average >= BUSY:
        busy = f"load average {plan.load_average:.1f} before: measure in quiet"
        lines.append(Line("the machine was busy", "", busy))
    slow, fast = map(short, forecast.tokens_per_second_range)
    note = f"tokens per second ({slow} to {fast})"
    return Section("How fast?", short(forecast.tokens_per_second), note, lines)


def _time(plan: Plan, forecast: Forecast) -> Section:
    counts = plan.counts
    each = (counts.evaluated_tokens or 0) / max(1, counts.evaluations)
    at_most = ", at most: training goes on" if plan.resolved.recipe.checkpoints.async_checkpoint else ""
    notes = {
        "training": f"{counts.steps:,} steps, {short(counts.tokens)} tokens",
        "evaluation": f"{counts.evaluations} times {short(each)} tokens",
        "samples": f"{short(counts.sampled_tokens)} tokens",
        "checkpoints": f"{counts.checkpoints} times {size(counts.checkpoint_bytes)}{at_most}",
        "compilation": "and all else that only the first step does",
    }
    lines = [
        Line(use, duration(seconds), notes[use])
        for use, seconds in forecast.seconds_by_use.items()
        if seconds
    ]
    if counts.evaluated_tokens is None:
        lines.append(Line("evaluation", "?", "not counted: the text is not prepared yet"))
    if forecast.ends_at:
        ends_at = datetime.fromisoformat(forecast.ends_at)
        lines.append(Line("started now it ends", "", f"{ends_at:%a %d %b %Y %H:%M}"))
    fast, slow = map(duration, forecast.seconds_range)
    return Section("How long?", duration(forecast.seconds), f"({fast} to {slow})", lines)


def _disk(plan: Plan) -> Section:
    needed, text = plan.disk_bytes, plan.text
    kept = needed["checkpoints"] // plan.counts.checkpoint_bytes - 1
    notes = {
        "shards": f"already in {text.folder}" if text.folder else "at most; the text is not prepared yet",
        "checkpoints": f"{kept} kept and one being written",
        "metrics": "a line for each step",
    }
    lines = [Line(use, size(count), notes[use]) for use, count in needed.items()]
    free, note = plan.disk_free_bytes, ""
    if free is not None:
        note = f"{size(free)} free" + (": TOO LITTLE" if sum(plan.new_disk_bytes.values()) > free else "")
    return Section("How much disk?", size(sum(needed.values())), note, lines)


def _money(forecast: Forecast, dollars_per_hour: float) -> Section:
    fast, slow = (dollars(seconds / 3600 * dollars_per_hour) for seconds in forecast.seconds_range)
    billion = dollars(forecast.dollars_per_billion_tokens or 0)
    lines = [Line("a billion tokens", billion, f"at {dollars(dollars_per_hour)} an hour")]
    return Section("How much money?", dollars(forecast.dollars or 0), f"({fast} to {slow})", lines)


def plural(count: int, noun: str, ending: str = "s") -> str:
    """1 row, 2 rows."""
    return f"{count:,} {noun}{ending if count != 1 else ''}"


def size(count: int) -> str:
    """Bytes: 1.49 GB, 14.9 MB, 149 kB."""
    for power, unit in ((9, "GB"), (6, "MB")):
        if count >= 0.9995 * 10**power:
            value = count / 10**power
            return f"{value:,.{0 if value >= 99.95 else 1 if value >= 9.995 else 2}f} {unit}"
    return f"{count / 1000:,.0f} kB"


def per_second(rate: float) -> str:
    """370 GB/s, 12.0 GB/s."""
    return f"{size(round(rate))}/s"


def percent_range(shares: tuple[float, float]) -> str:
    """97%, or 65 to 100%."""
    low, high = (f"{100 * share:.0f}" for share in shares)
    return f"{high}%" if low == high else f"{low} to {high}%"


def brief(seconds: float) -> str:
    """A duration; below a second in milliseconds."""
    return f"{1000 * seconds:,.{1 if seconds < 0.1 else 0}f} ms" if seconds < 1 else duration(seconds)


def dollars(amount: float) -> str:
    """$0.0312, $3.12, $312, $31,200."""
    return f"${amount:,.{0 if amount >= 100 else 2 if amount >= 1 else 4}f}"
