"""A watchdog: a process without progress prints the stacks of its threads and ends."""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

SECONDS_TO_PRINT_STACKS = 5  # then C code prints them, in case the interpreter is blocked
STDERR = 2  # the descriptor
FROZEN = 70  # the exit status


class Watchdog:
    """Prints the stack of every thread and ends the process after `timeout_seconds` without `heartbeat`."""

    def __init__(self, rank: int, timeout_seconds: float) -> None:
        self._rank, self._timeout_seconds = rank, timeout_seconds
        self._last = time.monotonic()
        self._paused = False

    def heartbeat(self) -> None:
        """Report progress."""
        self._last = time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Context manager that allows a wait of any length."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False
            self.heartbeat()

    def watch_until(self, is_over: threading.Event) -> None:
        """The watchdog's thread."""
        poll = min(1.0, self._timeout_seconds / 10)
        # If the interpreter lock is never released, this thread is blocked as well: faulthandler then acts.
        late = self._timeout_seconds + SECONDS_TO_PRINT_STACKS
        faulthandler.dump_traceback_later(late, exit=True, file=STDERR)
        while not is_over.wait(poll):
            faulthandler.dump_traceback_later(late, exit=True, file=STDERR)
            if not self._paused and time.monotonic() - self._last > self._timeout_seconds:
                self._end()

    def _end(self) -> None:
        message = (
            f"overnight: rank {self._rank} made no progress for {self._timeout_seconds:g} s "
            "(--timeout-seconds); the stacks of its threads:\n"
        )
        os.write(STDERR, message.encode())
        faulthandler.dump_traceback(file=STDERR, all_threads=True)
        # For two polls, so that the others print theirs before they lose this process.
        time.sleep(min(2.0, self._timeout_seconds / 5))
        os._exit(FROZEN)


@contextmanager
def watchdog(rank: int, size: int, timeout_seconds: float) -> Iterator[Watchdog]:
    """Context manager with a watchdog for one of several processes; a single process may take any time."""
    watch = Watchdog(rank, timeout_seconds)
    if size == 1:
        yield watch
        return
    is_over = threading.Event()
    thread = threading.Thread(target=watch.watch_until, args=(is_over,), daemon=True, name="watch")
    thread.start()
    try:
        yield watch
    finally:
        is_over.set()
        thread.join()
        faulthandler.cancel_dump_traceback_later()
