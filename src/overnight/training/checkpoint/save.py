"""Saves a TrainState: copied to host memory, written to a staging folder, published by one rename."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from overnight.distributed.launcher import daemon_thread
from overnight.distributed.world import SINGLE_PROCESS, World
from overnight.files import flush_folder, flush_to_disk, write_atomically
from overnight.model.model_config import PADDED
from overnight.terminal import echo
from overnight.training.checkpoint.format import (
    FORMAT,
    KINDS,
    checkpoint_name,
    file_digest,
    file_names,
    manifest,
    write_tensors,
)
from overnight.training.sharding import parameter_owners
from overnight.training.state import TensorShard, TrainState, is_writer, local_shard


class Snapshot(NamedTuple):
    """What one process writes of a state, copied to host memory so that training can continue."""

    step: int
    about: Mapping[str, Any]
    """The content of state.json, without the files."""
    tensors: Mapping[str, Mapping[str, TensorShard]]
    """Kind of file -> name -> tensor."""


def save_checkpoint(state: TrainState, folder: Path, world: World = SINGLE_PROCESS) -> Path:
    """Publish `folder`/step-<8 digits>; returns its path.

    All processes call it; they write at the same time, into a folder that all of them see. There must be no
    checkpoint of this step or a later one.
    """
    snapshot = take_snapshot(state, world)
    staging = make_staging_folder(snapshot.step, folder, world)
    written = world.all_gather_object(write_rank_files(snapshot, staging, world))
    if world.is_main:
        publish_checkpoint(snapshot, staging, written)
    world.barrier()
    return staging.with_name(checkpoint_name(snapshot.step))


@torch.no_grad()
def take_snapshot(state: TrainState, world: World, settings: Mapping[str, object] | None = None) -> Snapshot:
    """Copy what this process writes to host memory; `settings` are the run's frozen settings."""
    owner = parameter_owners(state.model, world)
    tensors: dict[str, dict[str, TensorShard]] = {"model": {}, "optimizer": {}}
    for name, parameter in state.model.named_parameters():
        if is_writer(parameter, is_owner=owner[name] == world.rank):
            length = state.model.vocab_size if name in PADDED else len(parameter)
            tensors["model"] |= _copy({name: parameter.detach()}, length)
            tensors["optimizer"] |= _copy(_moments(state, name, parameter), length)
    about = {
        "format": FORMAT,
        "step": state.step,
        "updates": max((int(each["step"]) for each in state.optimizer.state.values()), default=0),  # done
        "loss_scale": state.scaler.state_dict(),
        "guard": dataclasses.asdict(state.guard),
        "model": dataclasses.asdict(state.model.config),
        "settings": dict(settings or {}),
    }
    return Snapshot(state.step, about, tensors)


def make_staging_folder(step: int, folder: Path, world: World) -> Path:
    """Create an empty staging folder for the checkpoint of `step`; deletes unfinished ones."""
    staging = folder / f".building-{checkpoint_name(step)}"
    if world.is_main:
        delete_unfinished(folder)
        staging.mkdir(parents=True)
    world.barrier()
    return staging


def delete_unfinished(folder: Path) -> None:
    """Delete the staging folders of saves that were killed, or that failed."""
    for unfinished in folder.glob(".building-*"):
        shutil.rmtree(unfinished, ignore_errors=True)


def write_rank_files(snapshot: Snapshot, staging: Path, world: World) -> dict[str, Any]:
    """Write this process's files; returns the digest of each."""
    if not staging.is_dir():
        raise OSError(f"rank {world.rank} does not see {staging}: a run's folder must be on a shared disk")
    found = {}
    for kind in KINDS:
        path = staging / file_names(kind, world.size)[world.rank]
        write_tensors(path, snapshot.tensors[kind])
        with path.open("rb") as file:
            flush_to_disk(file.fileno())
        found[path.name] = file_digest(path)
    return found


