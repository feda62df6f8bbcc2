"""TrainState <-> a directory: verified, atomic, and never code.

    checkpoints/step-00001000/
      model.safetensors       GPT-2's parameter names, the vocabulary unpadded
      optimizer.safetensors   AdamW's two moments: <parameter>.exp_avg, <parameter>.exp_avg_sq
      state.json              step, optimizer updates, float16's loss scale, model configuration, format
      MANIFEST.json           size and sha256 of the three

A checkpoint appears under its name in one rename, after all its bytes are on the disk. It is used only
if every byte is still the one that was written.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from overnight.model.config import ModelConfig
from overnight.model.gpt import GPT, allocate_model
from overnight.run_directory import flush_folder, flush_to_disk, write_atomically
from overnight.state import TrainState
from overnight.terminal import say

FORMAT = 2
MOMENTS = ("exp_avg", "exp_avg_sq")
FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
Read = TypeVar("Read")


def save_checkpoint(state: TrainState, folder: Path, keep: int | None = None) -> Path:
    """Publish `folder`/step-<8 digits>, then delete all but the newest `keep`; returns its path.

    There must be no checkpoint of this step or a later one.
    """
    final = folder / checkpoint_name(state.step)
    building = folder / f".building-{final.name}"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    flush_folder(folder.parent)
    save_file(_for_disk(state.model.weights()), building / "model.safetensors")
    save_file(_for_disk(_moments(state)), building / "optimizer.safetensors")
    about = {
        "format": FORMAT,
        "step": state.step,
        "updates": _updates(state),
        "loss_scale": state.scaler.state_dict(),
        "model": dataclasses.asdict(state.model.config),
    }
    write_atomically(building / "state.json", json.dumps(about, indent=2) + "\n")
    for name in FILES:
        with (building / name).open("rb") as file:
            flush_to_disk(file.fileno())
    write_atomically(building / "MANIFEST.json", _manifest(building))
    building.rename(final)
    flush_folder(folder)
    if keep is not None:
        for old in list_checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    return final


def discard_checkpoints_after(step: int, folder: Path) -> None:
    """Delete the checkpoints of later steps: damaged, since they were passed over; they are made again."""
    for checkpoint in list_checkpoints(folder):
        if checkpoint.name > checkpoint_name(step):
            shutil.rmtree(checkpoint)


def checkpoint_name(step: int) -> str:
    """step-00001000 for 1000: names sort as their steps do."""
    return f"step-{step:08d}"


def _for_disk(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def _moments(state: TrainState) -> dict[str, Tensor]:
    """AdamW's moments by parameter name, without the rows that pad the vocabulary (always zero)."""
    rows = {name: len(weight) for name, weight in state.model.weights().items()}
    return {
        f"{name}.{moment}": state.optimizer.state[parameter][moment][: rows[name]]
        for name, parameter in state.model.named_parameters()
        if parameter in state.optimizer.state
        for moment in MOMENTS
    }


def _updates(state: TrainState) -> int:
    """How often the weights were changed: `step`, less the steps whose gradients overflowed float16."""
    return max((int(each["step"]) for each in state.optimizer.state.values()), default=0)


def _manifest(checkpoint: Path) -> str:
    files = {name: _identity(checkpoint / name) for name in FILES}
    return _canonical({"format": FORMAT, "files": files})


def _canonical(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def _identity(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def list_checkpoints(folder: Path) -> list[Path]:
    """The published checkpoints of a run, oldest first, verified or not."""
    return sorted(folder.glob("step-" + "[0-9]" * 8))


def read_newest(folder: Path, read: Callable[[Path], Read]) -> Read | None:
    """What `read` makes of the newest checkpoint that it can read; None if there is no checkpoint.

    `read` refuses a damaged one with ValueError: that is said, and the one before it is tried. Raises
    ValueError if there are checkpoints and none can be read.
    """
    found = list_checkpoints(folder)
    for checkpoint in reversed(found):
        try:
            return read(checkpoint)
        except ValueError as error:
            say(f"{error}; trying the one before it")
    if found:
        raise ValueError(f"no checkpoint in {folder} is whole; begin again with another --run-name")
    return None


def verify_checkpoint(checkpoint: Path) -> None:
    """Raise ValueError unless every byte of `checkpoint` is as it was written."""
    try:
        written = (checkpoint / "MANIFEST.json").read_bytes()
        sound = written == _manifest(checkpoint).encode()
    except OSError as error:
        raise ValueError(
            f"checkpoint {checkpoint} is incomplete: {error.strerror} ({error.filename})"
        ) from None
    if not sound:
        raise ValueError(f"checkpoint {checkpoint} is damaged: its files are not what its MANIFEST.json says")


def read_model(checkpoint: Path) -> GPT:
    """The model of a checkpoint, on the CPU, in evaluation mode. Raises ValueError if it is damaged."""
    about = _verified_state(checkpoint)
    model = allocate_model(ModelConfig(**about["model"]))
    model.load_weights(load_file(checkpoint / "model.safetensors"))
    return model.eval()


@torch.no_grad()
def load_checkpoint(state: TrainState, checkpoint: Path) -> None:
    """Make `state` what it was when `checkpoint` was saved. Raises ValueError if that is damaged."""
    about = _verified_state(checkpoint)
    state.model.load_weights(load_file(checkpoint / "model.safetensors"))
    moments = load_file(checkpoint / "optimizer.safetensors")
    is_fused = state.optimizer.param_groups[0]["fused"]
    for name, parameter in state.model.named_parameters():
        if f"{name}.{MOMENTS[0]}" not in moments:
            continue  # saved before the first step: there were no moments yet
        # Fused AdamW counts its updates beside the parameter, the other kinds on the CPU.
        updates = torch.tensor(float(about["updates"]), device=parameter.device if is_fused else "cpu")
        restored = {"step": updates}
        for moment in MOMENTS:
            saved = moments[f"{name}.{moment}"]
            restored[moment] = torch.zeros_like(parameter)
            restored[moment][: len(saved)] = saved
        state.optimizer.state[parameter] = restored
    if about["loss_scale"]:
        state.scaler.load_state_dict(about["loss_scale"])
    state.step = about["step"]


def _verified_state(checkpoint: Path) -> dict[str, Any]:
    """state.json of a checkpoint that is whole and of this format."""
    verify_checkpoint(checkpoint)
    about: dict[str, Any] = json.loads((checkpoint / "state.json").read_text())
    if about["format"] != FORMAT:
        raise ValueError(
            f"checkpoint {checkpoint} has format {about['format']}, this overnight reads {FORMAT}"
        )
    return about
