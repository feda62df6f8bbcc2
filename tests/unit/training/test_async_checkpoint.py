"""A checkpoint that a thread writes: the state as it was copied, published when complete, or an error."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from overnight.distributed.world import SINGLE_PROCESS
from overnight.training.checkpoint import save
from overnight.training.checkpoint.format import list_checkpoints
from overnight.training.checkpoint.load import verify_checkpoint
from overnight.training.checkpoint.save import Saver, save_checkpoint


@pytest.fixture
def state(build_state):
    """A state after one step."""
    return build_state(1)


def build_saver(folder: Path) -> Saver:
    return Saver(folder, SINGLE_PROCESS, lambda: None, lambda: None, {})


def contents(checkpoint: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in checkpoint.iterdir()}


@pytest.fixture
def gate(monkeypatch):
    """Threads write nothing before it is set."""
    gate = threading.Event()
    write_rank_files = save.write_rank_files

    def wait_and_write(*given):
        assert gate.wait(60)
        return write_rank_files(*given)

    monkeypatch.setattr(save, "write_rank_files", wait_and_write)
    return gate


@pytest.mark.parametrize("is_copied", [True, False])
def test_checkpoint_is_of_the_state_as_it_was_copied(tmp_path, state, train_on, gate, monkeypatch, is_copied):
    """As a synchronous save writes it, though everything has changed since; not so without a copy."""
    if not is_copied:
        monkeypatch.setattr(save, "_copy", dict)
    gate.set()
    expected = contents(save_checkpoint(state, tmp_path / "synchronous"))
    gate.clear()
    saver = build_saver(tmp_path / "asynchronous")
    saver.save(state)
    train_on(state, 3)
    saver.poll()
    assert list_checkpoints(tmp_path / "asynchronous") == []
    gate.set()
    saver.wait()
    (found,) = list_checkpoints(tmp_path / "asynchronous")
    verify_checkpoint(found)
    assert (contents(found) == expected) == is_copied


def test_checkpoints_are_written_in_turn_between_flush_and_deletion(tmp_path, state, train_on):
    seen: list[tuple[str, int]] = []

    def note(what):
        return lambda: seen.append((what, len(list_checkpoints(tmp_path))))

    saver = Saver(tmp_path, SINGLE_PROCESS, note("flush"), note("delete"), {})
    for _ in range(3):
        saver.save(state)
        train_on(state, 1)
    saver.wait()
    saver.wait()
    assert seen == [("flush", 0), ("delete", 1), ("flush", 1), ("delete", 2), ("flush", 2), ("delete", 3)]
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"step-{step:08}" for step in (1, 2, 3)]


@pytest.mark.parametrize("raised_by", ["poll", "wait", "save"])
@pytest.mark.parametrize("moment", ["write_tensors", "flush_to_disk", "manifest", "write_atomically"])
def test_thread_s_error_is_raised_once(tmp_path, state, train_on, monkeypatch, capsys, moment, raised_by):
    saver = build_saver(tmp_path)

    def crash(*_, **__):
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(save, moment, crash)
        saver.save(state)
        saver.abandon()
    assert "no space" in capsys.readouterr().err
    train_on(state, 1)
    with pytest.raises(OSError, match="no space"):
        saver.save(state) if raised_by == "save" else getattr(saver, raised_by)()
    assert list_checkpoints(tmp_path) == []
    saver.save(state)
    saver.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]
