"""The page that `overnight plan` shows."""

from __future__ import annotations

from typing import NamedTuple

from overnight.communication import StepPrediction
from overnight.memory import fits_into
from overnight.report.words import duration, short
from overnight.stages.forecast import Pace
from overnight.stages.outlook import Outlook
from overnight.stages.team import Shared

COLUMNS = 80
BUSY = 0.5  # of a load average
HOLDS = {
    "weights": ("weights", "float32"),
    "gradients": ("gradients", "float32"),
    "moments": ("optimizer", "AdamW's two moments, float32"),
    "copies": ("weights again", "in 16 bits, for the products"),
    "activations": ("activations", ""),
    "logits": ("logits", "and what the loss makes of them"),
    "new_gradients": ("gradients again", "handed over by a compiled backward pass"),
    "gathered": ("gathered", "weights that are whole meanwhile, and their gradients"),
}
DIVIDE = {
    "none": "nothing: each process holds it all",
    "optimizer": "AdamW's moments (ZeRO-1)",
    "full": "weights, gradients, moments (FSDP2)",
    "hybrid": "the same, within each machine",
}


class Line(NamedTuple):
    """One line of the page."""

    label: str
    figure: str = ""
    note: str = ""


def as_text(outlook: Outlook) -> str:
    """The page, no wider than 80 columns; headings stand out where stderr is a terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text as Words

    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, min_width=22)
    table.add_column(no_wrap=True, justify="right", min_width=10)
    table.add_column()
    for heading, answer, lines in _sections(outlook):
        table.add_row("")
        table.add_row(Words(heading, "bold"), Words(answer.figure, "bold"), answer.note)
        for line in lines:
            table.add_row(f"  {line.label}", line.figure, Words(line.note, "dim"))
    console = Console(stderr=True, width=COLUMNS, highlight=False)
    with console.capture() as captured:
        console.print(_title(outlook))
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def _title(outlook: Outlook) -> str:
    compute, model = outlook.recipe.compute, outlook.recipe.model
    how = [str(compute.precision), "compiled" if compute.compile else "not compiled"]
    how += [f"{name} {getattr(compute, name)}" for name in ("attention", "head")]
    how += [f"recompute {compute.recompute}"] if compute.recompute != "none" else []
    measured = "measured here and now"
    if outlook.team.processes > 1:
        measured += " with one process; of several, a PREDICTION"
    rests_on = f"ESTIMATE, not measured: {outlook.assumption}" if outlook.assumption else measured
    size = f"{model.parameter_count():,} parameters"
    return f"{outlook.name}, {size}\non {outlook.device_name}: {', '.join(how)}\n{rests_on}"


Section = tuple[str, Line, list[Line]]


def _sections(outlook: Outlook) -> list[Section]:
    """Question, answer, and what the answer is made of."""
    sections = [_memory(outlook)]
    if outlook.team.processes > 1:
        sections.append(_division(outlook))
    if outlook.shared and outlook.shared.step:
        sections.append(_communication(outlook, outlook.shared, outlook.shared.step))
    if outlook.paces:
        sections += [_speed(outlook, outlook.paces), _time(outlook, outlook.paces)]
    sections.append(_disk(outlook))
    if outlook.paces and outlook.dollars_per_hour is not None:
        sections.append(_money(outlook, outlook.paces))
    return sections


def _memory(outlook: Outlook) -> Section:
    rows, context = outlook.plan.rows_per_micro_batch, outlook.recipe.model.context_length
    at_once = f"{plural(rows, 'row')} of {context:,} tokens at once"
    lines = [
        Line(HOLDS[name][0], size(count), HOLDS[name][1] or at_once)
        for name, count in vars(outlook.memory).items()
        if count
    ]
    if outlook.process_memory_bytes:
        lines.append(Line("the process", size(outlook.process_memory_bytes), "torch and its libraries"))
    lines.append(Line("estimated together", size(outlook.needed_bytes)))
    if outlook.peak_memory_bytes:
        lines.append(Line("measured peak", size(outlook.peak_memory_bytes), "while training"))
    evaluating = outlook.evaluation_peak_memory_bytes or 0
    if evaluating > (outlook.peak_memory_bytes or 0):
        lines.append(Line("", size(evaluating), "while evaluating"))
    if outlook.recipe.checkpoints.save_in_background:
        held = outlook.work.checkpoint_bytes // outlook.team.processes
        lines.append(Line("besides", size(held), "of the CPU's memory, while a checkpoint is written"))
    for way in outlook.ways_out:
        lines.append(Line("would fit", size(way.needed_bytes), way.options.replace(" --", "\n--")))
    if outlook.several:
        lines.append(Line("would fit", size(outlook.several.needed_bytes), outlook.several.options))
    if outlook.smaller and not outlook.ways_out:
        name, count = outlook.smaller
        lines.append(Line("largest that would", size(count), f"{name}, one row at once"))
    there = outlook.device_memory_bytes
    whose = "each process has" if outlook.team.processes > 1 else "there are"
    has = f"{whose} {size(there)}" if there else "the chip shares the memory of its machine"
    answer = {True: "yes", False: "no", None: "see below"}[outlook.fits]
    return "Does it fit?", Line("", answer, has), lines


def _division(outlook: Outlook) -> Section:
    """What the processes divide, and why."""
    team, there = outlook.team, outlook.device_memory_bytes
    lines = []
    for sharding, needed in team.tried.items() if len(team.tried) > 1 else ():
        fits = there is not None and fits_into(there, needed)
        lines.append(Line(f"sharding {sharding}", size(needed), "fits" if fits else "does not fit"))
    if team.cluster is None:
        lines.append(Line("communication", "?", "not counted: they share one CPU"))
    why = "as asked" if team.is_asked else "the first that fits" if outlook.fits else "takes least"
    if not team.is_asked and there is None:
        why = "not chosen: the memory is not known"
    answer = Line("", team.sharding, f"{DIVIDE[team.sharding]}; {why}")
    return f"What do {team.processes} divide?", answer, lines


def _communication(outlook: Outlook, shared: Shared, step: StepPrediction) -> Section:
    """How long the processes talk in a step, and what is left of it for computing."""
    cluster = outlook.team.cluster
    assert cluster is not None
    hidden = "none to all of it while it computes" if step.overlaps else "when all is computed"
    sent = f"{size(round(step.communication_bytes))} sent by each, {hidden}"
    lines = [
        Line("computing", brief(step.compute_seconds), "of a step, in each process"),
        Line("communication", brief(step.communication_seconds), sent),
        Line("within a machine", per_second(cluster.within.bytes_per_second), cluster.within.name),
        Line("", "", cluster.within.source),
    ]
    if cluster.between is not None:
        rate = per_second(cluster.between.bytes_per_second)
        lines.append(Line("between machines", rate, f"of each machine: {cluster.between.name}"))
        lines.append(Line("", "", cluster.between.source))
    for name, other in shared.networks.items():
        lines.append(Line(f"over {name}", _share_of_step(other), "if the network were that"))
    if shared.faster is not None:
        options, seconds = shared.faster
        lines.append(Line("would be faster", brief(seconds), options.replace(" --", "\n--")))
    lines.append(Line("rests on", "", "messages that go round a ring at these rates, and nobody waiting"))
    answer = Line("", _share_of_step(step), "of a step is computing: a PREDICTION")
    return "How well together?", answer, lines


def _share_of_step(step: StepPrediction) -> str:
    """97%, or 65 to 100% where it is not known how much is hidden."""
    worst, best = (f"{100 * share:.0f}" for share in step.efficiency_range)
    return f"{best}%" if worst == best else f"{worst} to {best}%"


def _speed(outlook: Outlook, paces: tuple[Pace, Pace, Pace]) -> Section:
    fast, likely, slow = paces
    rows, step = outlook.plan.rows_per_micro_batch, likely.step(outlook.micro_batches)
    lines = [
        Line("a step", brief(step), f"{outlook.recipe.batch.tokens_per_step:,} tokens"),
        Line("", "", f"{plural(outlook.micro_batches, 'micro-batch', 'es')} of {plural(rows, 'row')}"),
    ]
    if outlook.team.processes > 1:
        each = outlook.micro_batches // outlook.team.processes
        lines.append(Line("", "", f"{plural(each, 'micro-batch', 'es')} in each process"))
    if likely.update:
        said = " and sums over processes" if outlook.team.processes > 1 else ""
        lines.append(Line("its update", brief(likely.update), f"AdamW{said}, once a step"))
    if mfu := outlook.mfu(likely):
        lines.append(Line("MFU", f"{mfu:.1%}", "of the peak; 6 N + 12 L C T a token"))
    if outlook.load_average >= BUSY:
        busy = f"load average {outlook.load_average:.1f} before: measure in quiet"
        lines.append(Line("the machine was busy", "", busy))
    range_ = f"{short(outlook.tokens_per_second(slow))} to {short(outlook.tokens_per_second(fast))}"
    return (
        "How fast?",
        Line("", short(outlook.tokens_per_second(likely)), f"tokens per second ({range_})"),
        lines,
    )


def _time(outlook: Outlook, paces: tuple[Pace, Pace, Pace]) -> Section:
    fast, likely, slow = (sum(outlook.seconds(pace).values()) for pace in paces)
    work, parts = outlook.work, outlook.seconds(paces[1])
    each = (work.evaluated_tokens or 0) / max(1, work.evaluations)
    meanwhile = ", at most: it trains meanwhile" if outlook.recipe.checkpoints.save_in_background else ""
    notes = {
        "training": f"{work.steps:,} steps, {short(work.tokens)} tokens",
        "evaluation": f"{work.evaluations} times {short(each)} tokens",
        "samples": f"{short(work.sampled_tokens)} tokens",
        "checkpoints": f"{work.checkpoints} times {size(work.checkpoint_bytes)}{meanwhile}",
        "compilation": "and all else that only the first step does",
    }
    lines = [Line(name, duration(seconds), notes[name]) for name, seconds in parts.items() if seconds]
    if work.evaluated_tokens is None:
        lines.append(Line("evaluation", "?", "not counted: the text is not prepared yet"))
    if ends_at := outlook.ends_at(paces[1]):
        lines.append(Line("begun now it ends", "", f"{ends_at:%a %d %b %Y %H:%M}"))
    return "How long?", Line("", duration(likely), f"({duration(fast)} to {duration(slow)})"), lines


def _disk(outlook: Outlook) -> Section:
    needed, text = outlook.disk_bytes, outlook.text
    kept = needed["checkpoints"] // outlook.work.checkpoint_bytes - 1
    notes = {
        "shards": f"lie in {text.folder} already" if text.folder else "at most; the text is not prepared yet",
        "checkpoints": f"{kept} kept and one being written",
        "metrics": "a line for each step",
    }
    lines = [Line(name, size(count), notes[name]) for name, count in needed.items()]
    free, new = outlook.disk_free_bytes, outlook.new_disk_bytes
    has = "" if free is None else f"{size(free)} free" + (": TOO LITTLE" if new > free else "")
    return "How much disk?", Line("", size(sum(needed.values())), has), lines


def _money(outlook: Outlook, paces: tuple[Pace, Pace, Pace]) -> Section:
    fast, likely, slow = (outlook.cost(pace) for pace in paces)
    assert fast is not None
    assert likely is not None
    assert slow is not None
    lines = [
        Line(
            "a billion tokens",
            dollars(likely.billion_tokens),
            f"at {dollars(outlook.dollars_per_hour or 0)} an hour",
        )
    ]
    return (
        "How much money?",
        Line("", dollars(likely.run), f"({dollars(fast.run)} to {dollars(slow.run)})"),
        lines,
    )


def plural(count: int, noun: str, ending: str = "s") -> str:
    """1 row, 2 rows."""
    return f"{count:,} {noun}{ending if count != 1 else ''}"


def size(count: int) -> str:
    """Bytes as a person reads them: 1.49 GB, 14.9 MB, 149 kB."""
    for power, unit in ((9, "GB"), (6, "MB")):
        if count >= 0.9995 * 10**power:
            value = count / 10**power
            return f"{value:,.{0 if value >= 99.95 else 1 if value >= 9.995 else 2}f} {unit}"
    return f"{count / 1000:,.0f} kB"


def per_second(rate: float) -> str:
    """370 GB/s, 12.0 GB/s."""
    return f"{size(round(rate))}/s"


def brief(seconds: float) -> str:
    """A duration; one below a second in milliseconds."""
    return f"{1000 * seconds:,.{1 if seconds < 0.1 else 0}f} ms" if seconds < 1 else duration(seconds)


def dollars(amount: float) -> str:
    """$0.0312, $3.12, $312, $31,200."""
    return f"${amount:,.{0 if amount >= 100 else 2 if amount >= 1 else 4}f}"
