"""A plan as JSON, and as text: questions, answers, and the figures behind them, 80 columns wide.

templates/plan.txt has a title, then a line for each row of a table, its three cells divided by ` | `; a line
that is not indented is a question with its answer.
"""

from __future__ import annotations

import dataclasses
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from overnight.model.parts import describe_parts
from overnight.planning.plan import Plan
from overnight.report.html import text_templates
from overnight.terminal import byte_size, duration, short
from overnight.training.memory import fits_into

COLUMNS = 80


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """Every figure by name; null where it is unknown."""
    layout, resolved, counts, disk = plan.layout, plan.resolved, plan.counts, plan.disk_bytes
    same = ("device_name", "assumption", "fits", "device_memory_bytes", "needed_bytes", "load_average")
    measured = plan.measured._asdict()
    process_memory = measured.pop("process_memory_bytes")
    found = {
        "recipe": plan.name,
        "parameters": resolved.model.parameter_count(),
        "flops_per_token": resolved.model.flops_per_token(),
        "optimizer": resolved.recipe.optimizer.optimizer,
        "measured": plan.assumption is None,
        **dataclasses.asdict(resolved.recipe.compute),
        **{name: getattr(plan, name) for name in same},
        **measured,
        "disk_free_bytes": plan.disk_free_bytes,
        "needed_bytes_by_use": {**dataclasses.asdict(plan.memory), "process": process_memory},
        "ways_out": [option._asdict() for option in plan.fit_options],
        "fits_in_processes": plan.fit_in_processes and plan.fit_in_processes.options,
        "micro_batch_size": resolved.plan.micro_batch_size,
        "micro_batches_per_step": plan.micro_batches,
        "tokens_per_step": resolved.recipe.batch.tokens_per_step,
        "total_steps": counts.steps,
        "total_tokens": counts.tokens,
        "checkpoint_bytes": counts.checkpoint_bytes,
        "disk_bytes_by_use": disk,
        "disk_bytes": sum(disk.values()),
        "machines": layout.machines,
        "processes_per_machine": layout.processes_per_machine,
        "all_processes": layout.processes,
        "sharding": layout.sharding,
        "needed_bytes_by_sharding": plan.needed_bytes_by_sharding,
        "link_within": None if layout.is_on_cpu else dataclasses.asdict(layout.within),
        "link_between": layout.between and dataclasses.asdict(layout.between),
    }
    if step := plan.communication:
        found |= {**dataclasses.asdict(step), "efficiency_range": step.efficiency_range}
    return found | (dataclasses.asdict(plan.forecast) if plan.forecast else {})


def plan_text(plan: Plan) -> str:
    """The text of the plan; questions and answers are bold if stderr is a terminal."""
    title, lines = _render(plan).split("\n\n", 1)
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, min_width=22)
    table.add_column(no_wrap=True, justify="right", min_width=10)
    table.add_column()
    for line in ["", *lines.splitlines()]:
        label, figure, note = [*map(str.strip, line.split("|")), "", ""][:3]
        if line.startswith(" "):
            # A line break never separates an option from its value.
            options = note.replace(" --", "\n--") if note.startswith("--") else note
            table.add_row(f"  {label}", figure, Text(options, "dim"))
        else:
            table.add_row(Text(label, "bold"), Text(figure, "bold"), note)
    console = Console(stderr=True, width=COLUMNS, highlight=False)
    with console.capture() as captured:
        console.print(title)
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def _render(plan: Plan) -> str:
    environment = text_templates("overnight.planning")
    for function in (plural, byte_size, percent_range, brief, date, dollars, duration, short):
        environment.filters[function.__name__] = function
    settings = dataclasses.asdict(plan.resolved.model) | dataclasses.asdict(plan.resolved.recipe.optimizer)
    return environment.get_template("plan.txt").render(
        plan=plan, memory=vars(plan.memory), fits_into=fits_into, parts=describe_parts(settings)
    )


def plural(count: int, noun: str, ending: str = "s") -> str:
    """1 row, 2 rows."""
    return f"{count:,} {noun}{ending if count != 1 else ''}"


def percent_range(shares: tuple[float, float]) -> str:
    """97%, or 65 to 100%."""
    low, high = (f"{100 * share:.0f}" for share in shares)
    return f"{high}%" if low == high else f"{low} to {high}%"


def brief(seconds: float) -> str:
    """A duration; below a second in milliseconds."""
    return f"{1000 * seconds:,.{1 if seconds < 0.1 else 0}f} ms" if seconds < 1 else duration(seconds)


def date(moment: str) -> str:
    """Sun 29 Nov 2026 19:19, of an ISO time."""
    return f"{datetime.fromisoformat(moment):%a %d %b %Y %H:%M}"


def dollars(amount: float) -> str:
    """$0.0312, $3.12, $312, $31,200."""
    return f"${amount:,.{0 if amount >= 100 else 2 if amount >= 1 else 4}f}"
