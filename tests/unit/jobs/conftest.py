"""Machines that are not there: programs that stand for a cluster's, and for `overnight` itself."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from overnight.jobs.request import JobRequest
from overnight.preparation.prepare_commands import JobText

# Stands for `overnight`: writes down what it was told and where it stands. `train long` begins a run and
# waits to be told to save; `train short` and a resumed run do all steps at once.
OVERNIGHT = """\
import json, os, signal, sys, time
from pathlib import Path

words, notes, run = sys.argv[1:], Path(os.environ["STAND_INS"]), Path("runs/mine")
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")

def note(kind, value):
    with (notes / kind).open("a") as file:
        file.write(json.dumps(value) + "\\n")

def save(number, frame):
    (run / "recipe.toml").touch()  # no earlier, since nodes wait for each other only with the real torchrun
    note("saved", int(os.environ["RANK"]))
    os._exit(0)

if words[0] == "runs":
    print(json.dumps([{"state": "finished" if (run / "finished").exists() else "stopped"}], indent=2))
    sys.exit()
told = {"words": words, **{name: os.environ.get(name) for name in names}}
if "TOGETHER" in os.environ:
    import torch, torch.distributed as dist

    dist.init_process_group("gloo")
    ranks = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(ranks)
    told["sum_of_ranks"] = ranks.item()
    dist.destroy_process_group()
signal.signal(signal.SIGTERM, save)
if words[0] == "train":
    run.mkdir(parents=True, exist_ok=True)
    if words[1] != "long":
        (run / "finished").touch()
if words[0] == "prepare":
    time.sleep(0.3)
    folder = Path("data/notes")
    folder.mkdir(parents=True)
    (folder / "manifest.json").touch()
note("told", told)
if words[:2] == ["train", "long"]:
    time.sleep(60)
if words[:2] == ["train", "wrong"]:
    sys.exit(2)
"""

# Stands for `torchrun`, where it is not the rendezvous that is tested: says what it was told, and obeys.
TORCHRUN = """\
import json, os, subprocess, sys
from pathlib import Path

with (Path(os.environ["STAND_INS"]) / "torchrun").open("a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
command = sys.argv[sys.argv.index("--no-python") + 1 :]
os.environ.update(RANK="0", WORLD_SIZE="1")
os.execvp(command[0], command)
"""


@dataclass
class Machines:
    """A folder of programs that come before the real ones, and the folder that all nodes see."""

    programs: Path
    work: Path
    notes: Path
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def add(self, name: str, script: str) -> None:
        """A program; Python unless its first line says otherwise."""
        first = "" if script.startswith("#!") else f"#!{sys.executable} -S\n"
        if "import torch" in script:
            first = f"#!{sys.executable}\n"
        path = self.programs / name
        path.write_text(first + script)
        path.chmod(0o755)

    def use_real_torchrun(self) -> None:
        (self.programs / "torchrun").unlink()
        (self.programs / "torchrun").symlink_to(Path(sysconfig.get_path("scripts"), "torchrun"))

    def environment(self, **more: str) -> dict[str, str]:
        paths = f"{self.programs}:{os.environ['PATH']}"
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SM_", "PET_"))}
        return kept | {"PATH": paths, "STAND_INS": str(self.notes)} | more

    def start(self, *words: str, **more: str) -> subprocess.Popen[str]:
        """A process in the folder that all nodes see, at the head of a group of its own."""
        process = subprocess.Popen(
            words,
            cwd=self.work,
            env=self.environment(**more),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def stop_all(self) -> None:
        """Leave no process behind, nor any that these have started."""
        for process in self.started:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()

    def noted(self, kind: str) -> list[Any]:
        path = self.notes / kind
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def wait_for(self, kind: str, count: int, process: subprocess.Popen[str]) -> None:
        for _ in range(600):
            if len(self.noted(kind)) >= count:
                return
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.05)
        pytest.fail(f"{kind} came {len(self.noted(kind))} times, not {count}: {self.noted(kind)}")


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    found = Machines(tmp_path / "programs", tmp_path / "work", tmp_path / "notes")
    for folder in (found.programs, found.work, found.notes):
        folder.mkdir()
    found.add("overnight", OVERNIGHT)
    found.add("torchrun", TORCHRUN)
    found.add("sleep", "import time; time.sleep(0.05)")
    yield found
    found.stop_all()


@pytest.fixture
def ended() -> Callable[..., tuple[int, str]]:
    """Waits for a process; returns (its exit status, what it said)."""

    def end(process: subprocess.Popen[str]) -> tuple[int, str]:
        said, _ = process.communicate(timeout=60)
        return process.returncode, said

    return end


@pytest.fixture
def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@pytest.fixture
def request_job() -> Callable[..., JobRequest]:
    """A job of the run `mine`, with what is told otherwise."""

    def build(**settings: Any) -> JobRequest:
        default = {
            "path": "mine.job",
            "made_by": "overnight launch long --slurm",
            "run_name": "mine",
            "words": ("long",),
            "texts": (JobText("data/notes", ("overnight", "prepare", "notes")),),
        }
        return JobRequest(**default | settings)

    return build


@pytest.fixture
def text_is_there(machines: Machines) -> None:
    (machines.work / "data/notes").mkdir(parents=True)
    (machines.work / "data/notes/manifest.json").touch()


@pytest.fixture
def parse_torchrun() -> Callable[[list[str]], Any]:
    """Torchrun's own reading of its options, with those of its environment."""
    from torch.distributed.run import get_args_parser

    return lambda words: get_args_parser().parse_args(words)
