"""Trials of a tiny run: the real command, each time in a process of its own, and what it has left behind.

The processes are forked from this one, which has imported torch and never trains, so that a trial takes a
fraction of a second. `before` is called in the new process before the command: it breaks something, or sets a
trap.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import importlib
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from overnight.run_directory import LINE_FILES, RunDirectory
from report import Report

RECIPE = """
[data]
data = "{shards}"

[model]
n_layer = 1
n_head = 2
n_embd = 16
context_length = 32
dropout = {dropout}

[optimizer]
peak_learning_rate = 1e-2

[schedule]
total_steps = {steps}
warmup_steps = 2

[batch]
tokens_per_step = {tokens_per_step}
micro_batch_size = {rows}

[compute]
device = "cpu"
precision = "fp32"
compile = false

[evaluation]
evaluate_every_steps = {evaluate}

[samples]
sample_every_steps = 4
sample_tokens = 2

[checkpoints]
checkpoint_every_steps = {save}
keep_checkpoints = {keep}
async_checkpoint = {background}
"""

SETTINGS: dict[str, object] = {
    "steps": 9,
    "dropout": 0.1,
    "tokens_per_step": 768,
    "rows": 12,
    "evaluate": 4,
    "save": 3,
    "keep": 2,
    "background": "true",
}
SLOW_IMPORTS = [
    *("overnight.cli", "overnight.run.command", "overnight.run.train", "overnight.runs.status"),
    *(
        "overnight.preparation.prepare",
        "overnight.model.kernels",
        "overnight.model.kernels",
        "filelock",
        "typeguard",
    ),
    *("torch._dynamo", "tyro", "rich.progress", "safetensors.torch"),
]
PROCESSES = multiprocessing.get_context("fork")
RUN = Path("runs/small")
CLOCK = {"milliseconds", "tokens_per_second", "mfu", "mfu_executed"}  # what a repetition may change
KILLED = -signal.SIGKILL
DONE, FAILED, WRONG_USE, INTERRUPTED = 0, 1, 2, 130
SECONDS_AT_MOST = 300.0

Before = Callable[[], object]
report = functools.partial(Report, headings=("what", "count"))


class Ended(NamedTuple):
    """What a command said, and with which status it ended; -9 if it was killed."""

    status: int
    said: str

    def is_a_sentence(self) -> bool:
        """True if it ended as a command should that cannot go on."""
        return "Traceback" not in self.said and "overnight: " in self.said


@dataclass
class Trial:
    """A command that runs."""

    process: BaseProcess
    said: Path

    def wait_until_begun(self) -> None:
        """Return when the process is the command's, or has ended."""
        while not _mark(self.said).exists() and not self.wait(0.001):
            pass

    def wait(self, seconds: float | None = None) -> bool:
        """True if it has ended within that time."""
        self.process.join(seconds)
        return self.process.exitcode is not None

    def send(self, number: int) -> None:
        """A signal; none if it has ended."""
        if self.process.is_alive():
            os.kill(self.process.pid or 0, number)

    def ended(self) -> Ended:
        """Wait for the end. Raises ValueError if there is none."""
        if not self.wait(SECONDS_AT_MOST):
            self.process.kill()
            raise ValueError(f"a command did not end in {SECONDS_AT_MOST:.0f} s: {self.said}")
        status = self.process.exitcode
        self.process.close()
        return Ended(status or 0, self.said.read_text() if self.said.is_file() else "")


@dataclass(frozen=True)
class Place:
    """Where trials are made: a folder of shards, and a folder for each trial."""

    folder: Path
    shards: Path

    def new(self, name: str, **settings: object) -> Path:
        """An empty folder with a recipe in it, where commands can be typed."""
        folder = self.folder / name
        folder.mkdir(parents=True)
        text = RECIPE.format(**SETTINGS | settings, shards=self.shards)
        (folder / "small.toml").write_text(text)
        return folder


def warm_up() -> None:
    """Once, what each command would do anew: import, and learn what options there are."""
    for name in SLOW_IMPORTS:
        importlib.import_module(name)
    from overnight.options import from_arguments
    from overnight.recipe import Recipe

    from_arguments(Recipe, ["--seed", "1"], prog="", about="", default=Recipe(run_name="small"))
    gc.freeze()


