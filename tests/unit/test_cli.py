from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from overnight import cli
from overnight.cli import VERBS, main

HELP_SECONDS = 0.5
TRIES = 3


def overnight(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """The command as a user types it, in `folder`."""
    return subprocess.run(
        [sys.executable, "-m", "overnight", *words], cwd=folder, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("words", [["--help"], *([verb, "--help"] for verb in VERBS)], ids="-".join)
def test_help_is_instant_and_has_an_example(words: list[str], tmp_path: Path) -> None:
    """Counted in processor seconds of the child, the least of a few tries: a busy machine adds to them."""
    spent = []
    while not spent or (min(spent) >= HELP_SECONDS and len(spent) < TRIES):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        shown = overnight(*words, folder=tmp_path)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert shown.returncode == 0, shown.stderr
    assert "overnight " + (words[0] if len(words) > 1 else "quickstart") in shown.stdout
    assert all(len(line) <= 80 for line in shown.stdout.splitlines())
    assert min(spent) < HELP_SECONDS


def test_help_does_not_import_torch(tmp_path: Path) -> None:
    for verb in VERBS:
        script = (
            "import sys; from overnight.cli import main\n"
            f"try: main(['{verb}', '--help'])\n"
            "except SystemExit: pass\n"
            "sys.exit('torch' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, check=False)
        assert done.returncode == 0, verb


@pytest.mark.parametrize(
    "words, complaint",
    [
        (["quikstart"], "did you mean quickstart?"),
        (["train"], "needs a recipe"),
        (["train", "gpt2-125m"], "there is no recipe gpt2-125m; did you mean"),
        (["train", "mine.toml"], "there is no recipe file mine.toml"),
        (["train", "quickstart", "--n_layr=3"], "no option --n_layr; did you mean n-layer?"),
        (["train", "quickstart", "--n_layer=three"], "--n-layer"),
        (["train", "quickstart", "--n_head=3"], "n_embd=128 does not divide among n_head=3"),
        (["train", "quickstart", "--warmup_steps=9999"], "warmup_steps=9999 is longer"),
        (["train", "quickstart", "--device=gpu"], "device=gpu"),
        (["train", "quickstart", "--precision=fp8"], "precision"),
        (["train", "--resume"], "needs a run"),
        (["train", "--resume", "runs/nothing"], "there is no run runs/nothing"),
        (["prepare"], "name a source"),
        (["prepare", "no-such-folder"], "no-such-folder"),
        (["prepare", "python-docs", "--tokenizer=gpt3"], "gpt3"),
        (["prepare", "python-docs", "--validation-fraction=2"], "validation_fraction=2"),
        (["generate", "no-such-model", "Hello"], "there is no model no-such-model"),
        (["evaluate", "no-such-model"], "there is no model no-such-model"),
        (["evaluate", "."], "holds no model"),
        (["report", "no-such-run"], "no-such-run"),
        (["runs", "--folder", "nowhere"], "nowhere"),
        (["convert", "no-such-model"], "no-such-model"),
    ],
    ids=" ".join,
)
def test_wrong_use_is_one_plain_sentence(
    words: list[str],
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    said = capfd.readouterr().err
    assert complaint in said
    (sentence,) = [line for line in said.splitlines() if line.startswith("overnight: ")]
    assert complaint in sentence
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "data").exists()


def test_a_traceback_never_reaches_the_user_for_what_they_wrote(tmp_path: Path) -> None:
    done = overnight("train", "quickstart", "--n_layr=3", folder=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    "error, said",
    [
        (OSError(28, "No space left on device", "runs/x"), "No space left on device (runs/x); mend that"),
        (OSError("no reason given"), "no reason given; mend that"),
        (FloatingPointError("the logits are not finite"), "the logits are not finite"),
    ],
)
def test_what_fails_though_well_used_is_one_sentence_too(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(words: list[str]) -> int:
        raise error

    monkeypatch.setattr(cli, "_run", fail)
    assert main(["runs"]) == 1
    assert said in capsys.readouterr().err


def test_no_command_shows_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "quickstart" in capsys.readouterr().out


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a tiny run of the quickstart recipe was trained by the command."""
    folder = tmp_path_factory.mktemp("workplace")
    text = "\n\n".join(f"Paragraph {number} says that {number} is a number." for number in range(4000))
    (folder / "notes.txt").write_text(text)
    tiny = ["--n_layer=1", "--n-head", "2", "--n_embd=16", "--context_length=32", "--tokens_per_step=128"]
    done = overnight(
        *["train", "quickstart", "--run_name=tiny", "--data=notes.txt", "--tokenizer=bpe-300"],
        *[*tiny, "--total_steps=4", "--warmup_steps=1", "--validation_fraction=0.3", "--sample_tokens=8"],
        folder=folder,
    )
    assert done.returncode == 0, done.stderr
    assert "next: overnight report runs/tiny" in done.stderr
    return folder


def test_a_run_can_be_continued_with_its_length_changed(workplace: Path) -> None:
    done = overnight("train", "--resume", "runs/tiny", "--total_steps=6", folder=workplace)
    assert done.returncode == 0, done.stderr
    lines = (workplace / "runs/tiny/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_total_tokens_may_be_given_instead_of_the_recipes_total_steps(workplace: Path) -> None:
    done = overnight("train", "--resume", "tiny", f"--total-tokens={7 * 128}", folder=workplace)
    assert done.returncode == 0, done.stderr
    assert "7 steps" in done.stderr


def test_total_steps_may_be_given_instead_of_the_recipes_total_tokens(tmp_path: Path) -> None:
    options = ("--total-steps", "500_000", "--device-type", "h200", "--json", "--vocab-size", "50257")
    done = overnight("plan", "gpt3-125m", *options, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["total_steps"] == 500_000
    both = overnight("plan", "gpt3-125m", *options, "--total-tokens", "300000000000", folder=tmp_path)
    assert both.returncode == 2
    assert "only one of total_steps and total_tokens" in both.stderr


def test_a_run_does_not_change_its_science_on_resuming(workplace: Path) -> None:
    done = overnight("train", "--resume=runs/tiny", "--n_layer=2", folder=workplace)
    assert done.returncode == 2
    assert "n_layer=2 (was 1)" in done.stderr


def test_a_model_is_evaluated(workplace: Path) -> None:
    done = overnight("evaluate", "runs/tiny", "--json", folder=workplace)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["bits_per_byte"] > 0
    assert f"nats_per_token         {result['loss']:.4f}" in done.stderr
    events = (workplace / "runs/tiny/events/evaluations.jsonl").read_text().splitlines()
    assert json.loads(events[-1])["loss"] == pytest.approx(result["loss"], rel=1e-6)


def test_a_model_begins_with_another_models_weights(workplace: Path) -> None:
    prepared = "data/notes-bpe-300"
    same = ["--data", prepared, "--run_name=tuned", "--tokens_per_step=128"]
    tune = ["--total_steps=2", "--sample_every_steps=None", "--compile=False"]
    done = overnight("train", "shakespeare-finetune", "--from", "runs/tiny", *same, *tune, folder=workplace)
    assert done.returncode == 0, done.stderr
    first = json.loads((workplace / "runs/tuned/metrics.jsonl").read_text().splitlines()[0])
    fresh = json.loads((workplace / "runs/tiny/metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] < fresh["loss"] - 0.005


def test_an_interrupted_run_is_saved_and_exits_with_130(workplace: Path) -> None:
    import signal

    words = [
        "train",
        "quickstart",
        "--data=data/notes-bpe-300",
        "--run_name=long",
        "--n_layer=1",
        "--n_embd=16",
    ]
    rest = ["--context_length=32", "--tokens_per_step=128", "--total_steps=100000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "overnight", *words, *rest], cwd=workplace, stderr=subprocess.PIPE, text=True
    )
    metrics = workplace / "runs/long/metrics.jsonl"
    for _ in range(600):
        if metrics.is_file() and metrics.stat().st_size:
            break
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "next: overnight train --resume runs/long" in said
    saved = max((workplace / "runs/long/checkpoints").iterdir()).name
    assert int(saved.removeprefix("step-")) == len(metrics.read_text().splitlines())
