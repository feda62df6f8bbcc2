from __future__ import annotations

import sys

import pytest

from overnight.terminal import progress, say


def test_people_are_told_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    say("hello")
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", "hello\n")


def test_without_a_terminal_a_stage_is_one_line_at_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("reading", 3, "files") as advance:
        advance()
        advance(2, "a note")
        assert capsys.readouterr().err == ""
    assert capsys.readouterr().err.startswith("reading: 3 files in 0.")


def test_a_stage_that_failed_is_not_told_as_done(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="bad"), progress("reading", 3, "files"):
        raise ValueError("bad")
    assert capsys.readouterr().err == ""


def test_on_a_terminal_a_bar_is_drawn_in_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    with progress("train", 2, "steps") as advance:
        advance(2, "loss 3.142  9,876 tokens/s")
    drawn = capsys.readouterr().err
    assert "loss 3.142  9,876 tokens/s" in drawn
    assert "2 steps" in drawn
