"""What `overnight plan` has found out, and how programs are told: as JSON."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text as Words

from overnight.planning.estimate import (
    Cost,
    RunCounts,
    StepCost,
    TokenCounts,
    predict_cost,
    predict_disk,
    predict_seconds,
)
from overnight.planning.network import ParallelEstimate, ParallelLayout, StepPrediction
from overnight.recipe import Recipe, Resolved
from overnight.terminal import duration, short
from overnight.training import Compute
from overnight.training.batch import BatchPlan
from overnight.training.memory import FitOption, MemoryEstimate, fits_into


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that a plan says."""

    name: str
    """Of the recipe, as it was given."""
    resolved: Resolved
    text: TokenCounts
    device_name: str
    assumption: str | None
    """What an estimate rests on; None if the machine was measured."""
    team: ParallelLayout = ParallelLayout()
    """The processes that train together."""
    memory: MemoryEstimate
    """Of one process."""
    device_memory_bytes: int | None
    """That a process may use; None of a device that shares the memory of a machine which is not here."""
    process_memory_bytes: int = 0
    """Of a CPU: what a process holds besides, torch and its libraries above all."""
    peak_memory_bytes: int | None = None
    """Measured while training."""
    evaluation_peak_memory_bytes: int | None = None
    """Measured after an evaluation as well."""
    fits: bool | None
    """None where the device's memory is not known."""
    ways_out: tuple[FitOption, ...] = ()
    """What would make it fit, if it does not."""
    several: FitOption | None = None
    """With how many GPUs of a machine it fits, up to eight, if it does not with one."""
    smaller: tuple[str, int] | None = None
    """The largest published model that fits, and its bytes, if this one does not."""
    work: RunCounts
    paces: tuple[StepCost, StepCost, StepCost] | None = None
    """Fast, likely and slow, of all processes together; None if there was nothing to measure."""
    shared: ParallelEstimate | None = None
    """What several processes make of the paces of one."""
    peak_flops: float | None = None
    """Of all devices together in the recipe's precision, as their maker publishes it."""
    disk_free_bytes: int | None = None
    """None of another machine's disk."""
    load_average: float = 0.0
    """How many programs competed for this machine's cores in the minute before; 0 where a GPU computes."""
    dollars_per_hour: float | None = None
    """Of all machines together."""
    made_at: datetime

    @property
    def recipe(self) -> Recipe:
        """The complete recipe."""
        return self.resolved.recipe

    @property
    def plan(self) -> BatchPlan:
        """The division of its steps."""
        return self.resolved.plan

    @property
    def compute(self) -> Compute:
        """How the device is used."""
        return self.resolved.compute

    @property
    def needed_bytes(self) -> int:
        """Of memory, all in all: an estimate."""
        return self.memory.together + self.process_memory_bytes

    @property
    def micro_batches(self) -> int:
        """Of a step, when a ramp has come to its end."""
        return self.plan.stages[-1].micro_batches

    @property
    def disk_bytes(self) -> dict[str, int]:
        """By what they hold."""
        return predict_disk(self.recipe, self.work, self.text)

    @property
    def new_disk_bytes(self) -> int:
        """Of these, what is not on the disk yet."""
        there = self.disk_bytes["shards"] if self.text.folder else 0
        return sum(self.disk_bytes.values()) - there

    def tokens_per_second(self, pace: StepCost) -> float:
        """Of the steps alone."""
        step = self.recipe.batch.tokens_per_step
        return step / pace.step(self.micro_batches)

    def mfu(self, pace: StepCost) -> float | None:
        """Share of the device's peak; None if that is not published."""
        used = self.tokens_per_second(pace) * self.recipe.model.flops_per_token()
        return used / self.peak_flops if self.peak_flops else None

    def seconds(self, pace: StepCost) -> dict[str, float]:
        """How long the run takes, by what it does meanwhile."""
        return predict_seconds(self.work, pace)

    def ends_at(self, pace: StepCost) -> datetime | None:
        """When a run ends that begins now; None beyond the calendar's end."""
        try:
            return self.made_at + timedelta(seconds=sum(self.seconds(pace).values()))
        except OverflowError:
            return None

    def cost(self, pace: StepCost) -> Cost | None:
        """None unless it was said what an hour costs."""
        if self.dollars_per_hour is None:
            return None
        return predict_cost(sum(self.seconds(pace).values()), self.work.tokens, self.dollars_per_hour)


# ---------------------------------------------------------------- for programs


