"""The runs of an ablation: ordinary runs, begun or resumed one after another, in processes of their own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from overnight.ablation.arms import Arm
from overnight.ablation.record import RunResult
from overnight.config import raise_problems, to_toml
from overnight.data.dataset import Dataset, MixtureDataset, is_same_data
from overnight.distributed.launcher import environment_of_process
from overnight.distributed.world import World
from overnight.files import write_atomically
from overnight.recipe import (
    Recipe,
    Resolved,
    frozen_settings,
    incompatible_settings,
    read_recipe_of,
    with_settings,
)
from overnight.report.run_data import is_finite
from overnight.run.setup import initial_weights, resolve_on
from overnight.run.train import STOP_SIGNALS, open_initial_model
from overnight.run_directory import RunDirectory
from overnight.runs.status import describe_run
from overnight.terminal import byte_size, echo, shell_command
from overnight.training.moments import saved_bytes

# -P: no module of the current folder is imported. The run is saved if this process is killed.
PROGRAM = (
    "import sys; from overnight.distributed.launcher import end_with_parent; from overnight.cli import "
    "run_command; end_with_parent(int(sys.argv.pop(1)), save=True); run_command()"
)
START_AGAIN = "remove the run, and it is trained again; or give another --run-name"


@dataclass(frozen=True, kw_only=True)
class ArmRun:
    """One run of a campaign."""

    arm: str
    seed: int
    settings: Mapping[str, Any]
    """The tuned settings, by name; {} if the arm is not tuned."""
    recipe: Recipe
    """Complete except for what a run decides for its machine."""
    resolved: Resolved
    """The same as it is decided here."""

    @property
    def directory(self) -> RunDirectory:
        """The run's directory."""
        return RunDirectory(Path("runs") / self.recipe.run_name)

    @property
    def recipe_file(self) -> Path:
        """The recipe that the run is begun with."""
        path = self.directory.path
        return path.parent / "recipes" / f"{path.name}.toml"


class Campaign:
    """The folder of a campaign, and what all its runs share: the data, and how recipes are decided."""

    def __init__(self, name: str, dataset: Dataset | MixtureDataset, world: World) -> None:
        self.name, self.dataset, self.world = name, dataset, world
        self.folder = Path("runs") / name

    def plan_run(self, arm: Arm, seed: int, settings: Mapping[str, Any], label: str = "") -> ArmRun:
        """The run of an arm with a seed. Raises ValueError if it can't be trained here."""
        run_name = f"{self.name}/{arm.name}{label}-{seed}"
        recipe = with_settings(arm.recipe, **settings, seed=seed, run_name=run_name)
        source = open_initial_model(recipe, self.dataset)
        model, _ = initial_weights(recipe, self.dataset, source)
        resolved = resolve_on(recipe, model, self.dataset, self.world)
        return ArmRun(arm=arm.name, seed=seed, settings=dict(settings), recipe=recipe, resolved=resolved)

    def check(self, runs: Sequence[ArmRun]) -> None:
        """Raise ValueError, with all problems, for runs on the disk that are others, damaged or in use."""
        by_reason: dict[str, list[str]] = {}
        for run in runs:
            if problem := self.problem_of(run):
                by_reason.setdefault(problem, []).append(run.directory.path.name)
        problems = [f"{_list_briefly(names)}: {reason}" for reason, names in by_reason.items()]
        raise_problems(problems, str(self.folder))
        missing = [run for run in runs if not is_trained(run)]
        needed = sum(
            saved_bytes(run.resolved.model, run.resolved.recipe.optimizer)
            for run in [*missing, *missing[-1:]]
        )
        existing = next(path for path in (self.folder, *self.folder.absolute().parents) if path.is_dir())
        if needed > (free := shutil.disk_usage(existing).free):
            raise ValueError(
                f"the disk of {self.folder} has {byte_size(free)} free, and the last checkpoints of "
                f"{len(missing)} runs need {byte_size(needed)}: free some, or give fewer --seeds"
            )

    def problem_of(self, run: ArmRun) -> str | None:
        """Why the run on the disk can't be used as it is; None if it can, or if there is none."""
        directory = run.directory
        if not directory.exists():
            return None
        status = describe_run(directory.path)
        if status.state == "damaged":
            return f"damaged, {status.problem}: {START_AGAIN}"
        if status.state == "running":
            return "being trained by another process: wait for it"
        changed = self._changes(run)
        return f"trained with other settings, {', '.join(changed)}: {START_AGAIN}" if changed else None

    def _changes(self, run: ArmRun) -> list[str]:
        """What differs between a run on the disk and the wanted one."""
        before, wanted = read_recipe_of(run.directory.path), run.resolved.recipe
        changed = incompatible_settings(frozen_settings(wanted), frozen_settings(before))
        pairs = {
            "total_steps": (wanted.schedule.total_steps, before.schedule.total_steps),
            "evaluation_tokens": (
                wanted.evaluation.evaluation_tokens,
                before.evaluation.evaluation_tokens,
            ),
        }
        changed += [f"{name}={now} (was {then})" for name, (now, then) in pairs.items() if now != then]
        text = json.loads(json.dumps(self.dataset.record()))
        return changed if is_same_data(read_data(run), text) else [*changed, "another text"]

    def train(self, run: ArmRun) -> str | None:
        """Begin or resume a run in a process of its own; returns why it failed, or None.

        A run that has diverged is not resumed: it would diverge again. Raises KeyboardInterrupt if it was
        stopped.
        """
        directory = run.directory
        if is_trained(run):
            return None
        if directory.exists():
            if reason := why_diverged(directory):
                return reason
            words = ["train", "--resume", str(directory.path)]
        else:
            write_atomically(run.recipe_file, to_toml(run.recipe))
            words = ["train", str(run.recipe_file)]
        status_code = run_overnight(words)
        if status_code == -signal.SIGKILL:
            return "its process was killed, most likely out of memory"
        if status_code == 0 and is_trained(run):
            return None
        return why_diverged(directory) or f"`{shell_command(*words)}` ended with status {status_code}"


