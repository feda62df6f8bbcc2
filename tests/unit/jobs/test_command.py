"""What the command writes and prints; its other refusals are in tests/run/golden/commands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from overnight.cli import main
from overnight.jobs import TARGETS

FILES = {name: f"gpt2-124m.{'sbatch' if name == 'slurm' else f'{name}.yaml'}" for name in TARGETS}
PROGRAMS = {"slurm": "sbatch ", "skypilot": "sky jobs ", "sagemaker": "aws s3 ", "kubernetes": "kubectl "}
pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture
def launch(capfd: pytest.CaptureFixture[str]) -> Any:
    """launch(*words) -> (exit status, standard error)."""

    def run(*words: str) -> tuple[int, str]:
        status = main(["launch", *words])
        return status, capfd.readouterr().err

    return run


def train_arguments(job: str) -> str:
    """The arguments that start the run."""
    (line,) = re.findall("exec overnight train (?!--resume)(.*)", job)
    return str(line)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("nodes", [(), ("--nodes", "2")])
def test_launch_writes_a_file_and_prints_the_next_command(
    target: str, nodes: tuple[str, ...], launch: Any
) -> None:
    status, err = launch(f"--{target}", "gpt2-124m", *nodes)
    job, first, last = Path(FILES[target]).read_text(), err.splitlines()[0], err.splitlines()[-1]
    assert status == 0
    assert FILES[target] in first
    assert re.match(f"next: .*{PROGRAMS[target]}.*{FILES[target]}", last)
    assert {*re.findall("YOUR-[A-Z-]*[A-Z]", err)} == {*re.findall("YOUR-[A-Z-]*[A-Z]", job)}
    assert (f'export PATH={Path(sys.executable).parent}:"$PATH"' in job) == (target == "slurm")


def test_options_are_passed_on_and_the_command_in_the_file_writes_it_again(launch: Any) -> None:
    options = ("--total-steps=5000", "--sample-prompts", "it's", "a b", "--out", "jobs/mine.sbatch")
    given = "--nodes=2 --gpus-per-node=4 --hours=2 --max-restarts=5 --partition=a --run-name=mine"
    assert launch("gpt2-124m", "--slurm", *given.split(), *options)[0] == 0
    job = Path("jobs/mine.sbatch").read_text()
    words = """gpt2-124m --run-name mine --total-steps 5000 --sample-prompts 'it'"'"'s' 'a b'"""
    assert train_arguments(job) == words
    (command,) = re.findall("# Written by: (.*)", job)
    Path("jobs/mine.sbatch").unlink()
    subprocess.run(["bash", "-c", f"{sys.executable} -m {command}"], check=True, capture_output=True)
    assert Path("jobs/mine.sbatch").read_text() == job


def test_recipe_file_is_named_for_slurm_and_written_out_elsewhere(launch: Any) -> None:
    Path("mine.toml").write_text(
        '[schedule]\ntotal_steps = 900\n[model]\nn_layer = 3\n[data]\ndata = "data/fineweb-edu"\n'
    )
    launch("mine.toml", "--slurm", "--seed=5")
    assert train_arguments(Path("mine.sbatch").read_text()) == "mine.toml --seed 5"
    launch("mine.toml", "--skypilot", "--seed=5")
    words = train_arguments(Path("mine.skypilot.yaml").read_text())
    assert "mine.toml" not in words
    assert all(option in words for option in ("--run-name mine ", "--seed 5", "--n-layer 3"))


def test_missing_text_is_prepared_first(launch: Any) -> None:
    _, err = launch("gpt2-1558m", "--slurm")
    assert "next: overnight prepare fineweb-edu --subset sample-100BT && sbatch gpt2-1558m.sbatch" in err
    assert "data/fineweb-edu/manifest.json" in Path("gpt2-1558m.sbatch").read_text()
    Path("data/fineweb-edu").mkdir(parents=True)
    Path("data/fineweb-edu/manifest.json").touch()
    assert "next: sbatch again" in launch("gpt2-1558m", "--slurm", "--out", "again")[1]
    launch("gpt2-124m", "--slurm", "--shuffle-window", "100_000_000", "--evaluation-tokens", "1000")
    job = Path(FILES["slurm"]).read_text()
    assert "manifest.json" not in job, "such a run starts before its text is whole"


@pytest.mark.parametrize("option", ["--data", "--mixture"])
def test_other_machines_get_the_folder_of_text_that_only_this_one_has(option: str, launch: Any) -> None:
    Path("notes.txt").write_text("text")
    text = "notes.txt" if option == "--data" else "notes.txt=1.0"
    mine = ("gpt2-124m", "--data=", option, text, "--tokenizer", "bpe-300")
    launch("--kubernetes", *mine)
    job = Path(FILES["kubernetes"]).read_text()
    assert f"{option} data/notes-bpe-300" in train_arguments(job)
    assert "overnight prepare" not in job
    launch("--sagemaker", *mine)
    job = yaml.safe_load(Path(FILES["sagemaker"]).read_text())
    assert option not in job["AlgorithmSpecification"]["ContainerArguments"]  # has another name there
    assert f'{option} "$SM_CHANNEL_TRAINING"' in job["Environment"]["OVERNIGHT_TRAIN"]
    uri = job["InputDataConfig"][0]["DataSource"]["S3DataSource"]["S3Uri"]
    assert uri.endswith("/data/notes-bpe-300/")


@pytest.mark.parametrize(
    "words, message",
    [
        ("gpt2-124m --slrum", "--slrum; did you mean slurm"),
        ("gpt2-124m --slurm --gpus-per-node=-1", "gpus_per_node=-1"),
        ("gpt2-124m --slurm --hours inf", "hours=inf"),
        ("gpt2-124m --slurm --n-head 5", "n_head=5"),
        ("gpt2-124m --slurm --bucket b", "bucket is for --skypilot and --sagemaker"),
        ("gpt2-124m --sagemaker --gpu T4", "gpu=T4"),
        ("gpt2-124m --slurm --out .", "--out"),
        ("gpt2-124m --slurm --nodes 8 --micro-batch-size 16", "64 processes.* 32 .*tokens_per_step=1048576"),
        ("gpt3-125m --slurm --nodes 3", "batch_ramp_start_tokens=32768.* 24 processes"),
        ("gpt2-124m --slurm --tokens-per-step 1000", "tokens_per_step=1000"),
    ],
)
def test_wrong_use_is_one_line_and_no_file(words: str, message: str, launch: Any, here: Path) -> None:
    status, err = launch(*words.split())
    assert (status, len(err.splitlines())) == (2, 1)
    assert re.search(message, err)
    assert list(here.iterdir()) == []


def test_proposed_tokens_are_accepted_and_an_existing_file_is_not_replaced(launch: Any) -> None:
    _, err = launch("gpt2-124m", "--slurm", "--nodes", "3")
    proposed = re.findall("tokens_per_step=([0-9]+)", err)[-1]
    assert launch("gpt2-124m", "--slurm", "--nodes", "3", "--tokens-per-step", proposed)[0] == 0
    before = Path(FILES["slurm"]).read_text()
    status, err = launch("gpt2-124m", "--slurm", "--nodes", "2")
    assert (status, FILES["slurm"] in err) == (2, True)
    assert Path(FILES["slurm"]).read_text() == before
