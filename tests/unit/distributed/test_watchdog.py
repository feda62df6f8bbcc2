"""A watchdog ends a process without progress. Each runs in a process of its own, which it may end."""

from __future__ import annotations

import subprocess
import sys

import pytest

from overnight.distributed.watchdog import FROZEN, watchdog

# Timeouts are long beside a heartbeat's distance, so that a busy machine changes nothing.
START = """
import ctypes, time
from overnight.distributed import watchdog as module
from overnight.distributed.watchdog import watchdog
module.SECONDS_TO_PRINT_STACKS = 0.3

def work(seconds):
    time.sleep(seconds)

"""


def run(script: str) -> tuple[int, str]:
    """The exit status and standard error of a process that runs the script."""
    command = [sys.executable, "-c", START + script]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    return done.returncode, done.stderr


def test_watchdog_ends_process_without_progress_and_prints_stacks() -> None:
    status, message = run("with watchdog(3, 4, 0.4): work(100)")
    assert status == FROZEN
    assert message.startswith("overnight: rank 3 made no progress for 0.4 s (--timeout-seconds)")
    assert "in work" in message
    assert "in _watch" in message, "every thread"


def test_watchdog_ends_process_that_holds_the_interpreter_lock() -> None:
    """The C library prints the stacks, since no other Python thread can run."""
    status, message = run("with watchdog(0, 2, 0.4): work(0.01); ctypes.PyDLL(None).sleep(100)")
    assert status == 1
    assert "Timeout (" in message
    assert "most recent call first" in message


@pytest.mark.parametrize(
    "script",
    [
        "with watchdog(0, 2, 2) as it:\n for _ in range(25): work(0.1); it.heartbeat()",
        "with watchdog(0, 2, 2) as it:\n with it.paused(): work(2.5)\n work(0.1)",
        "with watchdog(0, 1, 0.2): work(1)",
        "with watchdog(0, 2, 1): pass\nwork(1.5)",
    ],
    ids=["with heartbeats", "paused", "single process", "left"],
)
def test_watchdog_lets_process_continue(script: str) -> None:
    assert run(script) == (0, "")


def test_watchdog_resumes_after_pause() -> None:
    script = "with watchdog(0, 2, 0.5) as it:\n with it.paused(): work(1)\n print('paused'); work(100)"
    status, message = run(f"import sys; sys.stdout = sys.stderr\n{script}")
    assert status == FROZEN
    assert message.startswith("paused")


def test_watchdog_passes_errors() -> None:
    with pytest.raises(KeyError), watchdog(0, 2, 60):
        raise KeyError("an error of the body")
