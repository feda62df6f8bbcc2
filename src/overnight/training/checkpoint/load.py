"""Loads a TrainState or a model from a checkpoint whose checksums match."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError

from overnight.config import require_readable
from overnight.distributed.world import SINGLE_PROCESS, World
from overnight.model.gpt import GPT, empty_model
from overnight.model.model_config import ModelConfig, weight_shapes
from overnight.terminal import echo
from overnight.training.checkpoint.format import (
    FORMAT,
    READABLE,
    TensorFiles,
    file_digest,
    file_names,
    list_checkpoints,
    manifest,
    read_step,
)
from overnight.training.guard import Guard
from overnight.training.state import TrainState, local_shard

Read = TypeVar("Read")


def read_newest(folder: Path, read: Callable[[Path], Read]) -> Read | None:
    """The result of `read` for the newest undamaged checkpoint; None if there is no checkpoint.

    `read` raises ValueError for a damaged one: the error is printed, and the one before is tried. Raises
    ValueError if there are checkpoints and none is accepted, PermissionError for one without permission.
    """
    found = list_checkpoints(folder)
    for checkpoint in reversed(found):
        try:
            return read(checkpoint)
        except ValueError as error:
            require_readable(checkpoint, *sorted(checkpoint.glob("*")))
            echo(f"{error}; trying the previous checkpoint")
    if found:
        raise ValueError(
            f"every checkpoint in {folder} is damaged: restore one, or start a run with another --run-name"
        )
    return None


def verify_checkpoint(checkpoint: Path, world: World = SINGLE_PROCESS) -> None:
    """Raise ValueError unless the checksums of `checkpoint` match; each process reads some of the files."""
    with world.raise_together():
        try:
            written = (checkpoint / "MANIFEST.json").read_bytes()
            stated = json.loads(written)
            names = sorted(stated["files"])
            found = dict(stated["files"])
            for name in names[world.rank :: world.size]:
                found[name] = file_digest(checkpoint / name)
            is_sound = written == manifest(found, stated["format"]).encode() and "state.json" in names
        except OSError as error:
            raise ValueError(
                f"checkpoint {checkpoint} is incomplete: {error.strerror} ({error.filename})"
            ) from None
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            is_sound = False
        if not is_sound:
            raise ValueError(f"checkpoint {checkpoint} is damaged: its files differ from its MANIFEST.json")


class VerifiedCheckpoint(NamedTuple):
    """A checkpoint whose checksums match."""

    path: Path
    about: Mapping[str, Any]
    """The content of state.json."""

    @property
    def settings(self) -> Mapping[str, object]:
        """The run's settings that may not change, by name; {} if they were not recorded."""
        return dict(self.about.get("settings", {}))


def open_checkpoint(checkpoint: Path, world: World = SINGLE_PROCESS) -> VerifiedCheckpoint:
    """Verify a checkpoint, each process a share of it. Raises ValueError if it is damaged or unreadable."""
    verify_checkpoint(checkpoint, world)
    about: dict[str, Any] = json.loads((checkpoint / "state.json").read_text())
    if about["format"] not in READABLE:
        raise ValueError(
            f"checkpoint {checkpoint} has format {about['format']}, this version of overnight reads {FORMAT}"
        )
    named = {name for names in about.get("files", {}).values() for name in names}
    if missing := sorted(name for name in named if not (checkpoint / name).is_file()):
        raise ValueError(f"checkpoint {checkpoint} is incomplete: {', '.join(missing)} is missing")
    if checkpoint in list_checkpoints(checkpoint.parent) and read_step(checkpoint) != about["step"]:
        raise ValueError(f"checkpoint {checkpoint} is damaged: its state.json is of step {about['step']}")
    opened = VerifiedCheckpoint(checkpoint, about)
    try:
        _check_shapes(weight_shapes(ModelConfig(**about["model"])), opened)
    except (SafetensorError, LookupError, TypeError, ArithmeticError) as error:
        raise ValueError(f"checkpoint {checkpoint} is damaged: {error}") from None
    return opened


def read_model(checkpoint: Path) -> GPT:
    """The model of a checkpoint, on the CPU, in evaluation mode. Raises ValueError if it is damaged."""
    opened = open_checkpoint(checkpoint)
    model = empty_model(ModelConfig(**opened.about["model"]))
    _read_weights(model, opened)
    return model.eval()


def load_checkpoint(state: TrainState, checkpoint: Path, world: World = SINGLE_PROCESS) -> None:
    """Restore `state` from `checkpoint`. Raises ValueError if the checkpoint is damaged."""
    restore(state, open_checkpoint(checkpoint, world))


@torch.no_grad()
def restore(state: TrainState, opened: VerifiedCheckpoint) -> None:
    """Restore `state` from a verified checkpoint. Raises ValueError if its model is another one.

    Each process reads the weights and moments that it holds, whichever process wrote them.
    """
    about = opened.about
    _read_weights(state.model, opened)
    moments = _open_files(opened, "optimizer")
    shapes = moments.shapes
    is_fused = state.optimizer.param_groups[0]["fused"]
    updated = {parameter for group in state.optimizer.param_groups for parameter in group["params"]}
    for name, parameter in state.model.named_parameters():
        saved = [each for each in shapes if each.rpartition(".")[0] == name]
        if not saved or parameter not in updated:
            continue  # saved before the first step, without moments; or updated by another process
        # Fused AdamW keeps its count of updates on the parameter's device, other kinds on the CPU.
        updates = torch.tensor(float(about["updates"]), device=parameter.device if is_fused else "cpu")
        restored = {"step": updates}
        for moment in saved:
            like = parameter if shapes[moment][-1] == parameter.shape[-1] else parameter[..., :1]
            tensor = restored[moment.rpartition(".")[2]] = torch.zeros_like(like)
            rows, first = local_shard(tensor)
            moments.read(moment, rows, first)
        state.optimizer.state[parameter] = restored
    if about["loss_scale"]:
        state.scaler.load_state_dict(about["loss_scale"])
    state.guard = Guard.from_values(about["guard"]) if "guard" in about else Guard()
    state.step = about["step"]


@torch.no_grad()
def _read_weights(model: GPT, opened: VerifiedCheckpoint) -> None:
    """Fill this process's shards of the parameters. Raises ValueError if their shapes differ."""
    _check_shapes(weight_shapes(model.config), opened)
    files = _open_files(opened, "model")
    for name, parameter in model.named_parameters():
        rows, first = local_shard(parameter.detach())
        files.read(name, rows, first)


def _check_shapes(expected: Mapping[str, tuple[int, ...]], opened: VerifiedCheckpoint) -> None:
    """Raise ValueError unless the weights have the expected shapes, and each moment that of its weight."""
    shapes = _open_files(opened, "model").shapes
    wrong = [name for name in {*shapes, *expected} if shapes.get(name) != expected.get(name)]
    moments = _open_files(opened, "optimizer").shapes
    for name, shape in moments.items():
        weight = expected.get(name.rpartition(".")[0], ())
        if shape != weight and (not name.endswith(".row_square") or shape != (*weight[:-1], 1)):
            wrong.append(name)
    if wrong:
        raise ValueError(
            f"the weights of {opened.path} do not fit the model: {', '.join(sorted(wrong))}; give its sizes"
        )


def _open_files(opened: VerifiedCheckpoint, kind: str) -> TensorFiles:
    names: Sequence[str] = opened.about.get("files", {}).get(kind) or file_names(kind, 1)
    return TensorFiles([opened.path / name for name in names])
