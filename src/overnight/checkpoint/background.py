"""Checkpoints that a thread writes while training goes on: training waits for a copy in memory only."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from overnight.checkpoint.saving import make_building, publish, take_snapshot, write_own
from overnight.state import TrainState
from overnight.terminal import say
from overnight.world import World, leave_behind

Work = Callable[[], Any]


class Saver:
    """Saves a run's checkpoints, one at a time, each by a thread.

    `flush` is called before a checkpoint is published, and `tidy` after it; both by the main process's
    thread. `settings` are written down with each. Threads say nothing to other processes: with several of
    them, each thread writes its own files, and the checkpoint is published at the end of the first step at
    which all are written. All processes call `save`, `look` and `finish` after the same steps. What goes
    wrong in a thread (OSError) is raised by the next of these.
    """

    def __init__(
        self, folder: Path, world: World, flush: Work, tidy: Work, settings: Mapping[str, object]
    ) -> None:
        self._folder, self._world, self._flush, self._tidy = folder, world, flush, tidy
        self._settings = settings
        self._work: Future[Any] | None = None
        self._next: Callable[[list[str]], None] | None = None

    def save(self, state: TrainState) -> None:
        """Copy the state, and begin to write it, when the checkpoint before is published."""
        self.finish()
        snapshot = take_snapshot(state, self._world, self._settings)
        building = make_building(snapshot.step, self._folder, self._world)
        write = functools.partial(write_own, snapshot, building, self._world)
        without_tensors = snapshot._replace(tensors={})

        def publish_all(written: list[str]) -> None:
            self._flush()
            publish(without_tensors, building, written)
            self._tidy()

        if self._world.size == 1:
            self._work = _begin(lambda: publish_all([write()]))
        else:
            self._work, self._next = _begin(write), publish_all

    def look(self) -> None:
        """Go on with the checkpoint under way as far as all threads have come, without waiting for them."""
        while self._work is not None and not self._world.any(not self._work.done()):
            self._go_on()

    def finish(self) -> None:
        """Return when the checkpoint under way, if any, is published."""
        while self._work is not None:
            self._go_on()

    def settle(self) -> None:
        """Before a failing run ends: let its thread come to the end, and say if it failed as well.

        Of several processes nothing is published any more.
        """
        if self._work is not None and (error := self._work.exception()) is not None:
            say(f"the checkpoint under way is lost: {error}")

    def _go_on(self) -> None:
        """Wait for the thread; where all have written, let the main process publish."""
        assert self._work is not None
        work, self._work = self._work, None
        then, self._next = self._next, None
        told = work.result()
        if then is None:
            self._world.wait_for_all()
            return
        written = self._world.gather(told)
        self._work = _begin(functools.partial(then, written) if self._world.is_main else lambda: None)


def _begin(work: Work) -> Future[Any]:
    """Let a thread do it."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - raised again where the result is asked for
            future.set_exception(error)

    leave_behind(run)
    return future
