"""The command line: help, exit statuses, wrong use, and the commands around one tiny run."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import pty
import re
import resource
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from overnight import cli
from overnight.cli import COMMANDS, RENAMED_COMMANDS, _read_recipe, main
from overnight.recipe import Recipe

HELP_SECONDS, TRIES = 0.5, 3
HELP = """
import sys
from overnight.cli import main
try:
    main(sys.argv[1:])
finally:
    if "torch" in sys.modules:
        sys.exit("torch was imported")
"""
TINY = ["--n_layer=1", "--n_head", "2", "--n_embd=16", "--context_length=32", "--tokens_per_step=128"]


@pytest.mark.parametrize("words", [["--help"], *([name, "--help"] for name in COMMANDS)], ids="-".join)
def test_help_is_instant_and_has_an_example(words, tmp_path):
    """Processor seconds of the child, the least of a few tries: a busy machine adds to them."""
    spent = []
    while not spent or (min(spent) >= HELP_SECONDS and len(spent) < TRIES):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-c", HELP, *words]
        shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert shown.returncode == 0, shown.stderr
    assert "overnight " + (words[0] if len(words) > 1 else "quickstart") in shown.stdout
    assert all(len(line) <= 80 for line in shown.stdout.splitlines())
    assert min(spent) < HELP_SECONDS


def broken_twice(shown, columns):
    """The lines of a help text after which a line begins, though its first word has room on them."""
    texts = [re.sub("^│(.*)│$", r"\1", line).rstrip() for line in shown.splitlines()]
    found = []
    for line, following in itertools.pairwise(texts):
        indent = len(following) - len(following.lstrip())
        continues = (
            indent >= 10 and not line[indent - 2 : indent].strip() and line[indent : indent + 1].strip()
        )
        if continues and len(line) + 1 + len(following.split()[0]) <= columns - 3:
            found.append(line)
    return found


@pytest.mark.parametrize("columns", [80, 100])
def test_no_line_of_help_is_broken_twice(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    for name in COMMANDS:
        with pytest.raises(SystemExit, match="0"):
            main([name, "--help"])
        shown = capsys.readouterr().out
        assert broken_twice(shown, columns) == []
    broken = "│                     the same, but          │\n│                     attention stays within │"
    assert broken_twice(broken, 80), "the negative control"


@pytest.mark.parametrize(
    "words, named",
    [
        (["quikstart"], "quickstart"),
        (["train", "quickstart", "--n_head=3"], "n_head=3"),
        (["train", "quickstart", "--warmup_steps=9999"], "warmup_steps=9999"),
        (["train", "quickstart", "--device=gpu"], "device=gpu"),
        (["prepare", "python-docs", "--tokenizer=gpt3"], "gpt3"),
        (["evaluate", "."], "no model"),
        (["runs", "--folder", "nowhere"], "nowhere"),
        (["runs", "a\nb\x1b[2J\u2028"], r"a\nb\x1b[2J\u2028 does not exist"),
        (["launch", "quickstart", "--slurm", "--gpus-per-node=1", "--out", "a\0b"], "a NUL character"),
    ],
    ids=" ".join,
)
def test_wrong_use_is_one_sentence_and_writes_nothing(words, named, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    (sentence,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("overnight: ")]
    assert named in sentence
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error, status, named",
    [
        (OSError(28, "No space left on device", "runs/x"), 1, "No space left on device (runs/x)"),
        (OSError("no reason given"), 1, "no reason given"),
        (FloatingPointError("the logits are not finite"), 1, "the logits are not finite"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_failure_is_one_sentence(error, status, named, monkeypatch, capsys):
    def fail(words):
        raise error

    monkeypatch.setattr(cli, "_run", fail)
    assert main(["runs"]) == status
    (sentence,) = capsys.readouterr().err.splitlines()
    assert named in sentence


def test_refusal_has_no_colours_on_a_terminal(monkeypatch, capsys):
    """The parser colours its messages there."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert main(["train", "quickstart", "--compile"]) == 2
    assert capsys.readouterr().err.startswith("overnight: Missing value for argument '--compile'.")


