"""A process that makes no progress ends, and shows where it stands: nothing waits for ever."""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

SECONDS_TO_SPEAK = 5  # after which the C library speaks for a Python that can't any more
STDERR = 2  # the descriptor
FROZEN = 70  # the exit status


class Watchdog:
    """Ends the process when `heartbeat` was not called for so many seconds, with every thread's stack."""

    def __init__(self, rank: int, timeout_seconds: float) -> None:
        self._rank, self._timeout_seconds = rank, timeout_seconds
        self._is_over = threading.Event()
        self._last = time.monotonic()
        self._paused = False

    def heartbeat(self) -> None:
        """Say that there is progress."""
        self._last = time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within, a wait of any length is in order."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False
            self.heartbeat()

    @contextmanager
    def watching(self) -> Iterator[Watchdog]:
        """Within, the process is watched."""
        thread = threading.Thread(target=self._watch, daemon=True, name="watch")
        self.heartbeat()
        thread.start()
        try:
            yield self
        finally:
            self._is_over.set()
            thread.join()
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        poll = min(1.0, self._timeout_seconds / 10)
        # This thread, too, stands still where nobody lets go of the interpreter.
        late = self._timeout_seconds + SECONDS_TO_SPEAK
        faulthandler.dump_traceback_later(late, exit=True, file=STDERR)
        while not self._is_over.wait(poll):
            faulthandler.dump_traceback_later(late, exit=True, file=STDERR)
            if not self._paused and time.monotonic() - self._last > self._timeout_seconds:
                self._end()

    def _end(self) -> None:
        told = (
            f"overnight: rank {self._rank} made no progress for {self._timeout_seconds:g} s "
            "(--timeout-seconds); this is where its threads stand:\n"
        )
        os.write(STDERR, told.encode())
        faulthandler.dump_traceback(file=STDERR, all_threads=True)
        os._exit(FROZEN)


@contextmanager
def watchdog(rank: int, size: int, timeout_seconds: float) -> Iterator[Watchdog]:
    """A watch over this process if it is one of several; one by itself may take all the time it wants."""
    watch = Watchdog(rank, timeout_seconds)
    if size == 1:
        yield watch
        return
    with watch.watching():
        yield watch
