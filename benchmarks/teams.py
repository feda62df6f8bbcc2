"""`overnight train` in several processes, seen from outside: begun, waited for, signalled, read."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

CLOCK = {"milliseconds", "tokens_per_second", "mfu"}  # the only values that a repetition may change
SECONDS_AT_MOST = 600  # of a command

RECIPE = """
[data]
data = "{shards}"
tokenizer = "characters"

[model]
n_layer = 2
n_head = 2
n_embd = 32
context_length = 64
dropout = 0.1

[optimizer]
peak_learning_rate = 1e-3

[schedule]
total_steps = {steps}
warmup_steps = 10

[batch]
tokens_per_step = 1024
micro_batch_size = 2

[compute]
device = "cpu"
precision = "fp32"
compile = false

[evaluation]
evaluate_every_steps = 50
evaluation_tokens = 20000

[samples]
sample_every_steps = 50
sample_tokens = 16

[checkpoints]
checkpoint_every_steps = 20
"""

FREEZE = """
import os, signal, time

def freeze(number, frame):
    while True:
        time.sleep(1)

if "RANK" in os.environ:  # SIGUSR1 would save the run
    signal.signal(signal.SIGUSR2, freeze)
"""


class Ended(NamedTuple):
    """A command that has ended."""

    status: int
    said: str
    seconds: float


def prepare(folder: Path, steps: int) -> None:
    """Shards of Python's documentation, by characters, and recipe.toml: `steps` steps on them."""
    shards = folder / "shards"
    words = f"prepare python-docs --tokenizer characters --tokens 500000 --out {shards}".split()
    subprocess.run([*overnight(), *words], check=True, capture_output=True)
    (folder / "recipe.toml").write_text(RECIPE.format(shards=shards, steps=steps))
    (folder / "site").mkdir()
    (folder / "site/sitecustomize.py").write_text(FREEZE)


def overnight() -> list[str]:
    """The command."""
    return [sys.executable, "-P", "-m", "overnight"]


@contextlib.contextmanager
def started(folder: Path, command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """A command in that folder, one thread to a process; whatever is left of it in the end is killed."""
    paths = [str(folder / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=said, stderr=said, start_new_session=True
        )
        process.said = said  # type: ignore[attr-defined]
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for(process: subprocess.Popen[str], since: float | None = None) -> Ended:
    """The command's end, and how long it took since then. Raises ValueError if it does not end."""
    since = time.monotonic() if since is None else since
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(SECONDS_AT_MOST)
    status, seconds = process.poll(), time.monotonic() - since
    process.said.seek(0)  # type: ignore[attr-defined]
    said = process.said.read()  # type: ignore[attr-defined]
    if status is None:
        raise ValueError(f"a command does not end: {shlex.join(map(str, process.args))}: {said}")  # type: ignore[arg-type]
    return Ended(status, said, seconds)


def train(folder: Path, name: str, *words: str) -> Path:
    """A run from its beginning to its end, undisturbed. Raises ValueError if it fails."""
    with started(folder, [*overnight(), "train", "recipe.toml", "--run-name", name, *words]) as process:
        ended = wait_for(process)
    if ended.status != 0:
        raise ValueError(f"{name} ended with status {ended.status}: {ended.said}")
    return folder / "runs" / name


def newest(run: Path) -> Path:
    """Its last checkpoint."""
    return max((run / "checkpoints").glob("step-*"))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Every line of a file of JSON, without the clock's values; [] if there is none."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return [{name: value for name, value in json.loads(line).items() if name not in CLOCK} for line in lines]


def digest(run: Path) -> str:
    """Of everything that a run has written but for the clock: weights, moments, metrics and events."""
    total = hashlib.sha256()
    for path in sorted(newest(run).iterdir()):
        total.update(path.name.encode() + path.read_bytes())
    for name in ("metrics.jsonl", "events/evaluations.jsonl", "events/samples.jsonl"):
        total.update(json.dumps(read_lines(run / name)).encode())
    return total.hexdigest()


class Team(NamedTuple):
    """So many processes and what they divide."""

    processes: int
    sharding: str
    machines: int = 1

    def name(self) -> str:
        """In words."""
        machines = f", {self.machines} machines" if self.machines > 1 else ""
        return f"{self.processes} x {self.sharding}{machines}"


TEAMS = [
    *(Team(size, sharding) for size in (1, 2, 4) for sharding in ("none", "zero1", "fsdp")),
    Team(4, "hsdp", 2),
]


def train_in_team(folder: Path, team: Team, *words: str) -> Path:
    """By the command itself; several machines are as many torchruns that meet on this one."""
    name = "-".join([*map(str, team), *(word.strip("-") for word in words)])
    options = ("--sharding", team.sharding, *words)
    if team.machines == 1:
        return train(folder, name, "--processes", str(team.processes), *options)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(team.machines)]
    torchrun += ["--nproc-per-node", str(team.processes // team.machines), "--rdzv-backend", "c10d"]
    torchrun += ["--rdzv-endpoint", f"localhost:{random.randrange(20_000, 30_000)}", "-m", "overnight"]
    command = [*torchrun, "train", "recipe.toml", "--run-name", name, *options]
    with contextlib.ExitStack() as agents:
        processes = [agents.enter_context(started(folder, command)) for _ in range(team.machines)]
        for ended in map(wait_for, processes):
            if ended.status != 0:
                raise ValueError(f"{name} ended with status {ended.status}: {ended.said}")
    return folder / "runs" / name


def ranks_of(parent: int) -> dict[int, int]:
    """The processes that an agent has started: their ids, by rank. Empty until they run."""
    found = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if status.read_text().rpartition(")")[2].split()[1] == str(parent):
                environment = (status.parent / "environ").read_bytes()
                for rank in re.findall(rb"(?:^|\0)RANK=([0-9]+)", environment):
                    found[int(rank)] = int(status.parent.name)
    return found


def wait_until(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    """Raises ValueError if the command ends before."""
    while not condition():
        if process.poll() is not None:
            raise ValueError(f"the run ended too early: {wait_for(process).said}")
        time.sleep(0.002)


def count_lines(run: Path) -> int:
    """Steps that have been done."""
    metrics = run / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.is_file() else 0


def send(process: subprocess.Popen[str], rank: int, number: int) -> float:
    """A signal to one process of the run, once all of them are there; when that was."""
    wait_until(process, lambda: len(ranks_of(process.pid)) == 2)
    with contextlib.suppress(ProcessLookupError):
        os.kill(ranks_of(process.pid)[rank], number)
    return time.monotonic()