def publish_checkpoint(snapshot: Snapshot, staging: Path, written: Sequence[Mapping[str, Any]]) -> None:
    """Add state.json and MANIFEST.json, and rename the folder to its final name."""
    files = {name: digest for each in written for name, digest in each.items()}
    names = {kind: sorted(name for name in files if name.startswith(kind)) for kind in KINDS}
    write_atomically(staging / "state.json", json.dumps({**snapshot.about, "files": names}, indent=2) + "\n")
    files["state.json"] = file_digest(staging / "state.json")
    write_atomically(staging / "MANIFEST.json", manifest(files, FORMAT))
    flush_folder(staging.parent.parent)  # the folder of all checkpoints must also survive a power cut
    staging.rename(staging.with_name(checkpoint_name(snapshot.step)))
    flush_folder(staging.parent)


def _copy(tensors: Mapping[str, Tensor], length: int) -> dict[str, TensorShard]:
    """This process's shards in host memory, without the rows from `length` on: padding, always zero."""
    found = {}
    for name, tensor in tensors.items():
        rows, first = local_shard(tensor)
        rows = rows[: max(0, length - first)]
        if len(rows):
            found[name] = TensorShard(rows.to("cpu", copy=True).contiguous(), first)
    return found


def _moments(state: TrainState, name: str, parameter: Tensor) -> dict[str, Tensor]:
    """The optimizer's moments of a parameter; {} before the first step."""
    found = state.optimizer.state.get(parameter) or {}
    return {f"{name}.{moment}": tensor for moment, tensor in found.items() if moment != "step"}


# ---------------------------------------------------------------- asynchronous checkpoints


class Saver:
    """Saves a run's checkpoints, one at a time, each in a thread while training continues.

    `before_publish` (with the step) and `after_publish` are called around publication, by rank 0's thread.
    `settings` are recorded in each checkpoint. All processes call `save`, `poll` and `wait` after the same
    steps. An OSError of a thread is raised by the next of these calls.

    One process writes and publishes in one thread. Several go through two stages, since threads do not
    communicate: each writes its own files; after the first step at which all are done, rank 0 publishes in a
    second thread. `_thread` is the running stage, `_publish` what follows it (None in the last stage).
    """

    def __init__(
        self,
        folder: Path,
        world: World,
        before_publish: Callable[[int], object],
        after_publish: Callable[[], object],
        settings: Mapping[str, object],
    ) -> None:
        self._folder, self._world, self._settings = folder, world, settings
        self._before_publish, self._after_publish = before_publish, after_publish
        self._thread: Future[Any] | None = None
        self._publish: Callable[[list[dict[str, Any]]], None] | None = None

    def save(self, state: TrainState) -> None:
        """Copy the state and start writing it; waits for the previous checkpoint."""
        self.wait()
        snapshot = take_snapshot(state, self._world, self._settings)
        staging = make_staging_folder(snapshot.step, self._folder, self._world)
        write = functools.partial(write_rank_files, snapshot, staging, self._world)
        without_tensors = snapshot._replace(tensors={})  # frees their memory before publication

        def publish(written: list[dict[str, Any]]) -> None:
            self._before_publish(snapshot.step)
            publish_checkpoint(without_tensors, staging, written)
            self._after_publish()

        if self._world.size == 1:
            self._thread = _start_thread(lambda: publish([write()]))
        else:
            self._thread, self._publish = _start_thread(write), publish

    def poll(self) -> None:
        """Start the next stage if all processes' threads are done; does not wait."""
        while (thread := self._thread) is not None and not self._world.any(not thread.done()):
            self._advance(thread)

    def wait(self) -> None:
        """Wait until the checkpoint being written, if any, is published."""
        while (thread := self._thread) is not None:
            self._advance(thread)

    def abandon(self) -> None:
        """Before a failing run ends: wait for the thread, print its error, delete what is not published."""
        if self._thread is not None and (error := self._thread.exception()) is not None:
            echo(f"the checkpoint being written is lost: {error}")
        if self._world.is_main:
            delete_unfinished(self._folder)

    def _advance(self, thread: Future[Any]) -> None:
        """Wait for the running stage; start the next one, if there is one."""
        publish, self._thread, self._publish = self._publish, None, None
        written_here = thread.result()
        if publish is None:
            self._world.barrier()
            return
        written = self._world.all_gather_object(written_here)
        is_main = self._world.is_main
        self._thread = _start_thread(functools.partial(publish, written) if is_main else lambda: None)


def _start_thread(work: Callable[[], Any]) -> Future[Any]:
    """Do `work` in a daemon thread."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - raised again where the result is asked for
            future.set_exception(error)

    daemon_thread(run)
    return future
