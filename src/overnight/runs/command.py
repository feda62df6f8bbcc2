"""The command `overnight runs`: what is in runs/, and how each run is doing."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from overnight.runs import FOLDER, RunsConfig
from overnight.runs.status import RunStatus, describe_run, is_run, list_runs
from overnight.terminal import ago, duration, echo, short

TITLES = ("run", "state", "step", "val loss", "bits/byte", "tokens/s", "written")
GAP = 2
SIGNS = {"above": " ↑", "below": " ↓", "suspect": " ?"}
COLOURS = {
    "running": "green",
    "finished": "bold",
    "stopped": "yellow",
    "diverged": "red",
    "empty": "dim",
    "damaged": "red",
}


def run(config: RunsConfig) -> None:
    """Show every run, the latest last. Raises ValueError if a folder was named that is not there."""
    folder = Path(config.folder)
    if not folder.is_dir() and config.folder != FOLDER:
        raise ValueError(f"there is no folder {folder}; runs lie in {FOLDER}/ unless they were put elsewhere")
    runs = [describe_run(folder)] if is_run(folder) else list_runs(folder)
    if config.json:
        sys.stdout.write(json.dumps([runs_to_json(one) for one in runs], indent=2) + "\n")
        return
    if not runs:
        echo(f"there are no runs in {folder}/ yet")
        echo("next: overnight quickstart")
        return
    columns = shutil.get_terminal_size().columns  # 80 where there is no terminal
    echo(runs_table(runs, datetime.now(UTC), columns))
    for one in runs:
        if one.problem:
            echo(f"{one.path}: {one.problem}")
        if one.ended_by:
            how = "stopped by" if one.state == "stopped" else "diverged:"
            echo(f"{one.path}: {how} {one.ended_by}")
        if one.rollbacks:
            times = "once" if one.rollbacks == 1 else f"{one.rollbacks} times"
            echo(f"{one.path}: went back to a checkpoint {times} (events/rollbacks.jsonl)")
        if one.on_track in SIGNS:
            echo(f"{one.path}: {describe_place(one)}")
    echo(resume_command(runs))


def runs_to_json(run: RunStatus) -> dict[str, object]:
    """The status as JSON values: times in ISO 8601, numbers that are not finite as null."""
    values: dict[str, object] = {}
    for name, value in dataclasses.asdict(run).items():
        if isinstance(value, datetime):
            values[name] = value.isoformat(timespec="seconds")
        else:
            values[name] = None if isinstance(value, float) and not math.isfinite(value) else value
    return values


def describe_place(run: RunStatus) -> str:
    """Where a run that is off lies beside its reference, and what fits."""
    likely = f"; likeliest: {run.likely_mistake}" if run.likely_mistake else ""
    place = (
        "within its reference, and suspect" if run.on_track == "suspect" else f"{run.on_track} its reference"
    )
    return f"{SIGNS[run.on_track or ''].strip()} {place}{likely}"


def resume_command(runs: Sequence[RunStatus]) -> str:
    """What one would want to do about the latest run."""
    latest = runs[-1]
    if latest.state in {"stopped", "empty", "damaged"}:  # which says what is to be mended
        return f"next: overnight train --resume {latest.path}"
    return f"next: overnight report {latest.path}"


def runs_table(runs: Sequence[RunStatus], now: datetime, columns: int = 80) -> str:
    """The runs as a table no wider than `columns`; coloured where stderr is a terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = [_cells(one, now) for one in runs]
    widths = [max(map(len, column)) for column in zip(TITLES, *rows, strict=True)]
    table = Table(box=None, padding=(0, GAP, 0, 0), header_style="dim", pad_edge=False)
    name_width = columns - sum(widths[1:]) - GAP * len(widths)
    for title, width in zip(TITLES, [min(widths[0], name_width), *widths[1:]], strict=True):
        is_word = title in {"run", "state"}
        table.add_column(title, justify="left" if is_word else "right", no_wrap=True, width=width)
    for one, (name, _, *numbers) in zip(runs, rows, strict=True):
        table.add_row(Text(name, overflow="ellipsis"), Text(one.state, COLOURS[one.state]), *numbers)
    console = Console(stderr=True, width=columns, highlight=False)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def _cells(run: RunStatus, now: datetime) -> list[str]:
    """The row's plain text, in the order of TITLES."""
    written = run.last_written_at
    sign = SIGNS.get(run.on_track or "", "")
    left = f"{duration(run.seconds_left)} left" if run.seconds_left else ""
    return [
        run.name,
        run.state,
        short(run.step) + (f"/{short(run.total_steps)}" if run.total_steps else ""),
        f"{run.validation_loss:.4f}{sign}" if run.validation_loss is not None else "–",
        f"{run.bits_per_byte:.4f}" if run.bits_per_byte is not None else "–",
        short(run.tokens_per_second) if run.tokens_per_second is not None else "–",
        left or (ago((now - written).total_seconds()) if written else "–"),
    ]
