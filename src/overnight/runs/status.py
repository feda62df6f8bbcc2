"""The state of each run, from the ends of its files: fast enough for fifty long runs.

Imports no numpy, torch or matplotlib, so that `overnight runs` starts quickly.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import statistics
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from overnight.recipe import Recipe
from overnight.run_directory import RunDirectory
from overnight.runs import FOLDER
from overnight.runs.json_lines import EVENT_KEYS, LOSS_KEYS, is_number, read_lines
from overnight.training.batch import BatchConfig, plan_batches

State = Literal["running", "finished", "stopped", "diverged", "empty", "damaged"]


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """The state of one run. A field is None if it is not known yet."""

    name: str
    path: str
    state: State
    """running: its lock is held; finished: all steps are done and the last checkpoint exists; stopped: some
    steps are done; diverged: it stopped because of its losses; empty: no step is done; damaged: some file
    cannot be read, and `problem` says which."""
    step: int = 0
    """Finished steps."""
    total_steps: int | None = None
    loss: float | None = None
    """The last step's training loss, in nats per token."""
    validation_loss: float | None = None
    """The last evaluation's, in nats per token."""
    bits_per_byte: float | None = None
    """The last evaluation's."""
    on_track: str | None = None
    """Position in the recipe's reference band at the last evaluation: within, below, above, or suspect
    (within, but a diagnosis fits). None without a reference."""
    likely_mistake: str | None = None
    """The first diagnosis that fits, if the run is off its reference."""
    tokens: int = 0
    """Tokens trained on."""
    tokens_per_second: float | None = None
    """The median over the last 200 steps."""
    seconds_left: float | None = None
    """The remaining tokens divided by the median speed, while the run is running."""
    last_written_at: datetime | None = None
    """When the metrics file last grew, UTC."""
    problem: str | None = None
    """What is damaged, and where."""
    ended_by: str | None = None
    """Why it stopped or diverged."""
    rollbacks: int = 0
    """Number of rollbacks to a checkpoint."""


def find_run(name: str) -> Path:
    """The run `name`: a path, or a name under runs/. Raises ValueError with the nearest name."""
    folder = Path(FOLDER)
    for path in (Path(name), folder / name):
        if RunDirectory(path).exists():
            return path
    if Path(name).is_dir():
        raise ValueError(
            f"{name} is a folder but not a run: it has no recipe.toml; `overnight runs` lists the runs"
        )
    known = {path.name: path for parent in (folder, Path(name).parent) for path in _run_folders(parent)}
    near = difflib.get_close_matches(Path(name).name, known, n=1, cutoff=0.5)
    remedy = f"did you mean {known[near[0]]}?" if near else "`overnight runs` lists the runs"
    raise ValueError(f"there is no run {name}; {remedy}")


def list_runs(folder: Path) -> list[RunStatus]:
    """Every run directly under `folder`, the most recently written last.

    A run with a file that can't be read is damaged, and `problem` gives the reason: it hides no other run.
    """
    never = datetime.min.replace(tzinfo=UTC)
    runs = map(_describe_any, _run_folders(folder))
    return sorted(runs, key=lambda run: (run.last_written_at or never, run.name))


def _describe_any(path: Path) -> RunStatus:
    try:
        return describe_run(path)
    except OSError as error:
        where = str(error.filename or path).removeprefix(f"{path}{os.sep}")
        return _unreadable(path, f"{where} cannot be read: {error.strerror or error}")
    except (ValueError, OverflowError, RecursionError) as error:
        return _unreadable(path, f"a file cannot be read: {error}")


def _unreadable(path: Path, problem: str) -> RunStatus:
    """The state of a run of which nothing but its path is known."""
    return RunStatus(name=path.absolute().name, path=str(path), state="damaged", problem=problem)


