"""TrainState <-> a directory: verified, atomic, and never code.

    checkpoints/step-00001000/
      model.safetensors       GPT-2's parameter names, the vocabulary unpadded
      optimizer.safetensors   AdamW's two moments: <parameter>.exp_avg, <parameter>.exp_avg_sq
      state.json              step, updates, float16's loss scale, how the last steps went, model, format
      MANIFEST.json           size and sha256 of all others

Several processes write as many files of each kind, model-00000-of-00004.safetensors and so on, each what it
is to write of the tensors; read together they are the same, whoever wrote them and whoever reads.

A checkpoint appears under its name in one rename, after all its bytes are on the disk. It is used only
if every byte is still the one that was written.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from overnight.guard import Guard
from overnight.model.config import ModelConfig
from overnight.model.gpt import GPT, allocate_model
from overnight.model.initialization import weight_shapes
from overnight.ownership import assign_parameters
from overnight.run_directory import flush_folder, flush_to_disk, write_atomically
from overnight.state import TrainState, is_to_write, own_rows
from overnight.tensor_files import Piece, TensorFiles, write_tensors
from overnight.terminal import say
from overnight.world import ALONE, World

FORMAT = 4
READABLE = (2, 3, 4)  # 3 knew no guard; 2 had a single file of each kind, and did not name them
KINDS = ("model", "optimizer")
MOMENTS = ("exp_avg", "exp_avg_sq")
Read = TypeVar("Read")


def save_checkpoint(state: TrainState, folder: Path, world: World = ALONE) -> Path:
    """Publish `folder`/step-<8 digits>; returns its path.

    All processes write at the same time, into a folder that all of them see. There must be no checkpoint of
    this step or a later one.
    """
    final = folder / checkpoint_name(state.step)
    building = folder / f".building-{final.name}"
    if world.is_main:
        for unfinished in folder.glob(".building-*"):  # of a save that was killed, of whatever step
            shutil.rmtree(unfinished, ignore_errors=True)
        building.mkdir(parents=True)
        flush_folder(folder.parent)
    world.wait_for_all()
    written = world.gather(json.dumps(_write_own(state, building, world)))
    if world.is_main:
        files = {name: identity for each in written for name, identity in json.loads(each).items()}
        _publish(state, building, files)
    world.wait_for_all()
    return final


def _write_own(state: TrainState, building: Path, world: World) -> dict[str, Any]:
    """Write what this process is to write; the identity of each file."""
    if not building.is_dir():
        raise OSError(f"rank {world.rank} does not see {building}: a run's folder lies on a shared disk")
    found = {}
    mine = _own_parameters(state, world)
    for kind, pieces in (("model", _weights(state, mine)), ("optimizer", _moments(state, mine))):
        path = building / _file_names(kind, world.size)[world.rank]
        write_tensors(path, dict(pieces))
        with path.open("rb") as file:
            flush_to_disk(file.fileno())
        found[path.name] = _identity(path)
    return found


def _publish(state: TrainState, building: Path, files: dict[str, Any]) -> None:
    """Add what is said of all files together, and give the folder its name."""
    about = {
        "format": FORMAT,
        "step": state.step,
        "updates": _updates(state),
        "loss_scale": state.scaler.state_dict(),
        "guard": state.guard.to_values(),
        "model": dataclasses.asdict(state.model.config),
        "files": {kind: sorted(name for name in files if name.startswith(kind)) for kind in KINDS},
    }
    write_atomically(building / "state.json", json.dumps(about, indent=2) + "\n")
    files["state.json"] = _identity(building / "state.json")
    write_atomically(building / "MANIFEST.json", _manifest(files, FORMAT))
    building.rename(building.with_name(checkpoint_name(state.step)))
    flush_folder(building.parent)


def choose_kept(
    steps: Sequence[int], last: int | None, every: int | None = None, best: int | None = None
) -> set[int]:
    """Of the steps with a checkpoint, in order, those to be kept.

    The newest `last` of them, all if None; multiples of `every`; `best`, if it is one of them. The newest is
    always kept: it is the one whose bytes have just been brought to the disk.
    """
    if last is None:
        return {*steps}
    kept = {*steps[-max(1, last) :]}
    return kept | {step for step in steps if (every and step % every == 0) or step == best}


def keep_only(kept: Collection[int], folder: Path) -> None:
    """Delete the checkpoints of all other steps."""
    for checkpoint in list_checkpoints(folder):
        if read_step(checkpoint) not in kept:
            shutil.rmtree(checkpoint)


def discard_checkpoints_after(step: int, folder: Path) -> None:
    """Delete the checkpoints of later steps: damaged, since they were passed over; they are made again."""
    for checkpoint in list_checkpoints(folder):
        if checkpoint.name > checkpoint_name(step):
            shutil.rmtree(checkpoint)


def checkpoint_name(step: int) -> str:
    """step-00001000 for 1000: names sort as their steps do."""
    return f"step-{step:08d}"


def read_step(checkpoint: Path) -> int:
    """1000 for step-00001000."""
    return int(checkpoint.name.removeprefix("step-"))


def _file_names(kind: str, count: int) -> list[str]:
    """The files of one kind, one of each process."""
    if count == 1:
        return [f"{kind}.safetensors"]
    return [f"{kind}-{rank:05d}-of-{count:05d}.safetensors" for rank in range(count)]


def _own_parameters(state: TrainState, world: World) -> dict[str, Tensor]:
    """The parameters of which this process writes something: those it owns, or its rows of all."""
    named = dict(state.model.named_parameters())
    owner = assign_parameters({name: parameter.numel() for name, parameter in named.items()}, world.size)
    return {
        name: parameter
        for name, parameter in named.items()
        if is_to_write(parameter, is_owner=owner[name] == world.rank)
    }


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


def _manifest(files: dict[str, Any], format_: int) -> str:
    return _canonical({"format": format_, "files": files})


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


def verify_checkpoint(checkpoint: Path, world: World = ALONE) -> None:
    """Raise ValueError unless every byte of `checkpoint` is as it was written; each process reads a share."""
    with world.together():
        try:
            written = (checkpoint / "MANIFEST.json").read_bytes()
            told = json.loads(written)
            names = sorted(told["files"])
            found = dict(told["files"])
            for name in names[world.rank :: world.size]:
                found[name] = _identity(checkpoint / name)
            sound = written == _manifest(found, told["format"]).encode() and "state.json" in names
        except OSError as error:
            raise ValueError(
                f"checkpoint {checkpoint} is incomplete: {error.strerror} ({error.filename})"
            ) from None
        except (ValueError, LookupError, TypeError, AttributeError):
            sound = False
        if not sound:
            raise ValueError(
                f"checkpoint {checkpoint} is damaged: its files are not what its MANIFEST.json says"
            )


def read_model(checkpoint: Path) -> GPT:
    """The model of a checkpoint, on the CPU, in evaluation mode. Raises ValueError if it is damaged."""
    about = _verified_state(checkpoint, ALONE)
    model = allocate_model(ModelConfig(**about["model"]))
    _read_weights(model, checkpoint, about)
    return model.eval()


@torch.no_grad()
def load_checkpoint(state: TrainState, checkpoint: Path, world: World = ALONE) -> None:
    """Make `state` what it was when `checkpoint` was saved. Raises ValueError if that is damaged.

    Each process reads what it holds of the weights and moments, whoever wrote them.
    """
    about = _verified_state(checkpoint, world)
    _read_weights(state.model, checkpoint, about)
    moments = _open_files(checkpoint, about, "optimizer")
    is_fused = state.optimizer.param_groups[0]["fused"]
    updated = {parameter for group in state.optimizer.param_groups for parameter in group["params"]}
    for name, parameter in state.model.named_parameters():
        if f"{name}.{MOMENTS[0]}" not in moments.shapes or parameter not in updated:
            continue  # saved before the first step, when there were no moments; or another's to update
        # Fused AdamW counts its updates beside the parameter, the other kinds on the CPU.
        updates = torch.tensor(float(about["updates"]), device=parameter.device if is_fused else "cpu")
        restored = {"step": updates}
        for moment in MOMENTS:
            restored[moment] = torch.zeros_like(parameter)
            rows, first = own_rows(restored[moment])
            moments.read(f"{name}.{moment}", rows, first)
        state.optimizer.state[parameter] = restored
    if about["loss_scale"]:
        state.scaler.load_state_dict(about["loss_scale"])
    state.guard = Guard.from_values(about["guard"]) if "guard" in about else Guard()
    state.step = about["step"]


@torch.no_grad()
def _read_weights(model: GPT, checkpoint: Path, about: dict[str, Any]) -> None:
    """Fill what this process holds of the parameters. Raises ValueError if they are not this model's."""
    files = _open_files(checkpoint, about, "model")
    shapes, expected = files.shapes, weight_shapes(model.config)
    wrong = sorted(name for name in {*shapes, *expected} if shapes.get(name) != expected.get(name))
    if wrong:
        raise ValueError(f"the weights of {checkpoint} do not fit the model: {', '.join(wrong)}")
    for name, parameter in model.named_parameters():
        rows, first = own_rows(parameter.detach())
        files.read(name, rows, first)


def _open_files(checkpoint: Path, about: dict[str, Any], kind: str) -> TensorFiles:
    names: Sequence[str] = about.get("files", {}).get(kind) or _file_names(kind, 1)
    return TensorFiles([checkpoint / name for name in names])


def _verified_state(checkpoint: Path, world: World) -> dict[str, Any]:
    """state.json of a checkpoint that is whole and of this format."""
    verify_checkpoint(checkpoint, world)
    about: dict[str, Any] = json.loads((checkpoint / "state.json").read_text())
    if about["format"] not in READABLE:
        raise ValueError(
            f"checkpoint {checkpoint} has format {about['format']}, this overnight reads {FORMAT}"
        )
    named = {name for names in about.get("files", {}).values() for name in names}
    if missing := sorted(name for name in named if not (checkpoint / name).is_file()):
        raise ValueError(f"checkpoint {checkpoint} is incomplete: {', '.join(missing)} is missing")
    return about
