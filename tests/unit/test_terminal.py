"""Lines, progress bars, and numbers and durations as people read them."""

from __future__ import annotations

import math
import re
import sys

import pytest

from overnight.terminal import ago, byte_size, duration, echo, progress, scientific, short, significant

SHORT = {
    **{0: "0", 7: "7", 1234: "1,234", 9999: "9,999", 10_000: "10k", 12_345: "12.3k", 999_499: "999k"},
    **{999_600: "1M", 262_144_000: "262M", 1_048_576_000: "1.05B", 10**10: "10B", 2.5e12: "2.5T"},
    **{3e15: "3,000T", math.nan: "not finite"},
}
SIGNIFICANT = {
    **{(3.28123, 4): "3.281", (26.613, 4): "26.61", (0.98119, 4): "0.9812", (31415.9, 4): "31,416"},
    **{(0, 4): "0", (0.3149, 2): "0.31", (2.5e-7, 4): "2.500e-07", (math.inf, 4): "not finite"},
}
SCIENTIFIC = {6e-4: "6e-4", 2.5e-4: "2.5e-4", 0: "0", 0.003: "3e-3"}
DURATION = {
    **{0.42: "0.4 s", 9.96: "10 s", 59.7: "1 min", 125: "2 min 5 s", 3_600 * 3 + 720: "3 h 12 min"},
    **{3_599.9: "1 h", 86_400 * 2 + 3_600 * 4 + 59: "2 d 4 h"},
}
BYTE_SIZE = {
    **{
        0: "0 bytes",
        14: "14 bytes",
        999: "999 bytes",
        1_000: "1.00 kB",
        14_900: "14.9 kB",
        999_400: "999 kB",
    },
    **{999_500: "1.00 MB", 30_000_000: "30.0 MB", 1.49e9: "1.49 GB", 1.4e13: "14,000 GB"},
}
AGO = {-3: "just now", 61: "1 min ago", 7_300: "2 h ago", 90_000: "1 d ago"}


@pytest.mark.parametrize(
    "function, table",
    [
        *((short, SHORT), (scientific, SCIENTIFIC), (duration, DURATION)),
        *((ago, AGO), (byte_size, BYTE_SIZE)),
    ],
)
def test_number_format(function, table):
    assert {number: function(number) for number in table} == table
    assert {given: significant(*given) for given in SIGNIFICANT} == SIGNIFICANT


def test_echo_prints_to_stderr(capsys):
    echo("hello")
    assert capsys.readouterr() == ("", "hello\n")


def test_progress_without_a_terminal_is_one_line_at_the_end(capsys):
    with progress("reading", 3, "files") as advance:
        advance()
        advance(2, "a note")
        assert capsys.readouterr().err == ""
    assert capsys.readouterr().err.startswith("reading: 3 files in ")
    with progress("train", 3000) as advance:
        advance(1000, "step 1")
        advance(2000, "step 2")
    assert capsys.readouterr().err.startswith("train: step 2 in ")


def test_failed_progress_prints_nothing(capsys):
    with pytest.raises(ValueError, match="bad"), progress("reading", 3, "files"):
        raise ValueError("bad")
    assert capsys.readouterr().err == ""


def test_bar_fits_into_80_columns(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    with progress("read", 2, "files") as advance:
        advance(2, "the last")
    drawn = capsys.readouterr().err
    assert "2 files" in drawn
    assert "the last" in drawn
    note = "step 1,234 of 3,000  loss 3.142  12.3k tokens/s"
    with progress("train", 2_000_000) as advance:
        advance(0, "step 1 of 3,000  compiling")
    assert "0% time left unknown step 1 of 3,000  compiling\n" in printed(capsys)
    with progress("train", 2_000_000) as advance:
        for _ in range(3):
            advance(1000, note)
    drawn = printed(capsys)
    assert re.search(rf"0% [0-9. a-z]+ left {re.escape(note)}\n", drawn)
    assert "2,000" not in drawn


def printed(capsys):
    """What was drawn, without the terminal's codes."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