def test_no_command_or_an_old_name_lists_the_commands(capsys):
    assert main([]) == 2
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)
    for old, new in RENAMED_COMMANDS.items():
        assert main([old, "--no-such-option"]) == 2
        assert f"overnight {new}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "recipe, length, steps",
    [("gpt3-125m", "--total-steps=600_000", 600_000), ("quickstart", "--total-tokens=512_000", 250)],
)
def test_length_may_be_given_in_steps_or_in_tokens(recipe, length, steps, tmp_path, monkeypatch, capsys):
    """Either replaces the recipe's own, which is the other; both together are refused."""
    monkeypatch.chdir(tmp_path)
    words = ["plan", recipe, "--device-type", "h200", "--json", "--vocab-size", "50257"]
    assert main([*words, length]) == 0
    assert json.loads(capsys.readouterr().out)["total_steps"] == steps
    assert main([*words, "--total-steps=5", "--total-tokens=7"]) == 2
    assert "total_steps and total_tokens" in capsys.readouterr().err


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder in which a tiny run of the quickstart recipe was trained by the command."""
    folder = tmp_path_factory.mktemp("workplace")
    text = "\n\n".join(f"Paragraph {number} says that {number} is a number." for number in range(4000))
    (folder / "notes.txt").write_text(text)
    words = [
        *["train", "quickstart", "--run_name=tiny", "--data=notes.txt", "--tokenizer=bpe-300", *TINY],
        *["--total_steps=4", "--warmup_steps=1", "--validation_fraction=0.3", "--sample_tokens=8"],
    ]
    command = [sys.executable, "-m", "overnight", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "next: overnight report runs/tiny" in done.stderr
    return folder


@pytest.fixture
def in_workplace(workplace, monkeypatch):
    """The folder of the tiny run, as the current one."""
    monkeypatch.chdir(workplace)
    return workplace


@pytest.mark.parametrize(
    "words, prompts",
    [
        (["quickstart"], ("The value of",)),
        (["quickstart", "--data", "notes.txt"], ("",)),
        (["quickstart", "--data", "notes.txt", "--sample-prompts", "My"], ("My",)),
        (["shakespeare-char", "--data=notes.txt"], ("\n",)),
    ],
)
def test_prompt_of_a_recipe_is_for_its_own_text(words, prompts):
    assert _read_recipe("train", Recipe, words)[1].samples.sample_prompts == prompts


def read_lines(path: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.mark.usefixtures("in_workplace")
def test_run_is_continued_with_another_length(capsys):
    assert main(["train", "--resume", "runs/tiny", "--total_steps=6"]) == 0
    assert [line["step"] for line in read_lines("runs/tiny/metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert main(["train", "--resume", "tiny", f"--total-tokens={7 * 128}"]) == 0
    assert [line["step"] for line in read_lines("runs/tiny/metrics.jsonl")] == [1, 2, 3, 4, 5, 6, 7]
    capsys.readouterr()
    assert main(["train", "--resume=runs/tiny", "--n_layer=2"]) == 2
    assert "n_layer=2 (was 1)" in capsys.readouterr().err


@pytest.mark.usefixtures("in_workplace")
def test_run_begins_with_another_model_s_weights():
    words = ["train", "shakespeare-finetune", "--from", "runs/tiny", "--data", "data/notes-bpe-300"]
    tune = ["--run_name=tuned", "--tokens_per_step=128", "--total_steps=2", "--compile=False"]
    assert main([*words, *tune, "--sample_every_steps=None"]) == 0
    tuned, fresh = (read_lines(f"runs/{name}/metrics.jsonl")[0]["loss"] for name in ("tuned", "tiny"))
    assert tuned < fresh - 0.005


def test_interrupted_run_is_saved_and_exits_with_130(workplace):
    words = ["train", "quickstart", "--data=data/notes-bpe-300", "--run_name=long", *TINY]
    process = subprocess.Popen(
        [sys.executable, "-m", "overnight", *words, "--total_steps=100000"],
        cwd=workplace,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = workplace / "runs/long/metrics.jsonl"
    while process.poll() is None and not (metrics.is_file() and metrics.stat().st_size):
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert "overnight train --resume runs/long" in stderr
    saved = max((workplace / "runs/long/checkpoints").iterdir()).name
    assert int(saved.removeprefix("step-")) == len(metrics.read_text().splitlines())


def run_in_terminal(words, folder, interrupt_after=None):
    """Exit status and lines of a command in a terminal of 80 columns; Ctrl-C is typed after a text."""
    control, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", IN_TERMINAL, *words],
        cwd=folder,
        env={name: value for name, value in os.environ.items() if name not in {"COLUMNS", "NO_COLOR"}}
        | {"TERM": "xterm"},
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    )
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # the command has ended
        while read := os.read(control, 65536):
            shown += read
            if interrupt_after and interrupt_after in shown:
                os.write(control, b"\x03")
                interrupt_after = None
    os.close(control)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    return process.wait(), re.split(r"[\r\n]+", plain)


IN_TERMINAL = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from overnight.cli import run_command
run_command()
"""


def test_commands_in_a_terminal(workplace):
    """The bar, Ctrl-C, the list of runs and the help: no line is wider, and no bar is broken."""
    long = ["--run_name=seen", "--total_steps=100000", "--tokens_per_step=65536", "--precision=fp32"]
    words = ["train", "quickstart", "--data=data/notes-bpe-300", *TINY, *long]
    status, lines = run_in_terminal(words, workplace, b"time left unknown step 1 of 100,000")
    assert status == 130, lines
    asked = lines.index(next(line for line in lines if "finishing the step; Ctrl-C again stops now" in line))
    later = [line for line in lines[asked:] if "stopped and saved after step" in line]
    assert later, "the answer comes before the step has ended"
    bars = [line for line in lines if line.startswith("train ") and "0%" in line]
    assert all(re.search("0% (time left unknown|.* left) step 1 of 100,000", bar) for bar in bars[2:]), bars
    for command in (["runs"], ["--help"], ["train", "--help"]):
        status, listed = run_in_terminal(command, workplace)
        assert status == 0
        lines += listed
    assert "overnight train --resume runs/seen" in " ".join(lines)
    assert [line for line in lines if len(line.rstrip()) > 80] == []
