"""A stream that can't be written to, at any time, does not stop a run: its own files are what counts."""

import errno
import io
import os
import signal
import subprocess
import sys

import pytest

from overnight import terminal
from overnight.run import train
from overnight.run_directory import RunDirectory
from overnight.terminal import echo, progress
from overnight.training.checkpoint import save


class Failing(io.StringIO):
    """A stream that fails after some writes, on a terminal or elsewhere."""

    def __init__(self, error, writes, is_terminal):
        super().__init__()
        self.error, self.left, self.is_terminal = error, writes, is_terminal

    def write(self, text):
        self.left -= 1
        if self.left < 0:
            raise self.error
        return super().write(text)

    def isatty(self):
        return self.is_terminal


ERRORS = {
    "full": OSError(errno.ENOSPC, "No space left on device"),
    "broken pipe": BrokenPipeError(errno.EPIPE, "Broken pipe"),
    "hung up": OSError(errno.EIO, "Input/output error"),
    "closed": ValueError("I/O operation on closed file"),
}


@pytest.mark.parametrize("is_terminal", [False, True])
@pytest.mark.parametrize("writes", [0, 12])  # from the beginning, and within the run
@pytest.mark.parametrize("error", ERRORS)
def test_run_goes_on_without_its_stream(
    error, writes, is_terminal, recipe, finished_run, metrics_of, tmp_path, monkeypatch
):
    directory = RunDirectory(tmp_path / "run")
    stream = Failing(ERRORS[error], writes, is_terminal)
    monkeypatch.setattr(terminal, "_unprinted", type(terminal._unprinted)())
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        train.train_recipe(recipe(), directory)
    assert metrics_of(directory) == metrics_of(finished_run)
    kept = directory.unprinted.read_text() if directory.unprinted.is_file() else ""
    assert is_terminal or "step     12  validation loss" in stream.getvalue() + kept
    assert writes or is_terminal or kept


def test_stream_that_fails_would_stop_a_run(monkeypatch):
    """Negative control: without the guard the errors reach the caller."""
    monkeypatch.setattr(sys, "stderr", Failing(ERRORS["full"], 0, False))
    with pytest.raises(OSError, match="No space"):
        sys.stderr.write("a line")
    echo("a line")
    with progress("train", 3) as advance:
        advance()
    monkeypatch.setattr(sys, "stderr", None)
    echo("a line")


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_files_do_not_take_the_place_of_closed_streams(closed, tmp_path):
    """Else what libraries print would be written into a checkpoint."""
    program = "import os; from overnight.distributed import launcher; launcher.open_missing_streams(); "
    program += "os.open('first', os.O_CREAT | os.O_RDWR); os.write(2, b'x'); print('y')"
    command = f"'{sys.executable}' -c \"{program}\" {closed}"
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, check=False)  # noqa: S602
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "first").read_bytes() == b""


def test_closed_terminal_saves_the_run(recipe, tmp_path, monkeypatch):
    """SIGHUP, unless the run was started with nohup."""
    directory = RunDirectory(tmp_path / "run")
    must_stop, seen = train.must_stop, []

    def hang_up(run, *given):
        if run.state.step == 4 and not seen:
            seen.append(run.state.step)
            os.kill(os.getpid(), signal.SIGHUP)
        return must_stop(run, *given)

    monkeypatch.setattr(train, "must_stop", hang_up)
    with pytest.raises(KeyboardInterrupt):
        train.train_recipe(recipe(), directory)
    assert (directory.checkpoints / "step-00000004").is_dir()
    seen.clear()
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        train.train_recipe(recipe(run_name="detached"), RunDirectory(tmp_path / "detached"))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert seen


def test_end_is_recorded_where_the_failed_checkpoint_was(recipe, tmp_path, monkeypatch):
    """A full disk, without the room that the unfinished checkpoint takes; the error names the run."""
    directory = RunDirectory(tmp_path / "run")
    record_end, write_tensors = RunDirectory.record_end, save.write_tensors

    def no_room(path, pieces):
        write_tensors(path, pieces)
        raise OSError(errno.ENOSPC, "No space left on device")

    def record(self, step, reason):
        assert not list(self.checkpoints.glob(".building-*")), "no room"
        record_end(self, step, reason)

    monkeypatch.setattr(save, "write_tensors", no_room)
    monkeypatch.setattr(RunDirectory, "record_end", record)
    with pytest.raises(OSError, match=f"No space left on device: '{directory.path}'"):
        train.train_recipe(recipe(), directory)
    assert f"'{directory.path}'" in directory.ended.read_text()
