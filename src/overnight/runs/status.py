"""How each run is doing, told from the ends of its files: fast enough for fifty long runs at once.

No numpy, no torch, no matplotlib: `overnight runs` must answer at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import statistics
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from overnight.run_directory import RunDirectory
from overnight.training.batch import BatchConfig, plan_batches

State = Literal["running", "finished", "stopped", "diverged", "empty", "damaged"]
KILLED = "a kill, or a loss of power: nothing was noted"


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """One run in one line. `None` where the run has not come so far, or its files do not say."""

    name: str

    path: str

    state: State
    """running: its lock is held; finished: every step is done and the last checkpoint there; stopped: some
    steps are done; diverged: it gave up, since its numbers went wrong; empty: no step is done; damaged: its
    files cannot all be read, and `problem` says which."""

    step: int
    """Finished steps."""

    total_steps: int | None

    loss: float | None
    """The last step's training loss, in nats per token."""

    validation_loss: float | None
    """The last evaluation's, in nats per token."""

    bits_per_byte: float | None
    """The last evaluation's."""

    on_track: str | None
    """Beside the recipe's reference, at the last evaluation: within, below, above; or suspect, which is
    within, with a sign of a mistake. None where there is no reference."""

    likely_mistake: str | None
    """The known mistake that fits best, if the run is off."""

    tokens: int
    """Tokens trained on."""

    tokens_per_second: float | None
    """The median over the last 200 steps."""

    seconds_left: float | None
    """Estimated from the tokens left and the median speed; only while it runs."""

    last_written_at: datetime | None
    """When the metrics file last grew, UTC."""

    problem: str | None
    """What is damaged, and where."""

    ended_by: str | None = None
    """What stopped it, in words; None while it runs, and of one that is finished or empty."""

    rollbacks: int = 0
    """How often it went back to a checkpoint, and left rows out."""


def is_run(path: Path) -> bool:
    """True if a run was ever begun in this folder."""
    return RunDirectory(path).exists()


def find_run(name: str, folder: Path = Path("runs")) -> Path:
    """The run called `name`: a path, or a folder's name under runs/.

    Raises ValueError with the nearest name if there is none.
    """
    for path in (Path(name), folder / name):
        if is_run(path):
            return path
    if Path(name).is_dir():
        raise ValueError(
            f"{name} is a folder but not a run: it holds no recipe.toml; `overnight runs` lists the runs"
        )
    known = {path.name: path for place in (folder, Path(name).parent) for path in _run_folders(place)}
    near = difflib.get_close_matches(Path(name).name, known, n=1, cutoff=0.5)
    remedy = f"did you mean {known[near[0]]}?" if near else "`overnight runs` lists what there is"
    raise ValueError(f"there is no run {name}; {remedy}")


def list_runs(folder: Path) -> list[RunStatus]:
    """Every run directly under `folder`, the one written to most recently last; [] if there is none."""
    runs = [describe_run(path) for path in _run_folders(folder)]
    never = datetime.min.replace(tzinfo=UTC)
    return sorted(runs, key=lambda run: (run.last_written_at or never, run.name))


