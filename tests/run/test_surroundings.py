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
START = "import sys; sys.path.insert(0, folder); import test_surroundings as t; getattr(t, play)(*given)"
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
    "doctor": "doctor {folder}/tiny.toml --data {folder}/shards --only shards gradients disk",
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


def library_keeps_its_files_private(folder: Path) -> None:
    """The mutant of the tests of the umask."""
    from overnight.conversion import huggingface
    from overnight.training.checkpoint import format as checkpoint_format

    os.umask(0o022)
    huggingface.apply_umask = checkpoint_format.apply_umask = lambda path: None


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


UMASKS = {
    **{
        f"umask {mask:03o}": Surroundings(lambda _, mask=mask: os.umask(mask))
        for mask in (0o002, 0o022, 0o027)
    },
    "private files": Surroundings(library_keeps_its_files_private),
}

DENIED = """
runs: train tiny.toml --run-name new | runs | report tiny
stopped: train --resume stopped --total-steps 6 | evaluate stopped | report stopped | runs stopped
stopped: convert stopped --out x | generate stopped Line
stopped/recipe.toml: train --resume stopped --total-steps 6 | report stopped | runs stopped
stopped/metrics.jsonl: train --resume stopped --total-steps 6 | report stopped
stopped/data.json: train --resume stopped --total-steps 6 | evaluate stopped
stopped/events: train --resume stopped --total-steps 6 | report stopped
stopped/checkpoints: train --resume stopped --total-steps 6 | evaluate stopped
stopped/checkpoints/*4: evaluate stopped | evaluate stopped/checkpoints/step-00000004
stopped/checkpoints/*4/model.safetensors: train --resume stopped --total-steps 6 | evaluate stopped
stopped/checkpoints/*4/optimizer.safetensors: train --resume stopped --total-steps 6
stopped/tokenizer: train --resume stopped --total-steps 6 | evaluate stopped
stopped/tokenizer/tokenizer.json: train --resume stopped --total-steps 6 | evaluate stopped
stopped/metrics.jsonl: report stopped | train --resume stopped --total-steps 6
stopped: generate stopped a | report stopped | runs stopped | convert stopped --out x
shards: train tiny.toml --run-name new | inspect shards | plan tiny.toml
shards: doctor tiny.toml --only shards
shards/manifest.json: train tiny.toml --run-name new | inspect shards
shards/manifest.json: doctor tiny.toml --only shards
shards/train-00000.bin: train tiny.toml --run-name new | inspect shards
shards/train-00000.bin: doctor tiny.toml --only shards | doctor tiny.toml --only boundaries --json
shards/validation-00000.bin: doctor tiny.toml --only disjoint
shards/tokenizer: train tiny.toml --run-name new | prepare text --tokenizer shards/tokenizer --out x
shards/tokenizer: doctor tiny.toml --only tokenizer
shards/tokenizer/tokenizer.json: train tiny.toml --run-name new
text: doctor tiny.toml --only contamination --benchmarks text/001.txt
shards/tokenizer/tokenizer.json: prepare text --tokenizer shards/tokenizer --out x
hf: evaluate hf --data shards
hf/config.json: evaluate hf --data shards
hf/model.safetensors: evaluate hf --data shards | convert hf --out x
hf/tokenizer.json: evaluate hf --data shards
text: prepare text --tokenizer characters --out x | inspect text
text/001.txt: prepare text --tokenizer characters --out x --on-bad-file skip
text/001.txt: prepare text/001.txt --tokenizer characters --out x
tiny.toml: train tiny.toml --run-name new | plan tiny.toml | doctor tiny.toml
tasks: evaluate stopped --tasks hellaswag --task-files tasks
tasks/hellaswag_val.jsonl: evaluate stopped --tasks hellaswag --task-files tasks
tasks/hellaswag_val.jsonl: prepare text --out x --decontaminate tasks/hellaswag_val.jsonl
model.pt: evaluate model.pt --data shards
"""
"""A path without permission, and the commands that read it."""


def play_denied(folder: str, has_mutant: bool, sent: Any) -> None:
    """In a process of its own: what each command of DENIED says."""
    from overnight.conversion import huggingface

    os.chdir(folder)
    os.environ["XDG_CACHE_HOME"] = str(Path(folder, "cache"))
    assert call(["convert", "stopped", "--out", "hf"])[0] == 0
    Path("tasks").mkdir()
    Path("tasks/hellaswag_val.jsonl").write_text("{}\n")
    Path("model.pt").write_bytes(b"PK")
    give_up_privileges()
    if has_mutant:
        huggingface.require_readable = lambda path: None
    found = {}
    for line in DENIED.strip().splitlines():
        name, _, commands = line.partition(": ")
        [path] = Path().glob(name)
        for words in commands.split(" | "):
            mode = path.stat().st_mode
            path.chmod(0)
            found[f"{path}: {words}"] = call(words.split())
            path.chmod(mode)
    left = [str(path) for path in (Path("x"), Path("runs/new")) if path.exists()]
    sent.send((found, left))


def play(name: str, folder: str, has_mutant: bool, sent: Any) -> None:
    """In a process of its own: every command in these surroundings; what it said, and what it left."""
    these, place = (SURROUNDINGS | UMASKS)[name], Path(folder)
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

    def outcomes(*name, has_mutant=False, play="play"):
        folder = shutil.copytree(ground, tmp_path / "copy")
        received, sent = PROCESSES.Pipe(duplex=False)
        names = {"folder": str(Path(__file__).parent), "play": play}
        names["given"] = *name, str(folder), has_mutant, sent
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


@pytest.fixture
def modes(ground, outcomes, tmp_path):
    """`modes(name)`: the permissions of all files, and of all folders, that the commands created."""

    def modes(name):
        assert all(status == 0 for status, _, _ in outcomes(name).values())
        before = {path.relative_to(ground) for path in ground.rglob("*")}
        folder = tmp_path / "copy"
        new = [path for path in folder.rglob("*") if path.relative_to(folder) not in before]
        return [
            {path.stat().st_mode & 0o777 for path in new if path.is_dir() == is_folder}
            for is_folder in (False, True)
        ]

    return modes


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o027])
def test_files_of_every_command_follow_the_umask(umask, modes):
    assert modes(f"umask {umask:03o}") == [{0o666 & ~umask}, {0o777 & ~umask}]


def test_private_file_would_be_noticed(modes):
    """Negative control: safetensors creates its files as private."""
    assert modes("private files") == [{0o644, 0o600}, {0o755}]


def test_path_without_permission_is_said_to_be_so(outcomes):
    found, left = outcomes(play="play_denied")
    for case, (status, said) in found.items():
        last = said.splitlines()[-1]
        assert status == 2, f"{case}: {said}"
        assert re.match("overnight: .*(Permission denied|not writable)", last), f"{case}: {said}"
        assert case.partition(":")[0] in last, f"{case}: {said}"
    assert not left


def test_wrong_reason_would_be_noticed(outcomes):
    """Negative control: safetensors' own word for such a file."""
    found, _ = outcomes(play="play_denied", has_mutant=True)
    _, said = found["hf/model.safetensors: evaluate hf --data shards"]
    assert "No such file" in said
