"""What stops a run: the first signal after the step, the second at once."""

from __future__ import annotations

import signal

import pytest

from overnight.run.train import STOP_SIGNALS, StopConditions


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_first_signal_asks_and_the_second_interrupts(number):
    before = signal.getsignal(number)
    with StopConditions(None) as stop:
        assert not stop.is_met()
        signal.raise_signal(number)
        assert stop.is_met()
        assert stop.reason == "a signal"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) is before


def test_launched_process_may_get_a_signal_twice(monkeypatch):
    """Once from its sender and once from the launcher."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2" if "WORLD_SIZE" in name else "0")
    with StopConditions(None) as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.is_met()
