"""The command `overnight runs`: lists the runs in runs/ and the state of each."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

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
    """Show every run, the latest last. Raises ValueError if the named folder does not exist."""
    folder = Path(config.folder)
    if not folder.is_dir() and config.folder != FOLDER:
        raise ValueError(f"there is no folder {folder}; runs are in {FOLDER}/ by default")
    runs = [describe_run(folder)] if is_run(folder) else list_runs(folder)
    if config.json:
        sys.stdout.write(json.dumps([runs_to_json(one) for one in runs], indent=2) + "\n")
        return
    if not runs:
        echo(f"there are no runs in {folder}/ yet")
        echo("next: overnight quickstart")
        return
    columns = shutil.get_terminal_size().columns  # 80 without a terminal
    echo(runs_table(runs, datetime.now(UTC), columns))
    for one in runs:
        for note in _notes(one):
            echo(f"{one.path}: {note}")
    echo(next_command(runs))


def runs_to_json(run: RunStatus) -> dict[str, object]:
    """The status as JSON values: times in ISO 8601, numbers that are not finite as null."""
    values: dict[str, object] = {}
    for name, value in dataclasses.asdict(run).items():
        if isinstance(value, datetime):
            values[name] = value.isoformat(timespec="seconds")
        else:
            values[name] = None if isinstance(value, float) and not math.isfinite(value) else value
    return values


def next_command(runs: Sequence[RunStatus]) -> str:
    """The command to use on the latest run."""
    latest = runs[-1]
    if latest.state in {"stopped", "empty", "damaged"}:  # --resume says how to mend the damage
        return f"next: overnight train --resume {latest.path}"
    return f"next: overnight report {latest.path}"


def runs_table(runs: Sequence[RunStatus], now: datetime, columns: int = 80) -> str:
    """The runs as a table no wider than `columns`; coloured if stderr is a terminal."""
    rows = [_cells(one, now) for one in runs]
    widths = [max(map(len, column)) for column in zip(TITLES, *rows, strict=True)]
    widths[0] = min(widths[0], columns - sum(widths[1:]) - GAP * len(widths))
    table = Table(box=None, padding=(0, GAP, 0, 0), header_style="dim", pad_edge=False)
    for title, width in zip(TITLES, widths, strict=True):
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
    written = ago((now - run.last_written_at).total_seconds()) if run.last_written_at else "–"
    sign = SIGNS.get(run.on_track or "", "")
    return [
        run.name,
        run.state,
        short(run.step) + (f"/{short(run.total_steps)}" if run.total_steps else ""),
        f"{run.validation_loss:.4f}{sign}" if run.validation_loss is not None else "–",
        f"{run.bits_per_byte:.4f}" if run.bits_per_byte is not None else "–",
        short(run.tokens_per_second) if run.tokens_per_second is not None else "–",
        f"{duration(run.seconds_left)} left" if run.seconds_left else written,
    ]


def _notes(run: RunStatus) -> Iterator[str]:
    """What the table has no room for."""
    if run.problem:
        yield run.problem
    if run.ended_by:
        yield f"{'stopped by' if run.state == 'stopped' else 'diverged:'} {run.ended_by}"
    if run.rollbacks:
        times = "once" if run.rollbacks == 1 else f"{run.rollbacks} times"
        yield f"rolled back to a checkpoint {times} (events/rollbacks.jsonl)"
    if run.on_track in SIGNS:
        position = (
            "within its reference, but suspect"
            if run.on_track == "suspect"
            else f"{run.on_track} its reference"
        )
        likely = f"; likeliest: {run.likely_mistake}" if run.likely_mistake else ""
        yield f"{SIGNS[run.on_track].strip()} {position}{likely}"
