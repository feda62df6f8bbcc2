from __future__ import annotations

import sys

import pytest

from overnight.terminal import echo, progress


def test_people_are_told_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    echo("hello")
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", "hello\n")


def test_without_a_terminal_a_stage_is_one_line_at_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("reading", 3, "files") as advance:
        advance()
        advance(2, "a note")
        assert capsys.readouterr().err == ""
    assert capsys.readouterr().err.startswith("reading: 3 files in 0.")


def test_a_stage_without_a_unit_is_told_by_its_last_note(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("train", 3000) as advance:
        advance(1000, "step 1")
        advance(2000, "step 2")
    assert capsys.readouterr().err.startswith("train: step 2 in 0.")


def test_a_stage_that_failed_is_not_told_as_done(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="bad"), progress("reading", 3, "files"):
        raise ValueError("bad")
    assert capsys.readouterr().err == ""


def test_on_a_terminal_a_bar_is_drawn_in_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
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
