"""A run goes on in any number of processes, whatever they divide; what is damaged is refused by all."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from overnight.run_directory import RunDirectory
from overnight.training.checkpoint.format import TensorFiles
from overnight.training.checkpoint.load import read_model

Train = Callable[..., Any]
ROWS_JUDGED = 3  # at once: the runs are those that other tests here compare

distributed = pytest.mark.distributed  # not in a plain run
ALL = [
    *((size, 1, sharding) for size in (1, 2, 4) for sharding in ("none", "zero1", "fsdp")),
    (4, 2, "hsdp"),
]
SAVERS = [(1, 1, "none"), (2, 1, "zero1"), (2, 1, "fsdp"), (4, 2, "hsdp")]
LOADERS = [(1, 1, "none"), (2, 1, "fsdp")]


def contents(checkpoint: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Every weight and moment of a checkpoint, whole, and what its state.json says of the state."""
    about = json.loads((checkpoint / "state.json").read_text())
    tensors = dict(read_model(checkpoint).weights())
    moments = TensorFiles(sorted(checkpoint.glob("optimizer*.safetensors")))
    for name, shape in moments.shapes.items():
        tensors[name] = torch.full(shape, float("nan"))
        moments.read(name, tensors[name])
    return tensors, {key: value for key, value in about.items() if key not in {"files", "settings"}}


def differences(one: Path, other: Path) -> list[str]:
    """The names of what is not the same to the bit."""
    (tensors, about), (theirs, theirs_about) = contents(one), contents(other)
    names = sorted({*tensors, *theirs})
    found = [
        name
        for name in names
        if name not in tensors or name not in theirs or not torch.equal(tensors[name], theirs[name])
    ]
    return found + ([] if about == theirs_about else ["state.json"])


def check_pairs(
    checkpoints: list[Path], loaders: list[tuple[int, int, str]], team: Any, recipe: Any, place: Path
) -> None:
    """Each checkpoint, loaded by each team and saved again, has not changed."""
    for size, machines, sharding in loaders:
        folder = place / f"{size}-{machines}-{sharding}"
        how = recipe(sharding=sharding)
        team("save_again", how, checkpoints, folder, size=size, machines=machines)
        for number, checkpoint in enumerate(checkpoints):
            (again,) = (folder / str(number)).iterdir()
            assert again.name == checkpoint.name == "step-00000020"
            assert len(list(again.glob("model*.safetensors"))) == size
            assert differences(checkpoint, again) == []


# ---------------------------------------------------------------- what is loaded


def test_what_one_team_saves_another_loads(trained: Train, team: Any, recipe: Any, tmp_path: Path) -> None:
    saved = [
        trained(size, machines=machines, sharding=sharding, rows_judged=ROWS_JUDGED).newest
        for size, machines, sharding in SAVERS
    ]
    check_pairs(saved, LOADERS, team, recipe, tmp_path)


@distributed
def test_what_any_team_saves_every_team_loads(trained: Train, team: Any, recipe: Any, tmp_path: Path) -> None:
    """1, 2 and 4 processes to 1, 2 and 4, each sharding to each."""
    saved = [
        trained(size, machines=machines, sharding=sharding, rows_judged=ROWS_JUDGED).newest
        for size, machines, sharding in ALL
    ]
    check_pairs(saved, ALL, team, recipe, tmp_path)


def test_the_comparison_sees_one_bit(trained: Train, tmp_path: Path) -> None:
    """The negative control."""
    saved = trained(2, sharding="zero1", rows_judged=ROWS_JUDGED).newest
    tensors, about = contents(saved)
    assert len(tensors) == 3 * len(read_model(saved).weights())
    assert about["step"] == about["updates"] == 20
    assert all(tensor.isfinite().all() and tensor.any() for tensor in tensors.values())
    assert differences(saved, trained(1, sharding="none", rows_judged=ROWS_JUDGED).newest) != [], (
        "rounded otherwise"
    )
    assert differences(saved, saved) == []


# ---------------------------------------------------------------- what goes on


