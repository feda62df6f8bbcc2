"""Every command in surroundings of many kinds: it works, or ends with one sentence and exit status 2."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import io
import multiprocessing
import os
import pwd
import re
import shutil
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from overnight import cli

PROCESSES = multiprocessing.get_context("forkserver")
PRELOADED = [
    *("overnight.cli", "overnight.run.train", "overnight.doctor.command", "overnight.report.page"),
    *("torch._dynamo", "tyro", "matplotlib.figure", "matplotlib.backends.backend_svg"),
]
START = "import sys; sys.path.insert(0, folder); import test_surroundings as t; t.play(*given)"
RECIPE = """
run_name = "tiny"
[data]
data = "shards"
[model]
n_layer = 1
n_head = 2
n_embd = 16
context_length = 32
[schedule]
total_steps = 4
warmup_steps = 1
[batch]
tokens_per_step = 64
micro_batch_size = 2
[compute]
device = "cpu"
precision = "fp32"
compile = false
[checkpoints]
checkpoint_every_steps = 2
"""
COMMANDS = {
    "prepare": "prepare {folder}/text --tokenizer characters --out data/text --workers 1",
    "train": "train {folder}/tiny.toml --run-name new --data {folder}/shards",
    "resume": "train --resume {folder}/stopped --total-steps 6",
    "inspect": "inspect {folder}/shards",
    "evaluate": "evaluate {folder}/runs/tiny",
    "generate": "generate {folder}/runs/tiny Line --max-new-tokens 4 --device cpu",
    "report": "report {folder}/runs/tiny",
    "compare": "report {folder}/runs/tiny {folder}/stopped --out {folder}/both.html",
    "runs": "runs",
    "plan": "plan gpt2-124m --device-type h100",
    "doctor": "doctor {folder}/tiny.toml --data {folder}/shards --only shards gradients",
    "convert": "convert {folder}/runs/tiny --to hf --out tiny-hf",
    "launch": "launch gpt2-124m --slurm --out job.sbatch",
}


NEW = {"prepare": ["data"], "train": ["runs/new"], "convert": ["tiny-hf"], "launch": ["job.sbatch"]}
"""What a command leaves in the current folder."""


def call(words: list[str]) -> tuple[int, str]:
    """Exit status of `overnight` with these words, and all that it printed."""
    said = io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True)
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            status = cli.main(words)
        except BaseException:
            traceback.print_exc()
            status = -1
    return status, said.buffer.getvalue().decode()  # type: ignore[attr-defined]


def give_up_privileges() -> None:
    """From here on this process, even root's, has no right that a folder's mode refuses."""
    if os.getuid() == 0:
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)
        assert ctypes.CDLL(None, use_errno=True).capset(header, (ctypes.c_uint32 * 6)()) == 0


Call = Callable[[list[str]], tuple[int, str]]


def in_thread(words: list[str]) -> tuple[int, str]:
    answers: list[tuple[int, str]] = []
    thread = threading.Thread(target=lambda: answers.append(call(words)))
    thread.start()
    thread.join()
    return answers[0]


def in_event_loop(words: list[str]) -> tuple[int, str]:
    async def cell() -> tuple[int, str]:
        return call(words)

    return asyncio.run(cell())


def nothing(folder: Path) -> None:
    """Nothing else differs."""


def read_only_home(folder: Path) -> None:
    home = folder / "home"
    home.mkdir()
    home.chmod(0o555)
    os.environ["HOME"] = str(home)
    os.environ["XDG_CACHE_HOME"] = str(home / "cache")
    give_up_privileges()


def no_user(folder: Path) -> None:
    """As in a container with an arbitrary user id."""

    def getpwuid(number: int) -> Any:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    pwd.getpwuid = getpwuid
    for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "XDG_CACHE_HOME"):
        os.environ.pop(name, None)


def read_only_folder(folder: Path) -> None:
    place = folder / "locked"
    place.mkdir()
    place.chmod(0o555)
    os.chdir(place)
    give_up_privileges()


def deleted_folder(folder: Path) -> None:
    place = folder / "gone"
    place.mkdir()
    os.chdir(place)
    place.rmdir()


def closed_streams(folder: Path) -> None:
    os.close(0)
    sys.stdin = None  # type: ignore[assignment]


WRITES_HERE = frozenset(NEW)
JOINS = frozenset({"train", "resume", "evaluate"})


@dataclass(frozen=True)
class Surroundings:
    """What differs, and which commands can't work there."""

    enter: Callable[[Path], None] = nothing
    variables: dict[str, str] = field(default_factory=dict)
    call: Call = call
    refused: frozenset[str] = frozenset()


