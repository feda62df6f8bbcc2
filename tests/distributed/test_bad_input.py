"""What several processes can't do is one plain sentence, exit status 2, and nothing is written."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from overnight import cli
from overnight.config import to_toml

PREPARED = Path("text/shards")


@pytest.fixture
def folder(recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the command is typed: small.toml lies there."""
    (tmp_path / "small.toml").write_text(to_toml(recipe()))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check(folder: Path, status: int, said: str, sentence: str) -> None:
    """One plain line that holds the sentence; nothing is left of a run."""
    assert status == 2
    assert said.startswith("overnight: ")
    assert said.count("\n") == 1, said
    assert re.search(sentence, said), said
    assert not (folder / "runs").exists()


# ---------------------------------------------------------------- before any process is started


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--sharding", "fsdp"], "sharding=fsdp is for processes that were started together: give --proc"),
        (["--sharding", "zero1"], "sharding=zero1 is for processes that were started together"),
        (["--processes", "0"], "processes=0 must be at least 1"),
        (["--processes", "-2"], "processes=-2 must be at least 1"),
        (["--processes", "2", "--device", "cuda"], "device=cuda: this machine has none"),
        (["--processes", "2", "--device", "cuda:0"], "device=cuda:0: this machine has none"),
        (["--processes", "2", "--tokens-per-step", "0"], "tokens_per_step=0 must be at least 1"),
    ],
)
def test_what_is_refused_at_once(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    status = cli.main(["train", "small.toml", *words])
    check(folder, status, capsys.readouterr().err, sentence)


@pytest.mark.parametrize("words", [["--processes", "many"], ["--processes", "2", "--sharding", "zero3"]])
def test_what_can_t_be_read(folder: Path, capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    try:
        status = cli.main(["train", "small.toml", *words])
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    assert words[-1] in capsys.readouterr().err
    assert not (folder / "runs").exists()


# ---------------------------------------------------------------- by processes that a launcher has started


def refused(team: Any, folder: Path, *words: str, size: int = 2, **how: Any) -> str:
    """What is said of these words: by the first, and by all others nothing."""
    found = team("command", folder, ["train", "small.toml", *words], size=size, **how)
    (status, said), *others = found
    assert others == [(2, "")] * (size - 1), found
    check(folder, status, said, "")
    return str(said)


@pytest.mark.parametrize(
    "size, words, sentence",
    [
        (
            3,
            ["--deterministic-reduce", "--tokens-per-step", "1536"],
            "takes 1, 2, 4, 8, ... processes, not 3",
        ),
        (
            2,
            ["--deterministic-reduce", "--sharding", "fsdp"],
            "in torch's own way: choose sharding none or opt",
        ),
        (3, [], "the 16 rows of tokens_per_step=512 can't be divided among 3 processes; 480 and 576 can, or"),
        (2, ["--micro-batch-size", "16"], "=16 does not divide the 8 rows of each process"),
        (2, ["--precision", "fp16", "--sharding", "zero1"], "=fp16 scales gradients, .*: choose bf16"),
        (2, ["--data", "nowhere"], "nowhere"),
        (2, ["--context-length", "0", "--dropout", "2"], "context_length=0 .*; dropout=2.0"),
    ],
)
def test_what_all_refuse_together_is_said_once(
    team: Any, folder: Path, size: int, words: list[str], sentence: str
) -> None:
    assert re.search(sentence, refused(team, folder, *words, size=size))


@pytest.mark.parametrize(
    "one, other, sentence",
    [
        ([], ["--dropout", "0.2"], "agree: dropout is 0.2 in rank 1 and 0.1 in rank 0"),
        (["--seed", "5"], [], "agree: seed is 1337 in rank 1 and 5 in rank 0"),
        ([], ["--sharding", "zero1"], "agree: sharding is zero1 in rank 1 and none in rank 0"),
        ([], ["--n-embd", "32"], "agree: n_embd is 32 in rank 1 and 16 in rank 0"),
    ],
)
def test_processes_with_other_recipes_do_not_begin(
    team: Any, folder: Path, one: list[str], other: list[str], sentence: str
) -> None:
    each = [(["train", "small.toml", *words],) for words in (one, other)]
    (status, said), silent = team("command", folder, each=each, size=2)
    assert silent == (2, "")
    check(folder, status, said, sentence)


def test_processes_with_other_versions_do_not_begin(team: Any, folder: Path) -> None:
    words = ["train", "small.toml"]
    (status, said), silent = team("command", folder, words, each=[("0.1.0",), ("0.2.0",)], size=2)
    assert silent == (2, "")
    check(folder, status, said, "agree: overnight's version is 0.2.0 in rank 1 and 0.1.0 in rank 0")


def test_processes_with_other_data_do_not_begin(
    team: Any, folder: Path, text: Path, other_text: Path
) -> None:
    """Machines whose disks hold other shards under one name."""
    folders = []
    for name, shards in (("one", text), ("other", other_text)):
        place = folder / name
        place.mkdir()
        (place / "data").symlink_to(shards)
        (place / "small.toml").write_text((folder / "small.toml").read_text())
        folders.append(place)
    words = ["train", "small.toml", "--data", "data"]
    (status, said), silent = team("command", each=[(place, words) for place in folders], size=2)
    assert silent == (2, "")
    for place in folders:
        check(place, status, said, "the processes do not agree: .*the data is [0-9a-f]{12} in rank 1 and ")


def test_what_one_of_them_refuses_is_said_with_its_rank(team: Any, folder: Path) -> None:
    """A run with that name is there on the machine of one."""
    place = folder / "other"
    (place / "runs/small").mkdir(parents=True)
    for name in ("small.toml", "runs/small/recipe.toml"):
        (place / name).write_text((folder / "small.toml").read_text())
    words = ["train", "small.toml"]
    (status, said), silent = team("command", each=[(folder, words), (place, words)], size=2)
    assert silent == (2, "")
    check(folder, status, said, "^overnight: rank 1: runs/small already holds a run")


# ---------------------------------------------------------------- where they meet


@pytest.fixture
def busy_port() -> Iterator[int]:
    """Somebody else listens there."""
    with socket.create_server(("localhost", 0)) as server:
        yield server.getsockname()[1]


def test_a_port_in_use_is_said(team: Any, folder: Path, busy_port: int) -> None:
    """Of the first process, which opens it; a launcher then ends the others."""
    environment = {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": str(busy_port), "WORLD_SIZE": "2"}
    words = ["train", "small.toml", "--timeout-seconds", "5"]
    ((status, said),) = team("command", folder, words, size=1, environment=environment)
    sentence = f"can't meet at localhost:{busy_port} .*: if its port is in use, give the launcher another one"
    check(folder, status, said, sentence)
    assert "127.0.0.1" not in said or "EADDRINUSE" in said


@pytest.mark.parametrize(
    "environment, sentence",
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set and RANK is not: start with torchrun, or unset it"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE is set and LOCAL_RANK is not"),
    ],
)
def test_half_of_a_launcher_s_environment(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    sentence: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    status = cli.main(["train", "small.toml"])
    check(folder, status, capsys.readouterr().err, sentence)


def test_only_training_is_done_by_several(team: Any, folder: Path) -> None:
    for status, said in team("command", folder, ["generate", "runs/small"], size=2):
        assert status == 2
        assert said.count("\n") == 1


def test_what_can_be_trained_is(team: Any, folder: Path) -> None:
    """The negative control: nothing above is refused for another reason."""
    found = team("command", folder, ["train", "small.toml", "--total-steps", "5"], size=2)
    assert [status for status, _ in found] == [0, 0]
    assert (folder / "runs/small/recipe.toml").is_file()
