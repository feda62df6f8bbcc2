"""What a run records of its environment."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

from overnight.run import environment
from overnight.run.environment import describe_environment
from overnight.training import Compute

CPU = Compute(device="cpu", precision="fp32", compile=False, attention="fused", loss="full")


def commit_all(folder: Path, *names: str) -> str:
    """A repository in `folder` whose only commit has these files; returns the commit."""
    folder.mkdir()
    for name in names:
        (folder / name).write_text(str(folder))
    variables = {f"GIT_{who}_{what}": "x" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}

    def git(*words: str) -> str:
        answer = subprocess.run(
            ["git", *words],
            cwd=folder,
            env=os.environ | variables | {"GIT_CONFIG_GLOBAL": os.devnull},
            capture_output=True,
            text=True,
            check=True,
        )
        return answer.stdout.strip()

    git("init")
    git("add", ".")
    git("commit", "-m", "all")
    return git("rev-parse", "HEAD")


def test_commit_is_that_of_the_package_not_of_the_current_folder(tmp_path, monkeypatch):
    ours = commit_all(tmp_path / "ours", "environment.py")
    theirs = commit_all(tmp_path / "theirs", "notes.txt", ".gitignore")
    monkeypatch.chdir(tmp_path / "theirs")
    assert environment._git_commit(tmp_path / "ours" / "environment.py") == ours != theirs


def test_package_installed_in_another_repository_has_no_commit(tmp_path, monkeypatch):
    commit_all(tmp_path / "theirs", "notes.txt")
    installed = tmp_path / "theirs" / "site-packages" / "environment.py"
    installed.parent.mkdir()
    installed.touch()
    assert environment._git_commit(installed) is None
    assert environment._git_commit(tmp_path / "environment.py") is None  # no repository at all
    monkeypatch.setenv("PATH", "")
    assert environment._git_commit(tmp_path / "theirs" / "notes.txt") is None  # no git


def test_recorded_command_can_be_typed_again(monkeypatch):
    words = ["train", "my recipes/night.toml", "--sample-prompts", "The value of", "it's"]
    monkeypatch.setattr(sys, "argv", ["/bin/overnight", *words])
    assert shlex.split(describe_environment(CPU, 1, {})["command"]) == ["overnight", *words]


def test_resumed_run_keeps_its_first_environment(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["overnight", "train", "quickstart"])
    first = {**describe_environment(CPU, 7, {}), "started_at": "2026-11-20T22:14:03+0000", "torch": "2.9.0"}
    monkeypatch.setattr(sys, "argv", ["overnight", "train", "--resume", "runs/quickstart"])
    second = describe_environment(CPU, 7, {}, first)
    third = describe_environment(CPU, 7, {}, second)
    assert {name: fact for name, fact in third.items() if name != "resumed"} == first
    assert third["resumed"][:1] == second["resumed"]
    for start in third["resumed"]:
        assert list(start) == [
            "torch",
            "command",
            "working_directory",
            "started_at",
        ]  # the other facts are as they were
        assert start["torch"] != "2.9.0"
        assert start["command"] == "overnight train --resume runs/quickstart"
        assert start["started_at"] > first["started_at"]