SURROUNDINGS = {
    "plain": Surroundings(),
    "another thread": Surroundings(call=in_thread),
    "a notebook's event loop": Surroundings(call=in_event_loop),
    "a read-only home": Surroundings(read_only_home),
    "no user": Surroundings(no_user),
    "a home that is no folder": Surroundings(variables={"HOME": "/dev/null", "XDG_CACHE_HOME": ""}),
    "an impossible cache": Surroundings(variables={"XDG_CACHE_HOME": "/dev/null/x"}),
    "a relative cache": Surroundings(variables={"XDG_CACHE_HOME": "cache"}),
    "half of a launcher": Surroundings(variables={"WORLD_SIZE": "2"}, refused=JOINS),
    "a launcher's garbage": Surroundings(
        variables={"WORLD_SIZE": "two", "RANK": "", "LOCAL_RANK": "-1"}, refused=JOINS
    ),
    "garbage of Slurm": Surroundings(variables={"SLURM_STEP_NUM_TASKS": "x"}, refused=JOINS),
    "garbage of torchrun": Surroundings(
        variables={"TORCHELASTIC_RESTART_COUNT": "x"}, refused=frozenset({"train"})
    ),
    "20 columns": Surroundings(variables={"COLUMNS": "20"}),
    "60 columns": Surroundings(variables={"COLUMNS": "60"}),
    "200 columns": Surroundings(variables={"COLUMNS": "200", "TERM": "dumb"}),
    "columns of garbage": Surroundings(variables={"COLUMNS": "many", "LINES": "-1"}),
    "threads of garbage": Surroundings(variables={"OMP_NUM_THREADS": "x"}),
    "a read-only folder": Surroundings(read_only_folder, refused=WRITES_HERE),
    "a deleted folder": Surroundings(deleted_folder, refused=WRITES_HERE),
    "LANG=C": Surroundings(variables={"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0"}),
    "closed stdin": Surroundings(closed_streams),
}


def play(name: str, folder: str, has_mutant: bool, sent: Any) -> None:
    """In a process of its own: every command in these surroundings; what it said, and what it left."""
    these, place = SURROUNDINGS[name], Path(folder)
    os.chdir(place)
    os.environ |= {"XDG_CACHE_HOME": str(place / "cache"), **these.variables}
    these.enter(place)
    if has_mutant:
        threading.main_thread = threading.current_thread  # type: ignore[assignment]
    found = {}
    for command, words in COMMANDS.items():
        status, said = these.call(words.format(folder=folder).split())
        found[command] = status, said, any((place / new).exists() for new in NEW.get(command, ()))
    sent.send(found)


@pytest.fixture(scope="module")
def ground(prepare_texts, tmp_path_factory):
    """A text, its shards, a recipe, a finished run and one to be continued."""
    folder = tmp_path_factory.mktemp("ground")
    shutil.move(prepare_texts(folder / "text"), folder / "shards")
    (folder / "tiny.toml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert call(["train", "tiny.toml", "--data", str(folder / "shards")])[0] == 0
    shutil.copytree(folder / "runs/tiny", folder / "stopped")
    PROCESSES.set_forkserver_preload(PRELOADED)
    return folder


@pytest.fixture
def outcomes(ground, tmp_path):
    """`outcomes(name)`: of each command its status, what it said, and whether it left something."""

    def outcomes(name, has_mutant=False):
        folder = shutil.copytree(ground, tmp_path / "copy")
        received, sent = PROCESSES.Pipe(duplex=False)
        names = {"folder": str(Path(__file__).parent), "given": (name, str(folder), has_mutant, sent)}
        process = PROCESSES.Process(target=exec, args=(START, names))
        process.start()
        sent.close()
        found = received.recv()  # EOFError if the process has died
        process.join()
        return found

    return outcomes


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_commands_work_or_are_refused_in_a_sentence(name, outcomes):
    for command, (status, said, has_left) in outcomes(name).items():
        is_refused = command in SURROUNDINGS[name].refused
        assert status == (2 if is_refused else 0), f"{command}: {said}"
        assert has_left == (command in NEW and not is_refused), command
        assert not re.search("Traceback|Warning|Exception", said), said
        last = said.splitlines()[-1]
        assert not is_refused or re.match(r"overnight: .{20,}", last), said


def test_mistake_would_be_noticed(outcomes):
    """Negative control: a run that takes its thread for the main one."""
    status, said, _ = outcomes("another thread", has_mutant=True)["train"]
    assert status == 2
    assert "main thread" in said
