"""Machines that are not there: programs that stand for a cluster's, and for `overnight` itself."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from overnight.jobs import LaunchConfig
from overnight.jobs.targets import JobRequest
from overnight.preparation.prepare_commands import JobText
from overnight.training import ComputeConfig

# Stands for `overnight`: notes its arguments and its rank. `train long` starts a run and waits for the signal
# to save; `train short` and a resumed run do all steps at once.
OVERNIGHT = """\
import json, os, signal, sys, time
from pathlib import Path

words, notes, run = sys.argv[1:], Path(os.environ["STAND_INS"]), Path("runs/mine")

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
call = {"words": words, **{name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}}
if "TOGETHER" in os.environ:
    import torch, torch.distributed as dist

    dist.init_process_group("gloo")
    ranks = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(ranks)
    call["sum_of_ranks"] = ranks.item()
    dist.destroy_process_group()
signal.signal(signal.SIGTERM, save)
if words[0] == "train":
    run.mkdir(parents=True, exist_ok=True)
    if words[1] != "long":
        (run / "finished").touch()
if words[0] == "prepare":
    time.sleep(0.3)
    Path("data/notes").mkdir(parents=True)
    Path("data/notes/manifest.json").touch()
note("calls", call)
if words[:2] == ["train", "long"]:
    time.sleep(60)
if words[:2] == ["train", "wrong"]:
    sys.exit(2)
"""

# Stands for `torchrun` where the rendezvous is not tested: notes its arguments and starts one process.
TORCHRUN = """\
import json, os, sys
from pathlib import Path

with (Path(os.environ["STAND_INS"]) / "torchrun").open("a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
command = sys.argv[sys.argv.index("--no-python") + 1 :]
os.environ.update(RANK="0", WORLD_SIZE="1")
os.execvp(command[0], command)
"""


class Machines:
    """A folder of programs that come before the real ones, and the folder that all nodes see."""

    def __init__(self, root: Path) -> None:
        self.programs, self.work, self.notes = root / "programs", root / "work", root / "notes"
        for folder in (self.programs, self.work, self.notes):
            folder.mkdir()
        self.started: list[subprocess.Popen[str]] = []
        self.add("overnight", OVERNIGHT)
        self.add("torchrun", TORCHRUN)
        self.add("sleep", "import time; time.sleep(0.05)")

    def add(self, name: str, script: str) -> None:
        """A program; Python unless its first line says otherwise."""
        python = f"#!{sys.executable}\n" if "import torch" in script else f"#!{sys.executable} -S\n"
        path = self.programs / name
        path.write_text(script if script.startswith("#!") else python + script)
        path.chmod(0o755)

    def use_real_torchrun(self) -> None:
        (self.programs / "torchrun").unlink()
        (self.programs / "torchrun").symlink_to(Path(sysconfig.get_path("scripts"), "torchrun"))

    def prepare_text(self) -> None:
        (self.work / "data/notes").mkdir(parents=True)
        (self.work / "data/notes/manifest.json").touch()

    def start(self, *words: str, **more: str) -> subprocess.Popen[str]:
        """A process in the folder that all nodes see, in a process group of its own."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SM_", "PET_"))}
        paths = {"PATH": f"{self.programs}:{os.environ['PATH']}", "STAND_INS": str(self.notes)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process = subprocess.Popen(
            words, cwd=self.work, env=kept | paths | more, start_new_session=True, **pipes
        )
        self.started.append(process)
        return process

    def wait(self, *processes: subprocess.Popen[str]) -> list[int]:
        """The exit statuses; `output` is then what all have printed."""
        self.output = "".join(process.communicate(timeout=120)[0] for process in processes)
        return [process.returncode for process in processes]

    def noted(self, kind: str) -> list[Any]:
        path = self.notes / kind
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def calls(self) -> list[list[str]]:
        """The arguments of every call of `overnight`."""
        return [call["words"] for call in self.noted("calls")]

    def torchruns(self) -> list[Any]:
        """The options of every call of torchrun, by its own reading."""
        from torch.distributed.run import get_args_parser

        return [get_args_parser().parse_args(words) for words in self.noted("torchrun")]

    def wait_for_calls(self, count: int, process: subprocess.Popen[str]) -> None:
        for _ in range(1200):
            if len(self.noted("calls")) >= count:
                return
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.05)
        pytest.fail(f"overnight was called {len(self.calls())} times, not {count}: {self.calls()}")


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    found = Machines(tmp_path)
    yield found
    for process in found.started:  # leave no process behind, nor any that these have started
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        if process.stdout and not process.stdout.closed:
            process.communicate()


@pytest.fixture
def free_port() -> int:
    """One of those that Slurm's script uses; other tests may run on this machine at the same time."""
    with socket.socket() as listener:
        for port in random.sample(range(20_000, 40_000), 100):
            with suppress(OSError):
                listener.bind(("", port))
                return port
    pytest.fail("no port is free")


@pytest.fixture
def request_job() -> Callable[..., JobRequest]:
    """request_job(words=..., nodes=2, ...) -> a job of the run `mine` with these values and settings."""

    def build(max_restarts: int = 0, **values: Any) -> JobRequest:
        default: dict[str, Any] = {"path": "mine.job", "words": ("long",), "made_by": "overnight launch long"}
        default["texts"] = (JobText("data/notes", ("overnight", "prepare", "notes")),)
        given = {name: values.pop(name) for name in (*default, "programs") if name in values}
        compute = ComputeConfig(max_restarts=max_restarts)
        return JobRequest(
            config=LaunchConfig(**{"run_name": "mine", **values}, compute=compute), **default | given
        )

    return build
