"""Lines and progress bars."""

from __future__ import annotations

import sys

import pytest

from overnight.terminal import echo, progress


def test_echo_prints_to_stderr(capsys):
    echo("hello")
    assert capsys.readouterr() == ("", "hello\n")


def test_progress_without_a_terminal_is_one_line_at_the_end(capsys):
    with progress("reading", 3, "files") as advance:
        advance()
        advance(2, "a note")
        assert capsys.readouterr().err == ""
    assert capsys.readouterr().err.startswith("reading: 3 files in ")


def test_progress_without_a_unit_prints_its_last_note(capsys):
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
    note = "step 19,073  loss 3.142  1,234,567 tokens/s"
    with progress("train", 2000) as advance:
        advance(2000, note)
    drawn = capsys.readouterr().err
    assert note in drawn
    assert "2,000" not in drawn
