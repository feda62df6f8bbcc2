"""Whoever makes no progress ends. Every watch here is in a process of its own, which it may end."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from overnight.distributed.watchdog import FROZEN, watchdog

START = """
import ctypes, sys, time
from overnight import watch
watch.SECONDS_TO_SPEAK = 0.3

def work(seconds):
    time.sleep(seconds)

"""


def run(script: str) -> tuple[int, str, float]:
    """The exit status, standard error and seconds of a process that runs the script."""
    started_at = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", START + script], capture_output=True, text=True, check=False, timeout=30
    )
    return done.returncode, done.stderr, time.monotonic() - started_at


def test_a_process_without_progress_shows_where_it_stands_and_ends() -> None:
    status, said, seconds = run("with watch.watched(3, 4, 0.4): work(30)")
    assert status == FROZEN
    assert said.startswith("overnight: rank 3 made no progress for 0.4 s (--timeout-seconds); this is where")
    assert "in work" in said
    assert "(watch)" in said or "in _watch" in said, "every thread"
    assert 0.4 < seconds < 10


def test_a_process_that_lets_no_other_thread_run_ends_as_well() -> None:
    """The C library speaks for it: Python can't, while somebody holds its lock."""
    status, said, _ = run("with watch.watched(0, 2, 0.4): work(0.01); ctypes.PyDLL(None).sleep(30)")
    assert status == 1
    assert "Timeout (" in said
    assert "most recent call first" in said


@pytest.mark.parametrize(
    "script",
    [
        "with watch.watched(0, 2, 0.5) as it:\n for _ in range(6): work(0.2); it.heartbeat()",
        "with watch.watched(0, 2, 0.5) as it:\n with it.paused(): work(1.2)\n work(0.2)",
        "with watch.watched(0, 1, 0.5): work(1.2)",
        "with watch.watched(0, 2, 0.5): pass\nwork(1.2)",
    ],
    ids=["it goes on", "it is known to wait", "it is by itself", "it is done"],
)
def test_a_process_is_left_alone_while(script: str) -> None:
    assert run(script)[:2] == (0, "")


def test_after_a_wait_it_is_watched_again() -> None:
    script = "with watch.watched(0, 2, 0.5) as it:\n with it.paused(): work(1)\n work(30)"
    status, _, seconds = run(script)
    assert status == FROZEN
    assert seconds > 1.5


def test_an_error_passes_through() -> None:
    with pytest.raises(KeyError), watchdog(0, 2, 60):
        raise KeyError("not the watch's")