def hand_on(team: Any, recipe: Any, path: Path, chain: list[tuple[int, str]], steps: int) -> list[Any]:
    """A run in which one team follows another, each after so many steps; every batch that was trained on."""
    ledger: list[Any] = []
    for number, (size, sharding) in enumerate(chain, start=1):
        stop = steps if number < len(chain) else None
        if number == 1:
            asked = team("train", recipe, path, stop, size=size)
        else:
            asked = team("go_on", path, stop, {"sharding": sharding}, size=size)
        ledger += sorted(itertools.chain(*asked), key=lambda batch: batch[0])
    return ledger


@pytest.mark.parametrize(
    "chain",
    [
        [(1, "none"), (2, "zero1"), (4, "none"), (1, "none")],
        pytest.param([(4, "zero1"), (1, "none"), (2, "none"), (4, "none")], marks=distributed),
        pytest.param([(2, "none"), (4, "zero1"), (2, "zero1"), (1, "zero1")], marks=distributed),
    ],
)
def test_a_run_that_is_handed_on_ends_as_if_undisturbed(
    trained: Train, team: Any, recipe: Any, tmp_path: Path, chain: list[tuple[int, str]]
) -> None:
    alone = trained(1, sharding="none", deterministic_reduce=True)
    begun = recipe(sharding=chain[0][1], deterministic_reduce=True)
    ledger = hand_on(team, begun, tmp_path / "run", chain, steps=5)
    directory = RunDirectory(tmp_path / "run")
    assert ledger == alone.ledger()
    assert differences(max(directory.checkpoints.iterdir()), alone.newest) == []
    assert [line["loss"] for line in directory.read_metrics()] == alone.losses()
    for kind in ("evaluations", "samples"):
        assert directory.read_events(kind) == alone.directory.read_events(kind)


@distributed
def test_shards_are_handed_on_as_well(trained: Train, team: Any, recipe: Any, tmp_path: Path) -> None:
    alone = trained(1, sharding="none", rows_judged=ROWS_JUDGED)
    chain = [(2, "fsdp"), (4, "fsdp"), (1, "none"), (4, "zero1"), (2, "hsdp")]
    ledger = hand_on(team, recipe(sharding="fsdp"), tmp_path / "run", chain, steps=4)
    losses = [line["loss"] for line in RunDirectory(tmp_path / "run").read_metrics()]
    assert ledger == alone.ledger()
    assert losses == pytest.approx(alone.losses(), rel=1e-6, abs=0)


# ---------------------------------------------------------------- what is damaged

FILES = [
    *(f"{kind}-0000{rank}-of-00002.safetensors" for kind in ("model", "optimizer") for rank in (0, 1)),
    "state.json",
    "MANIFEST.json",
]


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("size", [2, pytest.param(1, marks=distributed), pytest.param(4, marks=distributed)])
def test_damage_is_refused_by_all_and_they_fall_back_together(
    trained: Train, team: Any, recipe: Any, tmp_path: Path, size: int
) -> None:
    saved = trained(2, sharding="fsdp", rows_judged=ROWS_JUDGED).directory.checkpoints
    folders, damages = [], [flip_a_bit, Path.unlink]
    for damage in damages:
        for name in FILES:
            folder = tmp_path / f"{damage.__name__}-{name}"
            shutil.copytree(saved, folder)
            damage(folder / "step-00000020" / name)
            folders.append(folder)
    shutil.copytree(saved, sound := tmp_path / "sound")
    shutil.copytree(folders[0], hopeless := tmp_path / "hopeless")
    (hopeless / "step-00000015" / FILES[3]).unlink()
    found = team("load_newest", recipe(sharding="fsdp"), [*folders, sound, hopeless], size=size)
    assert all(told == found[0] for told in found), "each says the same"
    *fallen, whole, none = found[0]
    assert [step for step, _ in fallen] == [15] * len(folders)
    for folder, (_, said) in zip(folders, fallen, strict=True):
        assert said.count("\n") == 0
        assert f"checkpoint {folder}/step-00000020 is " in said
        assert "trying the one before it" in said
    assert whole == (20, "")
    assert none[0] == -1
    assert "is whole; take one from a copy, or begin with another --run-name" in none[1]
