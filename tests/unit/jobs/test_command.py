from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from overnight.cli import main

TARGETS = ("slurm", "skypilot", "sagemaker", "kubernetes")
ENDINGS = {"slurm": "sbatch"} | {name: f"{name}.yaml" for name in TARGETS[1:]}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def launch(capfd: pytest.CaptureFixture[str]) -> Any:
    """The command; returns (its exit status, what it said)."""

    def run(*words: str) -> tuple[int, str]:
        status = main(["launch", *words])
        return status, capfd.readouterr().err

    return run


def trained_words(job: str) -> str:
    """What begins the run."""
    (line,) = re.findall("exec overnight train (?!--resume)(.*)", job)
    return str(line)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "nodes, size", [((), "1 node with 8 GPUs"), (("--nodes", "2"), "2 nodes with 8 GPUs each")]
)
def test_every_target_has_a_file_and_a_next_command(
    target: str, nodes: tuple[str, ...], size: str, launch: Any, folder: Path
) -> None:
    status, said = launch(f"--{target}", "gpt2-124m", *nodes)
    assert status == 0
    path = folder / f"gpt2-124m.{ENDINGS[target]}"
    assert said.startswith(f"wrote {path.name}: runs/gpt2-124m on {size}\n")
    written_by = " ".join(["overnight launch gpt2-124m", f"--{target}", *nodes])
    assert f"# Written by: {written_by}\n" in path.read_text()
    assert all(len(line) <= 110 for line in path.read_text().splitlines())
    submit = {"slurm": "sbatch ", "skypilot": "sky jobs launch ", "sagemaker": "aws s3 sync "}
    (last,) = [line for line in said.splitlines() if line.startswith("next: ")]
    assert submit.get(target, "kubectl apply -f ") in last
    assert path.name in last


@pytest.mark.parametrize("target", TARGETS)
def test_what_the_file_leaves_open_is_said(target: str, launch: Any, folder: Path) -> None:
    blanks = {
        "slurm": "",
        "skypilot": "fill in YOUR-BUCKET there\n",
        "sagemaker": "fill in YOUR-BUCKET, YOUR-IMAGE, YOUR-ROLE there\n",
        "kubernetes": "fill in YOUR-IMAGE there\n",
    }
    _, said = launch("gpt2-124m", f"--{target}")
    assert "".join(re.findall("^fill in .*\n", said, re.MULTILINE)) == blanks[target]


def test_nothing_is_left_open_that_was_given(launch: Any, folder: Path) -> None:
    given = ("--bucket", "b", "--image", "i", "--role", "arn:aws:iam::111122223333:role/r")
    _, said = launch("gpt2-124m", "--sagemaker", *given)
    assert "fill in" not in said
    job = yaml.safe_load((folder / "gpt2-124m.sagemaker.yaml").read_text())
    assert job["RoleArn"] == given[-1]


def test_the_recipes_options_are_passed_on(launch: Any, folder: Path) -> None:
    options = ("--total-steps=5000", "--sample-prompts", "it's", "a b", "--out", "jobs/mine.sbatch")
    given = (
        "--nodes",
        "2",
        "--gpus-per-node",
        "4",
        "--hours",
        "2",
        "--max-restarts",
        "5",
        "--partition",
        "a",
    )
    assert launch("gpt2-124m", "--slurm", *given, *options, "--run-name", "mine")[0] == 0
    job = (folder / "jobs/mine.sbatch").read_text()
    words = """gpt2-124m --run-name mine --total-steps 5000 --sample-prompts 'it'"'"'s' 'a b'"""
    assert trained_words(job) == words
    for line in ("--nodes=2", "--gpus-per-node=4", "--time=0-02:00:00", "--partition=a"):
        assert f"#SBATCH {line}\n" in job
    assert "--max-restarts 5 " in job
    assert "runs/mine/recipe.toml" in job


def test_slurm_comes_with_this_machines_programs(launch: Any, folder: Path) -> None:
    launch("gpt2-124m", "--slurm")
    job = (folder / "gpt2-124m.sbatch").read_text()
    assert f'export PATH={Path(sys.executable).parent}:"$PATH"' in job
    launch("gpt2-124m", "--kubernetes")
    assert str(Path(sys.executable).parent) not in (folder / "gpt2-124m.kubernetes.yaml").read_text()


def test_a_recipe_file_is_named_where_it_is_seen_and_spelt_out_elsewhere(launch: Any, folder: Path) -> None:
    (folder / "mine.toml").write_text(
        '[schedule]\ntotal_steps = 900\n[model]\nn_layer = 3\n[data]\ndata = "data/fineweb-edu"\n'
    )
    launch("mine.toml", "--slurm", "--seed=5")
    assert trained_words((folder / "mine.sbatch").read_text()) == "mine.toml --seed 5"
    launch("mine.toml", "--skypilot", "--seed=5")
    words = trained_words((folder / "mine.skypilot.yaml").read_text())
    assert "mine.toml" not in words
    assert "--run-name mine " in words
    assert "--seed 5" in words
    assert "--n-layer 3" in words


def test_text_is_prepared_first_where_it_is_not_there(launch: Any, folder: Path) -> None:
    _, said = launch("gpt2-1558m", "--slurm")
    assert "next: overnight prepare fineweb-edu --subset sample-100BT && sbatch gpt2-1558m.sbatch" in said
    assert "fineweb-edu is not prepared" in (folder / "gpt2-1558m.sbatch").read_text()
    (folder / "data/fineweb-edu").mkdir(parents=True)
    (folder / "data/fineweb-edu/manifest.json").touch()
    _, said = launch("gpt2-1558m", "--slurm", "--out", "again")
    assert "next: sbatch again" in said