def describe_run(path: Path) -> RunStatus:
    """The state of the run in `path`, from its recipe and the ends of its metrics and evaluations.

    Raises OSError for a file that can't be read.
    """
    directory = RunDirectory(path)
    metrics = read_lines(directory.metrics, LOSS_KEYS, only_ends=True)
    evaluations = read_lines(path / "events" / "evaluations.jsonl", LOSS_KEYS, only_ends=True)
    rollbacks = read_lines(path / "events" / "rollbacks.jsonl", EVENT_KEYS, only_ends=True)
    problems = [*metrics.problems, *evaluations.problems]
    settings = _read_settings(directory, problems)
    is_running = _is_running(directory)
    if not problems and not is_running:
        problems += [sentence.removeprefix(f"{path}{os.sep}") for sentence in directory.problems()]
    asked_steps = settings.get("total_steps")
    total_steps = asked_steps if isinstance(asked_steps, int) else None
    last: dict[str, Any] = metrics.values[-1] if metrics.values else {"step": 0, "tokens": 0}
    evaluation = evaluations.values[-1] if evaluations.values else {}
    bits = evaluation.get("bits_per_byte")
    if bits is not None and not is_number(bits):
        problems.append(f"evaluations.jsonl has {bits!r:.40} as its last bits_per_byte")
        bits = None
    on_track, mistake = (
        value if isinstance(value := evaluation.get(name), str) else None
        for name in ("on_track", "likely_mistake")
    )
    state: State = "running" if is_running else _state(directory, last["step"], total_steps)
    if problems:
        state = "damaged"
    ended_by = _read_end_reason(directory) if state == "stopped" else None
    if ended_by and ended_by.startswith("FloatingPointError: "):
        state, ended_by = "diverged", ended_by.removeprefix("FloatingPointError: ")
    speeds = [line.get("tokens_per_second") for line in metrics.values[-200:]]
    known_speeds = [speed for speed in speeds if is_number(speed)]
    speed = statistics.median(known_speeds) if known_speeds else None
    written = directory.metrics.stat().st_mtime if directory.metrics.is_file() else None
    return RunStatus(
        name=path.resolve().name,
        path=str(path),
        state=state,
        step=last["step"],
        total_steps=total_steps,
        loss=last.get("loss"),
        validation_loss=evaluation.get("loss"),
        bits_per_byte=bits,
        on_track=on_track,
        likely_mistake=mistake,
        tokens=last["tokens"],
        tokens_per_second=speed,
        seconds_left=_seconds_left(settings, last["tokens"], speed) if state == "running" else None,
        last_written_at=None if written is None else datetime.fromtimestamp(written, tz=UTC),
        problem="; ".join(problems) or None,
        ended_by=ended_by,
        rollbacks=len(rollbacks.values),
    )


def flat_settings(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a recipe.toml by name, which is unique over all sections; spelled as today."""
    flat: dict[str, Any] = {}
    for name, value in recipe.items():
        flat |= flat_settings(value) if isinstance(value, Mapping) else Recipe.RENAMED.settings({name: value})
    return flat


def _run_folders(folder: Path) -> list[Path]:
    return sorted(filter(_may_be_run, folder.iterdir())) if folder.is_dir() else []


def _may_be_run(path: Path) -> bool:
    """True for a run, and for a folder that can't be looked into."""
    try:
        return RunDirectory(path).exists()
    except PermissionError:
        return True


def _read_settings(directory: RunDirectory, problems: list[str]) -> dict[str, Any]:
    try:
        return flat_settings(tomllib.loads(directory.read_recipe()))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        problems.append(f"recipe.toml cannot be read: {error}")
    except ValueError as error:
        problems.append(str(error).removeprefix(f"{directory.path}{os.sep}"))
    return {}


def _is_running(directory: RunDirectory) -> bool:
    # Testing the lock opens it for writing; nobody trains in a folder that is not writable.
    return os.access(directory.path / ".lock", os.W_OK) and directory.is_locked()


def _state(directory: RunDirectory, step: int, total_steps: int | None) -> State:
    if total_steps is not None and step >= total_steps and directory.is_finished(total_steps):
        return "finished"
    return "stopped" if step else "empty"


def _read_end_reason(directory: RunDirectory) -> str:
    try:
        return str(json.loads(directory.ended.read_text(encoding="utf-8"))["reason"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return "a kill or a power failure: no reason was recorded"


def _seconds_left(settings: Mapping[str, Any], tokens: int, speed: float | None) -> float | None:
    """The time for the remaining tokens (steps grow during a batch ramp); None if it cannot be known."""
    numbers = {name: value for name, value in settings.items() if isinstance(value, int)}
    if not speed or not {"total_steps", "context_length", "tokens_per_step"} <= numbers.keys():
        return None
    names = {field.name for field in dataclasses.fields(BatchConfig)}
    batch = BatchConfig(**{name: numbers[name] for name in names & numbers.keys()})
    try:
        plan = plan_batches(batch, numbers["context_length"], rows_that_fit=1)
    except ValueError:  # the recipe was edited since
        return None
    return max(0, plan.tokens_before(numbers["total_steps"]) - tokens) / speed