def plan_to_json(outlook: Plan) -> dict[str, Any]:
    """Every figure, by name; what is not known is null."""
    recipe, compute = outlook.recipe, dataclasses.asdict(outlook.recipe.compute)
    found: dict[str, Any] = {
        "recipe": outlook.name,
        "parameters": recipe.model.parameter_count(),
        "device_name": outlook.device_name,
        "measured": outlook.assumption is None,
        "assumption": outlook.assumption,
        **compute,
        "fits": outlook.fits,
        "device_memory_bytes": outlook.device_memory_bytes,
        "needed_bytes": outlook.needed_bytes,
        "needed_bytes_by_use": {**vars(outlook.memory), "process": outlook.process_memory_bytes},
        "peak_memory_bytes": outlook.peak_memory_bytes,
        "evaluation_peak_memory_bytes": outlook.evaluation_peak_memory_bytes,
        "ways_out": [way._asdict() for way in outlook.ways_out],
        "fits_in_processes": outlook.several.options if outlook.several else None,
        "micro_batch_size": outlook.plan.micro_batch_size,
        "micro_batches_per_step": outlook.micro_batches,
        "tokens_per_step": recipe.batch.tokens_per_step,
        "total_steps": outlook.work.steps,
        "total_tokens": outlook.work.tokens,
        "checkpoint_bytes": outlook.work.checkpoint_bytes,
        "disk_bytes_by_use": outlook.disk_bytes,
        "disk_bytes": sum(outlook.disk_bytes.values()),
        "disk_free_bytes": outlook.disk_free_bytes,
        "load_average": outlook.load_average,
    }
    found |= _team(outlook.team)
    found |= _step(outlook.shared) if outlook.shared else {}
    return found | (_forecast(outlook, outlook.paces) if outlook.paces else {})


def _team(team: ParallelLayout) -> dict[str, Any]:
    """Who trains, and what they divide; the memory above is that of each."""
    cluster = team.cluster
    return {
        "machines": team.machines,
        "processes_per_machine": team.processes_per_machine,
        "all_processes": team.processes,
        "sharding": team.sharding,
        "needed_bytes_by_sharding": team.tried,
        "link_within": dataclasses.asdict(cluster.within) if cluster else None,
        "link_between": dataclasses.asdict(cluster.between) if cluster and cluster.between else None,
    }


def _step(shared: ParallelEstimate) -> dict[str, Any]:
    """What is predicted of communication: of one process in a full step."""
    step = shared.step
    if step is None:
        return {}
    return {
        "compute_seconds_per_step": step.compute_seconds,
        "communication_seconds_per_step": step.communication_seconds,
        "communication_bytes_per_step": step.communication_bytes,
        "communication_overlaps": step.overlaps,
        "efficiency_range": step.efficiency_range,
        "efficiency_range_by_network": {
            name: other.efficiency_range for name, other in shared.networks.items()
        },
        "faster_options": shared.faster[0] if shared.faster else None,
        "faster_step_seconds": shared.faster[1] if shared.faster else None,
    }


def _forecast(outlook: Plan, paces: tuple[StepCost, StepCost, StepCost]) -> dict[str, Any]:
    """What follows from how fast the steps are."""
    fast, likely, slow = paces
    seconds = {
        name: outlook.seconds(pace) for name, pace in zip(("fast", "likely", "slow"), paces, strict=True)
    }
    cost, ends_at = outlook.cost(likely), outlook.ends_at(likely)
    return {
        "tokens_per_second": outlook.tokens_per_second(likely),
        "tokens_per_second_range": [outlook.tokens_per_second(slow), outlook.tokens_per_second(fast)],
        "step_seconds": likely.step(outlook.micro_batches),
        "micro_batch_seconds": likely.micro_batch,
        "update_seconds": likely.update,
        "mfu": outlook.mfu(likely),
        "seconds_by_use": seconds["likely"],
        "seconds": sum(seconds["likely"].values()),
        "seconds_range": [sum(seconds["fast"].values()), sum(seconds["slow"].values())],
        "ends_at": ends_at.isoformat(timespec="seconds") if ends_at else None,
        "dollars": cost.run if cost else None,
        "dollars_per_billion_tokens": cost.billion_tokens if cost else None,
    }


# ---------------------------------------------------------------- the page that `overnight plan` shows


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
    "zero1": "AdamW's moments (ZeRO-1)",
    "fsdp": "weights, gradients, moments (FSDP2)",
    "hsdp": "the same, within each machine",
}


class PlanLine(NamedTuple):
    """One line of the page."""

    label: str
    figure: str = ""
    note: str = ""


def plan_text(outlook: Plan) -> str:
    """The page, no wider than 80 columns; headings stand out where stderr is a terminal."""
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


