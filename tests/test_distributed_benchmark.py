"""What could make the campaign of several processes lie: its comparisons, its clock, its document."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from overnight.model.gpt import GPT, initialize
from overnight.model.model_config import ModelConfig
from overnight.run_directory import RunDirectory
from overnight.training import OptimizerConfig
from overnight.training.checkpoint.save import save_checkpoint
from overnight.training.optim import build_optimizer
from overnight.training.state import TrainState

TINY = ModelConfig(n_layer=1, n_head=2, n_embd=8, context_length=16, vocab_size=40)


@pytest.fixture
def campaign(benchmarks: dict[str, Any]) -> Any:
    return benchmarks["distributed"]


@pytest.fixture
def teams(benchmarks: dict[str, Any]) -> Any:
    return benchmarks["teams"]


@pytest.fixture
def overheard(benchmarks: dict[str, Any]) -> Any:
    return benchmarks["overheard"]


# ---------------------------------------------------------------- what talking costs


def test_moving_begins_when_the_last_has_come(overheard: Any) -> None:
    """Two calls: one waits 2 s and 0 for the other, and both move for 1 s; then nobody waits, for 3 s."""
    first = overheard.Step(10.0, [(0.0, 3.0, 100), (5.0, 8.0, 50)])
    second = overheard.Step(9.0, [(2.0, 2.5, 100), (5.0, 7.0, 50)])
    assert overheard.divide([first, second]) == (10.0, 1.0 + 3.0, (2.0 + 0.0) / 2, 150)


def test_processes_that_say_different_things_are_not_compared(overheard: Any) -> None:
    steps = [overheard.Step(1.0, [(0.0, 1.0, 8)]), overheard.Step(1.0, [])]
    with pytest.raises(ValueError, match="zip"):
        overheard.divide(steps)


def test_the_first_steps_do_not_count(overheard: Any, tmp_path: Path) -> None:
    for rank in range(2):
        notes = [[float(step), [[0.0, 1.0, 4]]] for step in range(6)]
        (tmp_path / f"{rank}.json").write_text(json.dumps(notes))
    talks = overheard.read_notes(tmp_path, 2)
    assert [talk.seconds for talk in talks] == [3.0, 4.0, 5.0]


def test_a_call_is_about_its_largest_tensor(overheard: Any) -> None:
    whole, part = torch.zeros(8), torch.zeros(2)
    assert overheard.bytes_of((whole, part), {}) == 32
    assert overheard.bytes_of((), {"output": part, "input": whole, "group": None}) == 32
    assert overheard.bytes_of((["", ""], "a word"), {}) == 0


# ---------------------------------------------------------------- what is compared


@pytest.fixture
def write_run(tmp_path: Path) -> Callable[..., Path]:
    """Writes a run of one step whose weights are drawn from a seed."""

    def write(name: str, *, seed: int = 0, loss: float = 3.0, milliseconds: float = 5.0) -> Path:
        directory = RunDirectory(tmp_path / name)
        model = GPT(TINY)
        initialize(model, seed)
        save_checkpoint(
            TrainState(model, build_optimizer(model, OptimizerConfig()), 1), directory.checkpoints
        )
        directory.append_metrics({"step": 1, "loss": loss, "milliseconds": milliseconds})
        return directory.path

    return write


def test_runs_are_told_apart_by_all_but_the_clock(campaign: Any, write_run: Callable[..., Path]) -> None:
    one = campaign.digest(write_run("one"))
    assert campaign.digest(write_run("same", milliseconds=7.0)) == one
    assert campaign.digest(write_run("loss", loss=3.0000001)) != one
    assert campaign.digest(write_run("weights", seed=1)) != one


def test_differences_are_the_largest(campaign: Any, write_run: Callable[..., Path]) -> None:
    assert campaign.largest_difference([1.0, 2.0, 4.0], [1.0, 2.1, 4.0]) == pytest.approx(0.1 / 2.1)
    one = write_run("one")
    assert campaign.compare_weights(one, write_run("same")) == 0.0
    assert campaign.compare_weights(one, write_run("other", seed=1)) > 0.01


@pytest.mark.skipif(not Path("/proc/self/environ").is_file(), reason="needs Linux's /proc")
def test_the_processes_of_a_run_are_found_by_their_rank(teams: Any) -> None:
    started = {}
    try:
        for rank in (0, 3):
            environment = os.environ | {"RANK": str(rank), "LOCAL_RANK": "9", "GROUP_RANK": "8"}
            started[rank] = subprocess.Popen(
                [sys.executable, "-c", "input()"], env=environment, stdin=subprocess.PIPE
            )
        assert teams.ranks_of(os.getpid()) == {rank: process.pid for rank, process in started.items()}
    finally:
        for process in started.values():
            process.communicate(b"\n")


# ---------------------------------------------------------------- the document


def test_every_table_has_its_place_in_the_document(campaign: Any, repository: Path) -> None:
    document = (repository / "docs/distributed.md").read_text(encoding="utf-8")
    for part in campaign.PARTS:
        written = campaign.put(document, part, f"| figures of {part} |")
        assert written.count(f"| figures of {part} |") == 1
        assert campaign.put(written, part, "| new |").count("| figures of") == 0, "the old ones go"
        assert written.count("<!-- figures: ") == document.count("<!-- figures: ")


def test_a_document_without_a_place_is_refused(campaign: Any) -> None:
    with pytest.raises(ValueError, match="the document has no place for kills"):
        campaign.put("# Text\n", "kills", "| 1 |")


def test_figures_come_with_their_commit_date_and_command(campaign: Any, tmp_path: Path) -> None:
    path = tmp_path / "document.md"
    path.write_text("# Text\n\n<!-- figures: kills -->\n\nold\n\n<!-- end of figures -->\n\nmore\n")
    report = campaign.Report(title="T", headings=["what"], rows=[["a"]], measured={})
    campaign.write_figures(path, "kills", report, ["benchmarks/distributed.py", "--kills", "2"])
    text = path.read_text()
    assert "old" not in text
    assert text.startswith("# Text\n\n<!-- figures: kills -->\n\n| what |")
    assert text.endswith("<!-- end of figures -->\n\nmore\n")
    assert report.date in text
    assert "`python benchmarks/distributed.py --kills 2`" in text


@pytest.mark.distributed
def test_a_small_campaign(repository: Path, tmp_path: Path) -> None:
    """In real processes: two kills and a frozen one."""
    document = tmp_path / "distributed.md"
    shutil.copy(repository / "docs/distributed.md", document)
    words = ["--parts", "kills", "frozen", "--kills", "2", "--frozen", "1", "--steps", "40"]
    done = subprocess.run(
        [sys.executable, str(repository / "benchmarks/distributed.py"), *words, "--write", str(document)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert " 2/2 |" in document.read_text()
    assert " 1/1 |" in document.read_text()


@pytest.mark.distributed
def test_talk_is_heard(campaign: Any, tmp_path: Path) -> None:
    """Of two processes that add up in a tree: each sends all its gradients to the other, and little else."""
    talks = campaign.listen_to(campaign.prepare(tmp_path, steps=9), 2, ("none", "--deterministic_reduce"), 6)
    parameters = 4 * 12 * 256**2 + 256 * 256
    for talk in talks:
        assert 4 * parameters < talk.bytes < 1.1 * 4 * parameters
        assert 0 < talk.moving < talk.seconds
    assert len(talks) == 6 - 1 - 3, "the last has no end, and the first three do not count"
