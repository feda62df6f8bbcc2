"""A run continues in any number of processes with any sharding; all refuse what is damaged."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from overnight.recipe import with_settings
from overnight.run.resume import load_resumed
from overnight.run_directory import RunDirectory

Train = Callable[..., Any]
distributed = pytest.mark.distributed  # not in a plain run
ALL = [*((size, 1, sharding) for size in (1, 2, 4) for sharding in ("none", "zero1", "fsdp")), (4, 2, "hsdp")]
SAVERS = [(1, 1, "none"), (2, 1, "zero1"), (2, 1, "fsdp"), (4, 2, "hsdp")]
LOADERS = [(1, 1, "none"), (2, 1, "fsdp")]
FILES = [
    *(f"{kind}-0000{rank}-of-00002.safetensors" for kind in ("model", "optimizer") for rank in (0, 1)),
    *("state.json", "MANIFEST.json"),
]


@pytest.mark.parametrize(
    "savers, loaders", [(SAVERS, LOADERS), pytest.param(ALL, ALL, marks=distributed)], ids=["some", "all"]
)
def test_checkpoint_loads_in_any_team(trained, team, recipe, contents, tmp_path, savers, loaders):
    """Loaded by another team and saved again, it has not changed."""
    checkpoints = [
        trained(size, machines=machines, sharding=sharding).newest for size, machines, sharding in savers
    ]
    for size, machines, sharding in loaders:
        folder = tmp_path / f"{size}-{machines}-{sharding}"
        given = (recipe(sharding=sharding), checkpoints, folder)
        team("save_again", *given, size=size, machines=machines)
        for number, checkpoint in enumerate(checkpoints):
            (again,) = (folder / str(number)).iterdir()
            assert again.name == checkpoint.name == "step-00000020"
            assert len(list(again.glob("model*.safetensors"))) == size
            assert contents(again) == contents(checkpoint)


def test_comparison_sees_one_bit(trained, contents):
    """Negative control."""
    saved = contents(trained(2, sharding="zero1").newest)
    assert len([name for name in saved if "weight" in name or "bias" in name]) > 50
    assert saved["step"] == saved["updates"] == 20
    assert saved != contents(trained(1, sharding="none").newest), "rounded otherwise"


def train_in_turn(team: Any, recipe: Any, path: Path, chain: list[tuple[int, str]], steps: int) -> list[Any]:
    """A run that each team continues for `steps` steps, the last to its end; every batch read."""
    ledger: list[Any] = []
    for number, (size, sharding) in enumerate(chain, start=1):
        continued = with_settings(load_resumed(path) if number > 1 else recipe, sharding=sharding)
        stop = steps if number < len(chain) else None
        read = team("train", continued, path, stop, 3, number > 1, size=size)
        ledger += sorted(itertools.chain(*read), key=lambda batch: batch[0])
    return ledger


@pytest.mark.parametrize(
    "chain",
    [
        [(1, "none"), (2, "zero1"), (4, "none"), (1, "none")],
        pytest.param([(4, "zero1"), (1, "none"), (2, "none"), (4, "none")], marks=distributed),
        pytest.param([(2, "none"), (4, "zero1"), (2, "zero1"), (1, "zero1")], marks=distributed),
    ],
)
def test_run_in_changing_teams_is_the_same_run(trained, team, recipe, record, tmp_path, chain):
    alone = trained(1, sharding="none", deterministic_reduce=True)
    begun = recipe(deterministic_reduce=True)
    assert train_in_turn(team, begun, tmp_path / "run", chain, steps=5) == alone.ledger()
    assert record(tmp_path / "run") == alone.record()


@distributed
def test_sharded_run_in_changing_teams(trained, team, recipe, tmp_path):
    alone = trained(1, sharding="none")
    chain = [(2, "fsdp"), (4, "fsdp"), (1, "none"), (4, "zero1"), (2, "hsdp")]
    assert train_in_turn(team, recipe(), tmp_path / "run", chain, steps=4) == alone.ledger()
    losses = [line["loss"] for line in RunDirectory(tmp_path / "run").read_metrics()]
    assert losses == pytest.approx(alone.losses(), rel=1e-6, abs=0)


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("size", [2, pytest.param(1, marks=distributed), pytest.param(4, marks=distributed)])
def test_all_fall_back_from_damaged_checkpoint(trained, team, recipe, tmp_path, size):
    saved = trained(2, sharding="fsdp").directory.checkpoints
    folders = []
    for damage in (flip_bit, Path.unlink):
        for name in FILES:
            shutil.copytree(saved, folder := tmp_path / f"{damage.__name__}-{name}")
            damage(folder / "step-00000020" / name)
            folders.append(folder)
    shutil.copytree(saved, sound := tmp_path / "sound")
    shutil.copytree(folders[0], hopeless := tmp_path / "hopeless")
    (hopeless / "step-00000015" / FILES[3]).unlink()
    found = team("load_newest", recipe(sharding="fsdp"), [*folders, sound, hopeless], size=size)
    assert all(each == found[0] for each in found), "all processes do the same"
    *fallen, whole, none = found[0]
    for folder, (step, message) in zip(folders, fallen, strict=True):
        assert step == 15
        assert message.count("\n") == 0
        assert f"{folder}/step-00000020" in message
    assert whole == (20, "")
    assert none[0] == -1