def _title(outlook: Plan) -> str:
    compute, model = outlook.recipe.compute, outlook.recipe.model
    how = [str(compute.precision), "compiled" if compute.compile else "not compiled"]
    how += [f"{name} {getattr(compute, name)}" for name in ("attention", "loss")]
    how += (
        [f"activation_checkpointing {compute.activation_checkpointing}"]
        if compute.activation_checkpointing != "none"
        else []
    )
    measured = "measured here and now"
    if outlook.team.processes > 1:
        measured += " with one process; of several, a PREDICTION"
    rests_on = f"ESTIMATE, not measured: {outlook.assumption}" if outlook.assumption else measured
    size = f"{model.parameter_count():,} parameters"
    return f"{outlook.name}, {size}\non {outlook.device_name}: {', '.join(how)}\n{rests_on}"


Section = tuple[str, PlanLine, list[PlanLine]]


def _sections(outlook: Plan) -> list[Section]:
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


def _memory(outlook: Plan) -> Section:
    rows, context = outlook.plan.micro_batch_size, outlook.recipe.model.context_length
    at_once = f"{plural(rows, 'row')} of {context:,} tokens at once"
    lines = [
        PlanLine(HOLDS[name][0], size(count), HOLDS[name][1] or at_once)
        for name, count in vars(outlook.memory).items()
        if count
    ]
    if outlook.process_memory_bytes:
        lines.append(PlanLine("the process", size(outlook.process_memory_bytes), "torch and its libraries"))
    lines.append(PlanLine("estimated together", size(outlook.needed_bytes)))
    if outlook.peak_memory_bytes:
        lines.append(PlanLine("measured peak", size(outlook.peak_memory_bytes), "while training"))
    evaluating = outlook.evaluation_peak_memory_bytes or 0
    if evaluating > (outlook.peak_memory_bytes or 0):
        lines.append(PlanLine("", size(evaluating), "while evaluating"))
    if outlook.recipe.checkpoints.async_checkpoint:
        held = outlook.work.checkpoint_bytes // outlook.team.processes
        lines.append(PlanLine("besides", size(held), "of the CPU's memory, while a checkpoint is written"))
    for way in outlook.ways_out:
        lines.append(PlanLine("would fit", size(way.needed_bytes), way.options.replace(" --", "\n--")))
    if outlook.several:
        lines.append(PlanLine("would fit", size(outlook.several.needed_bytes), outlook.several.options))
    if outlook.smaller and not outlook.ways_out:
        name, count = outlook.smaller
        lines.append(PlanLine("largest that would", size(count), f"{name}, one row at once"))
    there = outlook.device_memory_bytes
    whose = "each process has" if outlook.team.processes > 1 else "there are"
    has = f"{whose} {size(there)}" if there else "the chip shares the memory of its machine"
    answer = {True: "yes", False: "no", None: "see below"}[outlook.fits]
    return "Does it fit?", PlanLine("", answer, has), lines


def _division(outlook: Plan) -> Section:
    """What the processes divide, and why."""
    team, there = outlook.team, outlook.device_memory_bytes
    lines = []
    for sharding, needed in team.tried.items() if len(team.tried) > 1 else ():
        fits = there is not None and fits_into(there, needed)
        lines.append(PlanLine(f"sharding {sharding}", size(needed), "fits" if fits else "does not fit"))
    if team.cluster is None:
        lines.append(PlanLine("communication", "?", "not counted: they share one CPU"))
    why = "as asked" if team.is_asked else "the first that fits" if outlook.fits else "takes least"
    if not team.is_asked and there is None:
        why = "not chosen: the memory is not known"
    answer = PlanLine("", team.sharding, f"{DIVIDE[team.sharding]}; {why}")
    return f"What do {team.processes} divide?", answer, lines


def _communication(outlook: Plan, shared: ParallelEstimate, step: StepPrediction) -> Section:
    """How long the processes talk in a step, and what is left of it for computing."""
    cluster = outlook.team.cluster
    assert cluster is not None
    hidden = "none to all of it while it computes" if step.overlaps else "when all is computed"
    sent = f"{size(round(step.communication_bytes))} sent by each, {hidden}"
    lines = [
        PlanLine("computing", brief(step.compute_seconds), "of a step, in each process"),
        PlanLine("communication", brief(step.communication_seconds), sent),
        PlanLine("within a machine", per_second(cluster.within.bytes_per_second), cluster.within.name),
        PlanLine("", "", cluster.within.source),
    ]
    if cluster.between is not None:
        rate = per_second(cluster.between.bytes_per_second)
        lines.append(PlanLine("between machines", rate, f"of each machine: {cluster.between.name}"))
        lines.append(PlanLine("", "", cluster.between.source))
    for name, other in shared.networks.items():
        lines.append(PlanLine(f"over {name}", _share_of_step(other), "if the network were that"))
    if shared.faster is not None:
        options, seconds = shared.faster
        lines.append(PlanLine("would be faster", brief(seconds), options.replace(" --", "\n--")))
    lines.append(PlanLine("rests on", "", "messages that go round a ring at these rates, and nobody waiting"))
    answer = PlanLine("", _share_of_step(step), "of a step is computing: a PREDICTION")
    return "How well together?", answer, lines