def describe_run(path: Path) -> RunStatus:
    """How the run in `path` is doing, from its recipe and the ends of its metrics and evaluations."""
    directory = RunDirectory(path)
    metrics = read_ends(directory.metrics, METRICS_KEYS)
    evaluations = read_ends(path / "events" / "evaluations.jsonl", EVALUATION_KEYS)
    recipe, recipe_problem = _read_recipe(directory)
    total_steps = _whole_number(recipe, "total_steps")
    problems = [*metrics.problems, *evaluations.problems, *recipe_problem]

    last = metrics.values[-1] if metrics.values else {}
    evaluation = evaluations.values[-1] if evaluations.values else {}
    step, tokens = int(last.get("step", 0)), int(last.get("tokens", 0))
    state = _state(directory, step, total_steps, bool(problems))
    ended_by = _read_end(directory.ended)
    if state == "stopped" and ended_by.startswith("FloatingPointError: "):
        state, ended_by = "diverged", ended_by.removeprefix("FloatingPointError: ")
    speed = _recent_median(metrics, "tokens_per_second")
    return RunStatus(
        name=path.resolve().name,
        path=str(path),
        state=state,
        step=step,
        total_steps=total_steps,
        loss=last.get("loss"),
        validation_loss=evaluation.get("loss"),
        bits_per_byte=evaluation.get("bits_per_byte"),
        on_track=evaluation.get("on_track"),
        likely_mistake=evaluation.get("likely_mistake"),
        tokens=tokens,
        tokens_per_second=speed,
        seconds_left=_seconds_left(recipe, tokens, speed) if state == "running" else None,
        last_written_at=_written_at(directory.metrics),
        problem="; ".join(problems) or None,
        ended_by=ended_by if state in {"stopped", "diverged"} else None,
        rollbacks=len(read_ends(path / "events" / "rollbacks.jsonl", ("step",)).values),
    )


def find_setting(recipe: Mapping[str, Any], name: str) -> Any:
    """The value of `name` in whichever section of a recipe holds it; None if none does."""
    for key, value in recipe.items():
        if key == name and not isinstance(value, Mapping):
            return value
        if isinstance(value, Mapping) and (found := find_setting(value, name)) is not None:
            return found
    return None


def _run_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if is_run(path)) if folder.is_dir() else []


def _read_recipe(directory: RunDirectory) -> tuple[dict[str, Any], Sequence[str]]:
    """The recipe's table, and what is wrong with the recipe (nothing, or one sentence)."""
    try:
        return tomllib.loads(directory.read_recipe()), []
    except tomllib.TOMLDecodeError as error:
        return {}, [f"recipe.toml cannot be read: {error}"]
    except ValueError as error:
        return {}, [str(error).removeprefix(f"{directory.path}{os.sep}")]


def _whole_number(recipe: Mapping[str, Any], name: str) -> int | None:
    value = find_setting(recipe, name)
    return value if isinstance(value, int) else None


def _state(directory: RunDirectory, step: int, total_steps: int | None, is_damaged: bool) -> State:
    # Asking for the lock opens it for writing; in a folder that cannot be written nobody trains.
    can_ask = os.access(directory.path / ".lock", os.W_OK)
    if is_damaged:
        return "damaged"
    if can_ask and directory.is_locked():
        return "running"
    if total_steps is not None and step >= total_steps and directory.is_finished(total_steps):
        return "finished"
    return "stopped" if step else "empty"


def _read_end(ended: Path) -> str:
    """What was noted when the run ended."""
    try:
        return str(json.loads(ended.read_text(encoding="utf-8"))["reason"])
    except (OSError, ValueError, LookupError, TypeError):
        return KILLED


def _recent_median(metrics: Lines, key: str) -> float | None:
    """The median of `key` over the last 200 steps read, so that a slow start is long forgotten."""
    numbers = [line[key] for line in metrics.values[-200:] if isinstance(line.get(key), int | float)]
    return statistics.median(numbers) if numbers else None


def _seconds_left(recipe: Mapping[str, Any], tokens: int, speed: float | None) -> float | None:
    """What the tokens after these take at so many a second; None if the recipe does not tell how many.

    Of a ramp the steps grow, and with them their time: only the tokens are a measure of what is left.
    """
    steps, context_length = (_whole_number(recipe, name) for name in ("total_steps", "context_length"))
    names = (field.name for field in dataclasses.fields(BatchConfig))
    batch = {name: number for name in names if (number := _whole_number(recipe, name)) is not None}
    if not speed or steps is None or context_length is None or "tokens_per_step" not in batch:
        return None
    try:
        plan = plan_batches(BatchConfig(**batch), context_length, rows_that_fit=1)
    except ValueError:  # the recipe was edited since
        return None
    return max(0, plan.tokens_before(steps) - tokens) / speed


