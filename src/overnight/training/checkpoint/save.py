"""Saves a TrainState: copied to host memory, written to a staging folder, published by one rename."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from overnight.distributed.launcher import daemon_thread
from overnight.distributed.world import SINGLE_PROCESS, World
from overnight.model.gpt import GPT
from overnight.run_directory import flush_folder, flush_to_disk, write_atomically
from overnight.terminal import echo
from overnight.training.checkpoint.format import (
    FORMAT,
    KINDS,
    MOMENTS,
    checkpoint_name,
    file_digest,
    file_names,
    manifest,
    write_tensors,
)
from overnight.training.sharding import assign_parameters
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


def make_staging_folder(step: int, folder: Path, world: World) -> Path:
    """Create an empty staging folder for the checkpoint of `step`; deletes unfinished ones."""
    staging = folder / f".building-{checkpoint_name(step)}"
    if world.is_main:
        for unfinished in folder.glob(".building-*"):  # of a save that was killed
            shutil.rmtree(unfinished, ignore_errors=True)
        staging.mkdir(parents=True)
    world.barrier()
    return staging


def write_rank_files(snapshot: Snapshot, staging: Path, world: World) -> str:
    """Write this process's files; returns the digest of each, as JSON."""
    if not staging.is_dir():
        raise OSError(f"rank {world.rank} does not see {staging}: a run's folder must be on a shared disk")
    found = {}
    for kind in KINDS:
        path = staging / file_names(kind, world.size)[world.rank]
        write_tensors(path, snapshot.tensors[kind])
        with path.open("rb") as file:
            flush_to_disk(file.fileno())
        found[path.name] = file_digest(path)
    return json.dumps(found)


def publish_checkpoint(snapshot: Snapshot, staging: Path, written: Sequence[str]) -> None:
    """Add state.json and MANIFEST.json, and rename the folder to its final name."""
    files = {name: identity for each in written for name, identity in json.loads(each).items()}
    names = {kind: sorted(name for name in files if name.startswith(kind)) for kind in KINDS}
    write_atomically(staging / "state.json", json.dumps({**snapshot.about, "files": names}, indent=2) + "\n")
    files["state.json"] = file_digest(staging / "state.json")
    write_atomically(staging / "MANIFEST.json", manifest(files, FORMAT))
    flush_folder(
        staging.parent.parent
    )  # the name of the folder of all checkpoints must also survive a power cut
    staging.rename(staging.with_name(checkpoint_name(snapshot.step)))
    flush_folder(staging.parent)


def _own_parameters(state: TrainState, world: World) -> dict[str, Tensor]:
    """The parameters of which this process writes rows: those it owns, or its shard of all."""
    named = dict(state.model.named_parameters())
    owner = assign_parameters({name: parameter.numel() for name, parameter in named.items()}, world.size)
    return {
        name: parameter
        for name, parameter in named.items()
        if is_writer(parameter, is_owner=owner[name] == world.rank)
    }


def _copy(pieces: Iterator[tuple[str, TensorShard]]) -> dict[str, TensorShard]:
    return {
        name: TensorShard(piece.rows.to("cpu", copy=True).contiguous(), piece.first) for name, piece in pieces
    }


def _weights(state: TrainState, parameters: dict[str, Tensor]) -> Iterator[tuple[str, TensorShard]]:
    for name, parameter in parameters.items():
        yield from _without_padding(state.model, name, name, parameter.detach())


def _moments(state: TrainState, parameters: dict[str, Tensor]) -> Iterator[tuple[str, TensorShard]]:
    """AdamW's moments by parameter name; empty before the first step."""
    for name, parameter in parameters.items():
        for moment in MOMENTS if parameter in state.optimizer.state else ():
            values = state.optimizer.state[parameter][moment]
            yield from _without_padding(state.model, name, f"{name}.{moment}", values)


def _without_padding(model: GPT, name: str, label: str, values: Tensor) -> Iterator[tuple[str, TensorShard]]:
    """This process's shard of a tensor, without the rows that pad the vocabulary (always zero)."""
    rows, first = local_shard(values)
    rows = rows[: max(0, model.vocab_size - first)] if name == "wte.weight" else rows
    if len(rows):
        yield label, TensorShard(rows, first)


def _updates(state: TrainState) -> int:
    """Number of updates: `step` without the steps that were skipped."""
    return max((int(each["step"]) for each in state.optimizer.state.values()), default=0)


# ---------------------------------------------------------------- asynchronous checkpoints


class Saver:
    """Saves a run's checkpoints, one at a time, each in a thread while training continues.

    `before_publish` and `after_publish` are called around publication, by the main process's thread.
    `settings` are recorded in each checkpoint. All processes call `save`, `poll` and `wait` after the same
    steps. An OSError of a thread is raised by the next of these calls.

    Threads do not communicate between processes. One process writes and publishes in one thread. Several
    processes go through two stages: each writes its own files in a thread; at the end of the first step at
    which all threads are done, the main process publishes in a second thread, and the others wait for that.
    `_thread` is the running stage, `_publish` what follows it (None in the last stage).
    """

    def __init__(
        self,
        folder: Path,
        world: World,
        before_publish: Callable[[], object],
        after_publish: Callable[[], object],
        settings: Mapping[str, object],
    ) -> None:
        self._folder, self._world, self._settings = folder, world, settings
        self._before_publish, self._after_publish = before_publish, after_publish
        self._thread: Future[Any] | None = None
        self._publish: Callable[[list[str]], None] | None = None

    def save(self, state: TrainState) -> None:
        """Copy the state and start writing it; waits for the previous checkpoint."""
        self.wait()
        snapshot = take_snapshot(state, self._world, self._settings)
        staging = make_staging_folder(snapshot.step, self._folder, self._world)
        write = functools.partial(write_rank_files, snapshot, staging, self._world)
        without_tensors = snapshot._replace(tensors={})  # frees their memory before publication

        def publish(written: list[str]) -> None:
            self._before_publish()
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
        """Before a failing run ends: wait for the thread, and print its error. Publishes nothing more."""
        if self._thread is not None and (error := self._thread.exception()) is not None:
            echo(f"the checkpoint being written is lost: {error}")

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
