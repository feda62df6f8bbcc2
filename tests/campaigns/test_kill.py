"""A run killed by the kernel at any instant resumes to the same bits.

Every run here is a process of its own and every kill a real SIGKILL, after which no line of Python is
executed. The processes are forked from one that has imported torch and never trained.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from overnight.preparation.prepare import prepare_shards
from overnight.preparation.prepare_config import PrepareConfig
from overnight.run_directory import RunDirectory

RECIPE = """
[data]
data = "{shards}"

[model]
n_layer = 2
n_head = 2
n_embd = 16
context_length = 32
dropout = 0.1

[schedule]
total_steps = 12
warmup_steps = 3

[batch]
tokens_per_step = 1024
micro_batch_size = 16

[compute]
device = "cpu"
precision = "fp32"
compile = false

[evaluation]
evaluate_every_steps = 4

[samples]
sample_every_steps = 5
sample_tokens = 4

[checkpoints]
checkpoint_every_steps = 3
"""

# `words` are the command's; the process kills itself just before the `nth` event that `pattern` matches.
START = """
import os, re, signal, sys

def watch(event, arguments, seen=[]):
    what = " ".join([event, *(str(argument) for argument in arguments[:2])])
    if pattern and re.search(pattern, what):
        seen.append(what)
        if len(seen) == nth:
            os.kill(os.getpid(), signal.SIGKILL)

os.chdir(folder)
sys.addaudithook(watch)
from overnight.cli import main
sys.exit(main(words))
"""

# A checkpoint whose writing has no end; and the end of the process as `overnight` has it.
STUCK = """
import os, time

os.chdir(folder)
from overnight.training.checkpoint import save

def write_for_ever(*given):
    open("writing", "w").close()
    time.sleep(900)

save.write_rank_files = write_for_ever
from overnight.cli import main
from overnight.distributed.launcher import exit_process
exit_process(main(words))
"""

FORGETFUL = """
from overnight.run import resume

def restore_weights(state, opened, restore=resume.restore):
    restore(state, opened)
    state.optimizer.state.clear()

resume.restore = restore_weights
"""

SLOW_IMPORTS = ["overnight.cli", "overnight.run.train", "torch._dynamo", "tyro", "rich.progress"]
PROCESSES = multiprocessing.get_context("forkserver")
RUN = Path("runs/small")
CLOCK = {"milliseconds", "tokens_per_second", "mfu"}  # the only values that a repetition may change


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A recipe over 40 small documents, as TOML."""
    root = tmp_path_factory.mktemp("text")
    for number in range(40):
        (root / f"{number:02}.txt").write_text(f"Line {number} tells of {number * 7 % 100}.\n" * 6)
    shards = root / "shards"
    prepare_shards(
        PrepareConfig(source=str(root), out=str(shards), tokenizer="characters", validation_fraction=0.2)
    )
    return RECIPE.format(shards=shards)


@pytest.fixture
def folder(tmp_path: Path, recipe: str) -> Path:
    """Where the commands are typed: small.toml lies there."""
    (tmp_path / "small.toml").write_text(recipe)
    return tmp_path


def start(folder: Path, pattern: str | None = None, nth: int = 1, script: str = START) -> BaseProcess:
    """The command one would type: `train` what is not begun yet, `train --resume` what is."""
    PROCESSES.set_forkserver_preload(SLOW_IMPORTS)
    begun = RunDirectory(folder / RUN).exists()
    words = ["train", "--resume", str(RUN)] if begun else ["train", "small.toml"]
    names = {"folder": str(folder), "words": words, "pattern": pattern, "nth": nth}
    process = PROCESSES.Process(target=exec, args=(script, names))
    process.start()
    return process


def outcome(process: BaseProcess) -> int:
    """The exit status once the process has ended; -9 if it was killed."""
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


