"""What several processes can't do is one sentence that names it, exit status 2, and nothing is written."""

from __future__ import annotations

import dataclasses
import re
import shutil
import socket
from pathlib import Path

import pytest

from overnight import cli
from overnight.data.shards import read_manifest, write_manifest

TRAIN = ["train", "small.toml"]


@pytest.fixture
def folder(folder, monkeypatch):
    """The current folder; small.toml is in it."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(folder)
    return folder


def check(folder: Path, status: int, message: str, named: str) -> None:
    """One line that names the setting or file; no run was begun."""
    assert status == 2
    assert message.startswith("overnight: ")
    assert message.count("\n") == 1, message
    assert re.search(named, message), message
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    "words, named",
    [
        (["--sharding", "fsdp"], "sharding=fsdp.*--processes"),
        (["--processes", "0"], "processes=0"),
        (["--processes", "2", "--device", "cuda"], "device=cuda"),
        (["--processes", "2", "--tokens-per-step", "0"], "tokens_per_step=0"),
    ],
)
def test_refused_before_start(folder, capsys, words, named):
    check(folder, cli.main([*TRAIN, *words]), capsys.readouterr().err, named)


@pytest.mark.parametrize("missing", ["RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"])
def test_incomplete_launcher_environment(folder, capsys, monkeypatch, missing):
    for name in {"WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"} - {missing}:
        monkeypatch.setenv(name, "2" if name == "WORLD_SIZE" else "1")
    check(folder, cli.main(TRAIN), capsys.readouterr().err, f"{missing} is not set, .*torchrun")


# In processes that a launcher has started


@pytest.mark.parametrize(
    "size, words, named",
    [
        (3, ["--deterministic-reduce", "--tokens-per-step", "1536"], "1, 2, 4, 8, .* 3"),
        (2, ["--deterministic-reduce", "--sharding", "fsdp"], "sharding"),
        (3, [], "tokens_per_step=512 .* 3 processes.*480 .*576"),
        (2, ["--micro-batch-size", "16"], "micro_batch_size=16"),
        (2, ["--precision", "fp16", "--sharding", "zero1"], "=fp16 .*bf16"),
        (2, ["--optimizer", "muon", "--sharding", "fsdp"], "muon .*sharding=fsdp .*none or zero1"),
        (2, ["--optimizer", "muon", "--sharding", "hsdp"], "muon .*sharding=hsdp .*none or zero1"),
        (2, ["--optimizer", "muon", "--precision", "fp16"], "muon .*precision=fp16.*bf16"),
    ],
)
def test_refused_by_all_is_printed_once(team, folder, size, words, named):
    (status, message), *others = team("command", folder, [*TRAIN, *words], size=size)
    assert others == [(2, "")] * (size - 1)
    check(folder, status, message, named)


@pytest.mark.parametrize(
    "first, second, named",
    [
        ([TRAIN], [[*TRAIN, "--dropout", "0.2"]], "dropout is 0.2 in rank 1 and 0.1 in rank 0"),
        ([TRAIN, "0.1.0"], [TRAIN, "0.2.0"], "version is 0.2.0 in rank 1 and 0.1.0 in rank 0"),
    ],
)
def test_different_recipes_or_versions(team, folder, first, second, named):
    (status, message), silent = team("command", folder, each=[first, second], size=2)
    assert silent == (2, "")
    check(folder, status, message, named)


def test_different_data(team, folder, text):
    """Machines whose disks hold different shards under one name."""
    places = [folder / "one", folder / "other"]
    for place in places:
        shutil.copytree(text, place / "data")
        shutil.copy(folder / "small.toml", place)
    other = places[1] / "data"
    write_manifest(other, dataclasses.replace(read_manifest(other), source="another"))
    each = [(place, [*TRAIN, "--data", "data"]) for place in places]
    (status, message), silent = team("command", each=each, size=2)
    assert silent == (2, "")
    for place in places:
        check(place, status, message, "data is [0-9a-f]{12} in rank 1")


def test_refused_by_one_names_its_rank(team, folder):
    """The run exists on the machine of one process."""
    (folder / "other/runs/small").mkdir(parents=True)
    for name in ("small.toml", "runs/small/recipe.toml"):
        shutil.copy(folder / "small.toml", folder / "other" / name)
    (status, message), silent = team("command", each=[(folder, TRAIN), (folder / "other", TRAIN)], size=2)
    assert silent == (2, "")
    check(folder, status, message, "rank 1: runs/small ")


def test_port_in_use(team, folder):
    with socket.create_server(("localhost", 0)) as server:
        port = str(server.getsockname()[1])
        environment = {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": port, "WORLD_SIZE": "2"}
        words = [*TRAIN, "--timeout-seconds", "5"]
        ((status, message),) = team("command", folder, words, size=1, environment=environment)
    check(folder, status, message, f"localhost:{port}")


def test_other_commands_refuse_several_processes(team, folder):
    for status, message in team("command", folder, ["generate", "runs/small"], size=2):
        assert status == 2
        assert message.count("\n") == 1


def test_sound_command_is_not_refused(team, folder):
    """Negative control: nothing above is refused for another reason."""
    found = team("command", folder, [*TRAIN, "--total-steps", "5"], size=2)
    assert [status for status, _ in found] == [0, 0]
    assert (folder / "runs/small/recipe.toml").is_file()