def test_a_run_that_need_not_wait_for_its_text_does_not(launch: Any, folder: Path) -> None:
    launch("gpt2-124m", "--slurm", "--shuffle-window", "100_000_000", "--evaluation-tokens", "1000")
    assert "is not prepared" not in (folder / "gpt2-124m.sbatch").read_text()


def test_a_machine_elsewhere_is_told_the_folder_of_what_only_this_one_has(launch: Any, folder: Path) -> None:
    (folder / "notes.txt").write_text("text")
    mine = ("gpt2-124m", "--data", "notes.txt", "--tokenizer", "bpe-300")
    launch("--kubernetes", *mine)
    job = (folder / "gpt2-124m.kubernetes.yaml").read_text()
    assert "--data data/notes-bpe-300" in trained_words(job)
    assert "overnight prepare" not in job
    launch("--sagemaker", *mine)
    told = yaml.safe_load((folder / "gpt2-124m.sagemaker.yaml").read_text())
    assert "--data" not in told["AlgorithmSpecification"]["ContainerArguments"]
    assert told["InputDataConfig"][0]["DataSource"]["S3DataSource"]["S3Uri"].endswith("/data/notes-bpe-300/")


@pytest.mark.parametrize(
    "words, sentence",
    [
        ([], "overnight launch needs a recipe"),
        (["--slurm"], "overnight launch needs a recipe"),
        (["--slurm", "gpt2-125m"], "there is no recipe gpt2-125m; did you mean"),
        (["gpt2-124m"], "needs one of --slurm, --skypilot, --sagemaker, --kubernetes"),
        (["--slurm", "--kubernetes", "gpt2-124m"], "one of --slurm and --kubernetes: give only one"),
        (["gpt2-124m", "--slrum"], "no option --slrum; did you mean slurm?"),
        (["gpt2-124m", "--slurm", "--nodes", "0"], "nodes=0 must be at least 1"),
        (["gpt2-124m", "--slurm", "--gpus-per-node=-1"], "gpus_per_node=-1 must be at least 0"),
        (["gpt2-124m", "--slurm", "--hours", "0.1"], "hours=0.1 must be at least 0.25"),
        (["gpt2-124m", "--slurm", "--hours", "inf"], "hours=inf"),
        (["gpt2-124m", "--slurm", "--processes", "8"], "processes=8 is for one machine"),
        (["gpt2-124m", "--slurm", "--n-head", "5"], "n_embd=768 does not divide among n_head=5"),
        (["gpt2-124m", "--kubernetes", "--role", "r"], "role is for --sagemaker: leave it out"),
        (["gpt2-124m", "--slurm", "--bucket", "b"], "bucket is for --skypilot and --sagemaker"),
        (["gpt2-124m", "--sagemaker", "--gpu", "T4"], "gpu=T4 is of no SageMaker instance that is known"),
        (["gpt2-124m", "--slurm", "--out", "."], ". is already there: move it, or give another --out"),
        (
            ["gpt2-124m", "--slurm", "--nodes", "3"],
            "is 512 micro-batches of 1 row, which 24 processes can't share equally: 16 can, or give "
            "tokens_per_step=516096",
        ),
        (
            ["gpt2-124m", "--slurm", "--nodes", "8", "--micro-batch-size", "16"],
            "tokens_per_step=524288 is 32 micro-batches of 16 rows, which 64 processes can't share equally: "
            "32 can, or give tokens_per_step=1048576",
        ),
        (
            ["gpt3-125m", "--slurm", "--nodes", "3"],
            "batch_ramp_start_tokens=32768 is 16 micro-batches of 1 row, which 24 processes can't share",
        ),
        (["gpt2-124m", "--slurm", "--tokens-per-step", "1000"], "tokens_per_step=1000 is not a whole number"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_use_is_one_sentence_and_no_file(
    words: list[str], sentence: str, launch: Any, folder: Path
) -> None:
    status, said = launch(*words)
    assert status == 2
    assert sentence in said
    assert len(said.splitlines()) == 1
    assert list(folder.iterdir()) == []


def test_the_tokens_that_are_proposed_are_taken(launch: Any) -> None:
    _, said = launch("gpt2-124m", "--slurm", "--nodes", "3")
    proposed = re.findall("tokens_per_step=([0-9]+)", said)[-1]
    assert launch("gpt2-124m", "--slurm", "--nodes", "3", "--tokens-per-step", proposed)[0] == 0


def test_a_file_that_is_there_stays(launch: Any, folder: Path) -> None:
    assert launch("gpt2-124m", "--slurm")[0] == 0
    before = (folder / "gpt2-124m.sbatch").read_text()
    status, said = launch("gpt2-124m", "--slurm", "--nodes", "2")
    assert status == 2
    assert "gpt2-124m.sbatch is already there: move it, or give another --out" in said
    assert (folder / "gpt2-124m.sbatch").read_text() == before


def test_what_it_was_written_by_writes_it_again(launch: Any, folder: Path) -> None:
    launch("gpt2-124m", "--slurm", "--nodes", "2", "--sample-prompts", "it's", "--hours=3")
    job = (folder / "gpt2-124m.sbatch").read_text()
    (command,) = re.findall("# Written by: (.*)", job)
    (folder / "gpt2-124m.sbatch").unlink()
    python = f"{sys.executable} -m {command}"
    subprocess.run(["bash", "-c", python], check=True, capture_output=True)
    assert (folder / "gpt2-124m.sbatch").read_text() == job