def _list_briefly(names: Sequence[str]) -> str:
    """The first three names, and the number of others."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"


def is_trained(run: ArmRun) -> bool:
    """True if all steps of the run are done."""
    return run.directory.exists() and run.directory.is_finished(run.resolved.total_steps)


def why_diverged(directory: RunDirectory) -> str | None:
    """Why a run ended, if its losses are the reason."""
    status = describe_run(directory.path) if directory.exists() else None
    return f"it has diverged: {status.ended_by}" if status and status.state == "diverged" else None


def read_data(run: ArmRun) -> dict[str, Any]:
    """The facts of the data that a run on the disk was trained on; {} if they are damaged."""
    try:
        found = json.loads(run.directory.data.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def read_result(run: ArmRun, failure: str | None = None) -> RunResult:
    """The last evaluation of a run, unless it failed."""
    facts: dict[str, Any] = {
        "arm": run.arm,
        "seed": run.seed,
        "settings": run.settings,
        "path": str(run.directory.path),
    }
    lines = [] if failure else run.directory.read_events("evaluations")
    last = lines[-1] if lines else {}
    if failure is None and last.get("step") != run.resolved.total_steps:
        failure = "it was not evaluated after its last step"
    elif failure is None and not is_finite(last.get("loss")):
        failure = "its last loss is not finite"
    if failure is None:
        facts |= {name: last[name] for name in ("loss", "bits_per_byte", "evaluated_tokens")}
    return RunResult(**facts, failure=failure)


def run_overnight(words: Sequence[str]) -> int:
    """Run `overnight` with these words in a process of its own; returns its exit status.

    The process is in a session of its own: a signal reaches only this process, which passes it on, so that
    the run is saved. Raises KeyboardInterrupt afterwards.
    """
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", PROGRAM, str(os.getpid()), *words],
        stdin=subprocess.DEVNULL,
        env=environment_of_process(large_pages=True),
        start_new_session=True,
    )
    with passing_signals_on(process) as received:
        status = process.wait()
    if received or status == 130:  # it was stopped by a signal of its own
        raise KeyboardInterrupt
    return status


@contextmanager
def passing_signals_on(process: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """Context manager: signals that stop a run go to `process`; yields the list of those received."""
    received: list[int] = []

    def receive(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        process.send_signal(number)

    is_main = threading.current_thread() is threading.main_thread()
    is_detached = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # by nohup
    numbers = [each for each in STOP_SIGNALS if not (each == signal.SIGHUP and is_detached)]
    before = {number: signal.signal(number, receive) for number in numbers} if is_main else {}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def announce_run(runs: Sequence[ArmRun], number: int) -> None:
    """Print which run is next."""
    run = runs[number]
    tuned = "".join(f", {name} {value}" for name, value in run.settings.items())
    done = "finished already" if is_trained(run) else str(run.directory.path)
    echo(f"run {number + 1} of {len(runs)}: {run.arm}, seed {run.seed}{tuned}: {done}")