def _written_at(path: Path) -> datetime | None:
    return datetime.fromtimestamp(path.stat().st_mtime, tz=UTC) if path.is_file() else None


# ---------------------------------------------------------------- json-lines files read tolerantly


METRICS_KEYS = ("step", "tokens", "loss")
EVALUATION_KEYS = ("step", "tokens", "loss")
SAMPLE_KEYS = ("step",)

TAIL_BYTES = 65_536


@dataclass(frozen=True, kw_only=True)
class Lines:
    """The readable lines of one file, in order, and what was wrong with the others."""

    values: tuple[dict[str, Any], ...] = ()

    problems: tuple[str, ...] = ()
    """One sentence for each damaged line: which, and how it begins."""

    is_torn: bool = False
    """True if the last line was cut short, and left out."""


def read_lines(path: Path, numeric_keys: Sequence[str]) -> Lines:
    """Every readable line of `path`; nothing at all if there is no such file.

    A line counts as damaged if it is no JSON object, or one of `numeric_keys` is not a number in it, or
    its `step` or `tokens` no whole one. A loss of null, which was not finite, is read as NaN.
    """
    return _parse(path.name, path.read_bytes(), numeric_keys) if path.is_file() else Lines()


def read_ends(path: Path, numeric_keys: Sequence[str]) -> Lines:
    """The readable lines among the first and the last 64 KiB, however long the file is.

    What lies between is not looked at. Line numbers in the sentences count from the file's first line.
    """
    if not path.is_file():
        return Lines()
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        if size <= 2 * TAIL_BYTES:
            return _parse(path.name, file.read(), numeric_keys)
        head = file.read(TAIL_BYTES)
        file.seek(size - TAIL_BYTES)
        tail = file.read()
    head = head[: head.rfind(b"\n") + 1]
    tail = tail[tail.find(b"\n") + 1 :]
    first = _parse(path.name, head, numeric_keys)
    last = _parse(path.name, tail, numeric_keys)
    if last.problems or not last.values:
        number = _count_newlines(path, size - len(tail))
        last = _parse(path.name, tail, numeric_keys, first_number=number + 1)
    nothing = (
        () if last.values else (f"the last {TAIL_BYTES // 1024} KiB of {path.name} hold no readable line",)
    )
    return Lines(
        values=first.values + last.values,
        problems=first.problems + last.problems + nothing,
        is_torn=last.is_torn,
    )


def _parse(name: str, content: bytes, numeric_keys: Sequence[str], first_number: int = 1) -> Lines:
    lines = content.removesuffix(b"\n").split(b"\n") if content else []
    values, problems, is_torn = [], [], False
    for number, line in enumerate(lines, start=first_number):
        value = _value(line, numeric_keys)
        if value is not None:
            values.append(value)
        elif number == first_number + len(lines) - 1:
            is_torn = True
        else:
            start = line[:40].decode(errors="replace")
            problems.append(f"{name} line {number:,} is damaged and left out; it begins {start!r}")
    return Lines(values=tuple(values), problems=tuple(problems), is_torn=is_torn)


def _value(line: bytes, numeric_keys: Sequence[str]) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):  # not JSON, not even UTF-8, or brackets without end
        return None
    if not isinstance(value, dict):
        return None
    value |= {key: math.nan for key in numeric_keys if value.get(key, 0) is None}
    return value if all(_is_number(key, value.get(key)) for key in numeric_keys) else None


def _is_number(key: str, value: object) -> bool:
    """True if `value` can stand under `key`; a loss may be NaN or infinite, which is news, not damage."""
    if key in {"step", "tokens"}:
        return isinstance(value, int) and 0 <= value < 2**63
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)


def _count_newlines(path: Path, until: int) -> int:
    with path.open("rb") as file:
        return file.read(until).count(b"\n")
