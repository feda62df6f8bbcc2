"""The command `overnight runs`: lists the runs in runs/ and the state of each."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from overnight.run_directory import RunDirectory, finite_values
from overnight.runs import FOLDER, RunsConfig
from overnight.runs.status import RunStatus, describe_run, list_runs
from overnight.terminal import ago, duration, echo, short

SIGNS = {"above": "↑", "below": "↓", "suspect": "?"}
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
        raise ValueError(f"the folder {folder} does not exist; runs are in {FOLDER}/ by default")
    runs = [describe_run(folder)] if RunDirectory(folder).exists() else list_runs(folder)
    if config.json:
        values = finite_values([dataclasses.asdict(one) for one in runs])
        sys.stdout.write(json.dumps(values, indent=2, default=_iso_time) + "\n")
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
    # --resume prints the remedy for a damaged run.
    command = "train --resume" if runs[-1].state in {"stopped", "empty", "damaged"} else "report"
    echo(f"next: overnight {command} {runs[-1].path}")


def _iso_time(time: datetime) -> str:
    return time.isoformat(timespec="seconds")


def runs_table(runs: Sequence[RunStatus], now: datetime, columns: int = 80) -> str:
    """The runs as a table no wider than `columns`; coloured if stderr is a terminal."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    table.add_column("run")  # the only column that may shrink
    table.add_column("state", no_wrap=True)
    for title in ("step", "val loss", "bits/byte", "tokens/s", "written"):
        table.add_column(title, justify="right", no_wrap=True)
    for run in runs:
        loss = f"{run.validation_loss:.4f}" if run.validation_loss is not None else "–"
        written = ago((now - run.last_written_at).total_seconds()) if run.last_written_at else "–"
        table.add_row(
            Text(run.name, no_wrap=True, overflow="ellipsis"),
            Text(run.state, COLOURS[run.state]),
            short(run.step) + (f"/{short(run.total_steps)}" if run.total_steps else ""),
            f"{loss} {SIGNS[run.on_track]}" if run.on_track in SIGNS else loss,
            f"{run.bits_per_byte:.4f}" if run.bits_per_byte is not None else "–",
            short(run.tokens_per_second) if run.tokens_per_second is not None else "–",
            f"{duration(run.seconds_left)} left" if run.seconds_left else written,
        )
    console = Console(stderr=True, width=columns, highlight=False)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def _notes(run: RunStatus) -> Iterator[str]:
    """Facts that the table has no room for."""
    if run.problem:
        yield run.problem
    if run.ended_by:
        yield f"{'stopped by' if run.state == 'stopped' else 'diverged:'} {run.ended_by}"
    if run.rollbacks:
        times = "once" if run.rollbacks == 1 else f"{run.rollbacks} times"
        yield f"rolled back to a checkpoint {times} (events/rollbacks.jsonl)"
    if run.on_track in SIGNS:
        is_suspect = run.on_track == "suspect"
        position = "within its reference, but suspect" if is_suspect else f"{run.on_track} its reference"
        likely = f"; likeliest: {run.likely_mistake}" if run.likely_mistake else ""
        yield f"{SIGNS[run.on_track]} {position}{likely}"