def _share_of_step(step: StepPrediction) -> str:
    """97%, or 65 to 100% where it is not known how much is hidden."""
    worst, best = (f"{100 * share:.0f}" for share in step.efficiency_range)
    return f"{best}%" if worst == best else f"{worst} to {best}%"


def _speed(outlook: Plan, paces: tuple[StepCost, StepCost, StepCost]) -> Section:
    fast, likely, slow = paces
    rows, step = outlook.plan.micro_batch_size, likely.step(outlook.micro_batches)
    lines = [
        PlanLine("a step", brief(step), f"{outlook.recipe.batch.tokens_per_step:,} tokens"),
        PlanLine("", "", f"{plural(outlook.micro_batches, 'micro-batch', 'es')} of {plural(rows, 'row')}"),
    ]
    if outlook.team.processes > 1:
        each = outlook.micro_batches // outlook.team.processes
        lines.append(PlanLine("", "", f"{plural(each, 'micro-batch', 'es')} in each process"))
    if likely.update:
        said = " and sums over processes" if outlook.team.processes > 1 else ""
        lines.append(PlanLine("its update", brief(likely.update), f"AdamW{said}, once a step"))
    if mfu := outlook.mfu(likely):
        lines.append(PlanLine("MFU", f"{mfu:.1%}", "of the peak; 6 N + 12 L C T a token"))
    if outlook.load_average >= BUSY:
        busy = f"load average {outlook.load_average:.1f} before: measure in quiet"
        lines.append(PlanLine("the machine was busy", "", busy))
    range_ = f"{short(outlook.tokens_per_second(slow))} to {short(outlook.tokens_per_second(fast))}"
    return (
        "How fast?",
        PlanLine("", short(outlook.tokens_per_second(likely)), f"tokens per second ({range_})"),
        lines,
    )


def _time(outlook: Plan, paces: tuple[StepCost, StepCost, StepCost]) -> Section:
    fast, likely, slow = (sum(outlook.seconds(pace).values()) for pace in paces)
    work, parts = outlook.work, outlook.seconds(paces[1])
    each = (work.evaluated_tokens or 0) / max(1, work.evaluations)
    meanwhile = ", at most: it trains meanwhile" if outlook.recipe.checkpoints.async_checkpoint else ""
    notes = {
        "training": f"{work.steps:,} steps, {short(work.tokens)} tokens",
        "evaluation": f"{work.evaluations} times {short(each)} tokens",
        "samples": f"{short(work.sampled_tokens)} tokens",
        "checkpoints": f"{work.checkpoints} times {size(work.checkpoint_bytes)}{meanwhile}",
        "compilation": "and all else that only the first step does",
    }
    lines = [PlanLine(name, duration(seconds), notes[name]) for name, seconds in parts.items() if seconds]
    if work.evaluated_tokens is None:
        lines.append(PlanLine("evaluation", "?", "not counted: the text is not prepared yet"))
    if ends_at := outlook.ends_at(paces[1]):
        lines.append(PlanLine("begun now it ends", "", f"{ends_at:%a %d %b %Y %H:%M}"))
    return "How long?", PlanLine("", duration(likely), f"({duration(fast)} to {duration(slow)})"), lines


def _disk(outlook: Plan) -> Section:
    needed, text = outlook.disk_bytes, outlook.text
    kept = needed["checkpoints"] // outlook.work.checkpoint_bytes - 1
    notes = {
        "shards": f"lie in {text.folder} already" if text.folder else "at most; the text is not prepared yet",
        "checkpoints": f"{kept} kept and one being written",
        "metrics": "a line for each step",
    }
    lines = [PlanLine(name, size(count), notes[name]) for name, count in needed.items()]
    free, new = outlook.disk_free_bytes, outlook.new_disk_bytes
    has = "" if free is None else f"{size(free)} free" + (": TOO LITTLE" if new > free else "")
    return "How much disk?", PlanLine("", size(sum(needed.values())), has), lines


def _money(outlook: Plan, paces: tuple[StepCost, StepCost, StepCost]) -> Section:
    fast, likely, slow = (outlook.cost(pace) for pace in paces)
    assert fast is not None
    assert likely is not None
    assert slow is not None
    lines = [
        PlanLine(
            "a billion tokens",
            dollars(likely.billion_tokens),
            f"at {dollars(outlook.dollars_per_hour or 0)} an hour",
        )
    ]
    return (
        "How much money?",
        PlanLine("", dollars(likely.run), f"({dollars(fast.run)} to {dollars(slow.run)})"),
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
