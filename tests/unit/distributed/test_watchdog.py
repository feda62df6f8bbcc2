"""A process without progress ends. Every watchdog here is in a process of its own, which it may end."""

from __future__ import annotations

import subprocess
import sys

import pytest

from overnight.distributed.watchdog import FROZEN, watchdog

START = """
import ctypes, time
from overnight.distributed import watchdog as module
from overnight.distributed.watchdog import watchdog
module.SECONDS_TO_PRINT_STACKS = 0.3

def work(seconds):
    time.sleep(seconds)

"""
FOREVER = 60


def run(script: str) -> tuple[int, str]:
    """The exit status and standard error of a process that runs the script."""
    done = subprocess.run(
        [sys.executable, "-c", START + script], capture_output=True, text=True, check=False, timeout=FOREVER
    )
    return done.returncode, done.stderr


def test_process_that_blocks_the_interpreter_ends_as_well():
    """By C code, since Python can't act while another thread holds its lock."""
    status, stderr = run(f"with watchdog(0, 2, 0.4): work(0.01); ctypes.PyDLL(None).sleep({FOREVER})")
    assert status == 1
    assert "Timeout (" in stderr
    assert "most recent call first" in stderr


@pytest.mark.parametrize(
    "script",
    [
        "with watchdog(0, 2, 3) as it:\n for _ in range(40): work(0.1); it.heartbeat()",
        "with watchdog(0, 2, 1) as it:\n with it.paused(): work(2)",
        "with watchdog(0, 1, 0.1): work(1)",
        "with watchdog(0, 2, 1): pass\nwork(2)",
    ],
    ids=["progress", "paused", "single process", "done"],
)
def test_process_is_left_alone(script):
    assert run(script) == (0, "")


def test_watchdog_acts_again_after_a_pause():
    script = f"with watchdog(3, 4, 0.5) as it:\n with it.paused(): work(1)\n print('over'); work({FOREVER})"
    status, stderr = run(script)
    assert status == FROZEN
    assert stderr.startswith("overnight: rank 3 made no progress for 0.5 s (--timeout-seconds)")
    assert "in work" in stderr
    assert "in watch_until" in stderr, "every thread"


def test_errors_pass_through():
    with pytest.raises(KeyError, match="of the caller"), watchdog(0, 2, 60):
        raise KeyError("of the caller")
