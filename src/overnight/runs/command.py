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
from overnight.terminal import ago, duration, echo, shell_command, short, wrap

TITLES = ("state", "step", "val loss", "bits/byte", "tokens/s", "written")
LEFT_OUT_FIRST = ("tokens/s", "bits/byte", "written", "val loss", "step", "state")
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
    columns = max(20, shutil.get_terminal_size().columns)  # 80 without a terminal
    echo(runs_table(runs, datetime.now(UTC), columns))
    for one in runs:
        for note in _notes(one):
            echo("\n".join(wrap(f"{one.path}: {note}", columns, rest="  ")))
    # --resume prints the remedy for a damaged run.
    command = ["train", "--resume"] if runs[-1].state in {"stopped", "empty", "damaged"} else ["report"]
    echo(f"next: {shell_command(*command, Path(runs[-1].path))}")


def _iso_time(time: datetime) -> str:
    return time.isoformat(timespec="seconds")


def runs_table(runs: Sequence[RunStatus], now: datetime, columns: int = 80) -> str:
    """The runs as a table no wider than `columns`; coloured if stderr is a terminal.

    A name identifies its line and is always complete: where there is no room, other columns are left out.
    """
    cells = {"run": [Text(run.name, overflow="fold") for run in runs]}
    cells |= {title: [Text(*_cell(run, title, now)) for run in runs] for title in TITLES}
    widths = {title: max(len(title), *map(len, texts)) for title, texts in cells.items()}
    for title in LEFT_OUT_FIRST:
        if sum(widths.values()) + 2 * (len(widths) - 1) <= columns:
            break
        del widths[title], cells[title]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for title in cells:
        is_number = title not in {"run", "state"}
        table.add_column(title, justify="right" if is_number else "left", no_wrap=title != "run")
    for row in zip(*cells.values(), strict=True):
        table.add_row(*row)
    console = Console(stderr=True, width=columns, highlight=False)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def _cell(run: RunStatus, title: str, now: datetime) -> tuple[str, ...]:
    """The text of one column, and its colour if it has one."""
    if title == "state":
        return run.state, COLOURS[run.state]
    if title == "step":
        return (short(run.step) + (f"/{short(run.total_steps)}" if run.total_steps else ""),)
    if title == "val loss":
        loss = f"{run.validation_loss:.4f}" if run.validation_loss is not None else "–"
        return (f"{loss} {SIGNS[run.on_track]}" if run.on_track in SIGNS else loss,)
    if title == "bits/byte":
        return (f"{run.bits_per_byte:.4f}" if run.bits_per_byte is not None else "–",)
    if title == "tokens/s":
        return (short(run.tokens_per_second) if run.tokens_per_second is not None else "–",)
    if run.seconds_left:
        return (f"{duration(run.seconds_left)} left",)
    return (ago((now - run.last_written_at).total_seconds()) if run.last_written_at else "–",)


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
