"""TrainState -> a checkpoint: what is to be saved is copied, written, and published in one rename."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from overnight.checkpoint.layout import (
    FORMAT,
    KINDS,
    MOMENTS,
    checkpoint_name,
    file_names,
    identify,
    manifest,
)
from overnight.model.gpt import GPT
from overnight.ownership import assign_parameters
from overnight.run_directory import flush_folder, flush_to_disk, write_atomically
from overnight.state import TrainState, is_to_write, own_rows
from overnight.tensor_files import Piece, write_tensors
from overnight.world import ALONE, World


class Snapshot(NamedTuple):
    """What one process writes of a state, copied to the host's memory: training may go on."""

    step: int
    about: Mapping[str, Any]
    """What state.json says, but for the files."""
    tensors: Mapping[str, Mapping[str, Piece]]
    """By kind of file, and name."""


def save_checkpoint(state: TrainState, folder: Path, world: World = ALONE) -> Path:
    """Publish `folder`/step-<8 digits>; returns its path.

    All processes write at the same time, into a folder that all of them see. There must be no checkpoint of
    this step or a later one.
    """
    snapshot = take_snapshot(state, world)
    building = make_building(snapshot.step, folder, world)
    written = world.gather(write_own(snapshot, building, world))
    if world.is_main:
        publish(snapshot, building, written)
    world.wait_for_all()
    return building.with_name(checkpoint_name(snapshot.step))


@torch.no_grad()
def take_snapshot(state: TrainState, world: World, settings: Mapping[str, object] | None = None) -> Snapshot:
    """Copy what this process is to write; `settings` are of the run, by name, values as JSON has them."""
    mine = _own_parameters(state, world)
    about = {
        "format": FORMAT,
        "step": state.step,
        "updates": _updates(state),
        "loss_scale": state.scaler.state_dict(),
        "guard": state.guard.to_values(),
        "model": dataclasses.asdict(state.model.config),
        "settings": dict(settings or {}),
    }
    tensors = {"model": _copy(_weights(state, mine)), "optimizer": _copy(_moments(state, mine))}
    return Snapshot(state.step, about, tensors)


def make_building(step: int, folder: Path, world: World) -> Path:
    """An empty folder where the checkpoint of `step` is put together; what earlier saves left is deleted."""
    building = folder / f".building-{checkpoint_name(step)}"
    if world.is_main:
        for unfinished in folder.glob(".building-*"):  # of a save that was killed, of whatever step
            shutil.rmtree(unfinished, ignore_errors=True)
        building.mkdir(parents=True)
    world.wait_for_all()
    return building


def write_own(snapshot: Snapshot, building: Path, world: World) -> str:
    """Write what this process is to write; the identity of each file, as JSON."""
    if not building.is_dir():
        raise OSError(f"rank {world.rank} does not see {building}: a run's folder lies on a shared disk")
    found = {}
    for kind in KINDS:
        path = building / file_names(kind, world.size)[world.rank]
        write_tensors(path, snapshot.tensors[kind])
        with path.open("rb") as file:
            flush_to_disk(file.fileno())
        found[path.name] = identify(path)
    return json.dumps(found)


def publish(snapshot: Snapshot, building: Path, written: Sequence[str]) -> None:
    """Add what is said of all files together, and give the folder its name."""
    files = {name: identity for each in written for name, identity in json.loads(each).items()}
    names = {kind: sorted(name for name in files if name.startswith(kind)) for kind in KINDS}
    write_atomically(building / "state.json", json.dumps({**snapshot.about, "files": names}, indent=2) + "\n")
    files["state.json"] = identify(building / "state.json")
    write_atomically(building / "MANIFEST.json", manifest(files, FORMAT))
    flush_folder(building.parent.parent)  # where the folder of all checkpoints has its own name
    building.rename(building.with_name(checkpoint_name(snapshot.step)))
    flush_folder(building.parent)


def _own_parameters(state: TrainState, world: World) -> dict[str, Tensor]:
    """The parameters of which this process writes something: those it owns, or its rows of all."""
    named = dict(state.model.named_parameters())
    owner = assign_parameters({name: parameter.numel() for name, parameter in named.items()}, world.size)
    return {
        name: parameter
        for name, parameter in named.items()
        if is_to_write(parameter, is_owner=owner[name] == world.rank)
    }


def _copy(pieces: Iterator[tuple[str, Piece]]) -> dict[str, Piece]:
    return {name: Piece(piece.rows.to("cpu", copy=True).contiguous(), piece.first) for name, piece in pieces}


def _weights(state: TrainState, parameters: dict[str, Tensor]) -> Iterator[tuple[str, Piece]]:
    for name, parameter in parameters.items():
        yield from _without_padding(state.model, name, name, parameter.detach())


def _moments(state: TrainState, parameters: dict[str, Tensor]) -> Iterator[tuple[str, Piece]]:
    """AdamW's moments by parameter name; there are none before the first step."""
    for name, parameter in parameters.items():
        for moment in MOMENTS if parameter in state.optimizer.state else ():
            values = state.optimizer.state[parameter][moment]
            yield from _without_padding(state.model, name, f"{name}.{moment}", values)


def _without_padding(model: GPT, name: str, label: str, values: Tensor) -> Iterator[tuple[str, Piece]]:
    """What this process holds of a tensor, less the rows that pad the vocabulary (always zero)."""
    rows, first = own_rows(values)
    rows = rows[: max(0, model.vocab_size - first)] if name == "wte.weight" else rows
    if len(rows):
        yield label, Piece(rows, first)


def _updates(state: TrainState) -> int:
    """How often the weights were changed: `step`, less the steps whose gradients overflowed float16."""
    return max((int(each["step"]) for each in state.optimizer.state.values()), default=0)