def prepare_place(folder: Path) -> Place:
    """40 small documents as shards of characters, which a run goes through several times."""
    warm_up()
    shards = folder / "shards"
    for number in range(40):
        text = folder / "text" / f"{number:02}.txt"
        text.parent.mkdir(parents=True, exist_ok=True)
        text.write_text(f"Line {number} tells of {number * 7 % 100}.\n" * 6)
    run(prepare_with, str(folder / "text"), str(shards), "characters")
    return Place(folder, shards)


def prepare_with(source: str, out: str, tokenizer: str) -> None:
    """Text to shards, in a process of its own: `run(prepare_with, ...)`."""
    from overnight.preparation.prepare import prepare_shards
    from overnight.preparation.prepare_config import PrepareConfig

    prepare_shards(
        PrepareConfig(source=source, out=out, tokenizer=tokenizer, validation_fraction=0.2, shard_tokens=1200)
    )


def run(work: Callable[..., object], *arguments: object) -> None:
    """Do something in a process of its own. Raises ValueError if it fails there."""
    process = _process(work, arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise ValueError(f"{work} failed with status {process.exitcode}")


def start(folder: Path, before: Before | None = None, words: Sequence[str] | None = None) -> Trial:
    """The command one would type: `train` what is not begun yet, `train --resume` what is."""
    if words is None:
        is_begun = RunDirectory(folder / RUN).exists()
        words = ["train", "--resume", str(RUN)] if is_begun else ["train", "small.toml"]
    said = folder / f"said-{time.monotonic_ns()}"
    process = _process(_command, (folder, said, list(words), before))
    process.start()
    return Trial(process, said)


def _process(work: Callable[..., object], arguments: Sequence[object]) -> BaseProcess:
    return PROCESSES.Process(target=work, args=tuple(arguments))


def _command(folder: Path, said: Path, words: list[str], before: Before | None) -> None:
    with said.open("wb") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    os.chdir(folder)
    if before is not None:
        before()
    from overnight.cli import main

    _mark(said).touch()
    sys.exit(main(words))


def _mark(said: Path) -> Path:
    """There once the command has begun."""
    return said.with_name(f"{said.name}-begun")


def train(folder: Path, before: Before | None = None) -> Ended:
    """Train, or go on, to the end of the command."""
    return start(folder, before).ended()


def finish(folder: Path, before: Before | None = None) -> Ended:
    """The same. Raises ValueError if the run does not come to its end."""
    ended = train(folder, before)
    if ended.status != DONE:
        raise ValueError(f"the run in {folder} did not come to its end: {ended.said[-2000:]}")
    return ended


def record(folder: Path) -> dict[str, Any]:
    """Everything the run wrote, but for the clock; of checkpoints the sha256 of each file.

    Raises ValueError if a step has no line, or two.
    """
    directory = RunDirectory(folder / RUN)
    lines = check_lines(folder)
    return {
        "metrics": [{key: line[key] for key in line if key not in CLOCK} for line in lines],
        "events": [directory.read_events(kind) for kind in ("evaluations", "samples")],
        "checkpoints": {
            str(path.relative_to(directory.checkpoints)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in directory.checkpoints.rglob("*")
            if path.is_file()
        },
    }


def check_lines(folder: Path) -> list[dict[str, Any]]:
    """The metrics lines. Raises ValueError unless they are those of steps 1, 2, 3, ... and each is whole.

    The last one may be torn, as a kill or a full disk leaves it. Events are JSON lines in the steps' order.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for name in LINE_FILES:
        path = folder / RUN / name
        whole = path.read_text().rpartition("\n")[0].splitlines() if path.is_file() else []
        found[name] = [json.loads(line) for line in whole]
        steps = [line["step"] for line in found[name]]
        wanted = list(range(1, len(steps) + 1)) if name == "metrics.jsonl" else sorted(steps)
        if steps != wanted:
            raise ValueError(f"{path} has the lines of steps {steps}")
    return found["metrics.jsonl"]


def find_difference(folder: Path, expected: dict[str, Any]) -> str | None:
    """How the run differs from that record; None if it does not."""
    try:
        found = record(folder)
    except (ValueError, OSError) as error:
        return str(error)
    return next((f"{part} differ" for part in expected if found[part] != expected[part]), None)