def record(folder: Path) -> dict[str, Any]:
    """Everything the run in `folder` wrote, but for the clock: the weights and moments by their sha256."""
    directory = RunDirectory(folder / RUN)
    lines = directory.read_metrics()
    assert [line["step"] for line in lines] == list(range(1, 13))
    return {
        "metrics": [{key: line[key] for key in line if key not in CLOCK} for line in lines],
        "evaluations": directory.read_events("evaluations"),
        "samples": directory.read_events("samples"),
        "checkpoints": {
            path.relative_to(directory.checkpoints): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in directory.checkpoints.rglob("*")
            if path.is_file()
        },
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, recipe: str) -> dict[str, Any]:
    """The record of the run that nobody killed."""
    folder = tmp_path_factory.mktemp("full")
    (folder / "small.toml").write_text(recipe)
    assert outcome(start(folder)) == 0
    found = record(folder)
    assert len(found["checkpoints"]) >= 2 * 3
    return found


@pytest.mark.parametrize(
    "pattern, nth",
    [
        pytest.param(r"open .*recipe\.toml", 1, id="before anything is written"),
        pytest.param(r"open .*environment\.json", 1, id="when only half of its description is"),
        pytest.param(r"open .*metrics\.jsonl a", 1, id="before the first line"),
        pytest.param(r"open .*metrics\.jsonl a", 8, id="two steps after a checkpoint"),
        pytest.param(r"mkdir .*building-step-00000003", 1, id="before the first checkpoint"),
        pytest.param(r"open .*building-step-00000006.*MANIFEST", 1, id="while a checkpoint is written"),
        pytest.param(r"rename .*building-step-00000009", 1, id="before a checkpoint gets its name"),
        pytest.param(r"rmtree .*[^-]step-00000003", 1, id="before the oldest checkpoint is deleted"),
        pytest.param(r"open .*evaluations\.jsonl a", 4, id="before the last evaluation is written"),
        pytest.param(r"rename .*building-step-00000012", 1, id="before the last checkpoint gets its name"),
    ],
)
def test_killed_at_chosen_instant(folder: Path, undisturbed: dict[str, Any], pattern: str, nth: int) -> None:
    assert outcome(start(folder, pattern, nth)) == -signal.SIGKILL
    assert not RunDirectory(folder / RUN).is_finished(12)
    assert outcome(start(folder)) == 0
    assert record(folder) == undisturbed


def test_killed_repeatedly(folder: Path, undisturbed: dict[str, Any]) -> None:
    """Each start may open, make, rename and delete a few more files of the run than the one before."""
    kills = 0
    while outcome(start(folder, f"{RUN}.*", 15 + 9 * kills)) == -signal.SIGKILL:
        kills += 1
    assert kills >= 5
    assert record(folder) == undisturbed


@pytest.mark.parametrize("lines", [1, 5, 10])
def test_killed_from_outside(folder: Path, undisturbed: dict[str, Any], lines: int) -> None:
    process = start(folder)
    while count_lines(folder / RUN / "metrics.jsonl") < lines:
        assert process.is_alive()
        time.sleep(0.001)
    process.kill()
    assert outcome(process) == -signal.SIGKILL
    assert outcome(start(folder)) == 0
    assert record(folder) == undisturbed


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def test_torn_metrics_line(folder: Path, undisturbed: dict[str, Any]) -> None:
    assert outcome(start(folder, r"open .*metrics\.jsonl a", 8)) == -signal.SIGKILL
    metrics = folder / RUN / "metrics.jsonl"
    os.truncate(metrics, metrics.stat().st_size - 9)
    assert outcome(start(folder)) == 0
    assert record(folder) == undisturbed


def test_comparison_sees_lost_optimizer(folder: Path, undisturbed: dict[str, Any]) -> None:
    """Negative control: a resume with fresh moments differs."""
    assert outcome(start(folder, r"open .*metrics\.jsonl a", 8)) == -signal.SIGKILL
    assert outcome(start(folder, script=FORGETFUL + START)) == 0
    assert record(folder)["metrics"] != undisturbed["metrics"]


def test_second_signal_does_not_wait_for_checkpoint(folder: Path) -> None:
    """After the first signal the save waits for its thread; the second ends the process."""
    process = start(folder, script=STUCK)
    while not (folder / "writing").exists():
        assert process.is_alive()
        time.sleep(0.001)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGTERM)
    process.join(1)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGTERM)
    assert outcome(process) == 130
    assert outcome(start(folder)) == 0
