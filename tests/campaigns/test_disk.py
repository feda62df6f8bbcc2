"""The order in which a run reaches the disk, and what an interrupted save leaves behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from overnight import files, run_directory
from overnight.files import write_atomically
from overnight.model.gpt import GPT, initialize
from overnight.model.model_config import ModelConfig
from overnight.run_directory import RunDirectory
from overnight.training import OptimizerConfig
from overnight.training.checkpoint import format
from overnight.training.checkpoint.format import list_checkpoints, write_tensors
from overnight.training.checkpoint.save import save_checkpoint
from overnight.training.optim import build_optimizer
from overnight.training.state import TensorShard, TrainState


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(path, bytes in it) of each file or folder whenever the disk is told to keep it."""
    found: list[tuple[str, int]] = []

    def keep(descriptor: int) -> None:
        found.append((os.readlink(f"/proc/self/fd/{descriptor}"), os.fstat(descriptor).st_size))

    for module in (files, run_directory):
        monkeypatch.setattr(module, "flush_to_disk", keep)
    return found


@pytest.mark.parametrize("size", [1, 100, 10**5])
def test_file_is_complete_before_fsync(tmp_path: Path, kept: list[tuple[str, int]], size: int) -> None:
    write_atomically(tmp_path / "file", "x" * size)
    (_, first), (folder, _) = kept
    assert first == size
    assert folder == str(tmp_path)


def test_folder_of_new_run_is_flushed(tmp_path: Path, kept: list[tuple[str, int]]) -> None:
    directory = RunDirectory(tmp_path / "runs" / "small")
    directory.begin("", {})
    assert {str(tmp_path), str(tmp_path / "runs"), str(directory.path)} <= {path for path, _ in kept}
    kept.clear()
    directory.begin("", {})
    assert str(tmp_path) not in {path for path, _ in kept}


def test_full_disk_raises_os_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command reports an OSError in one sentence; safetensors raises an error of its own."""

    def refuse(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(format, "save_file", refuse)
    with pytest.raises(OSError, match=r"model.safetensors can't be written: .*No space left"):
        write_tensors(tmp_path / "model.safetensors", {"wte": TensorShard(torch.zeros(2), 0)})


def test_next_save_removes_leftovers_of_killed_save(tmp_path: Path) -> None:
    """Also of a step that is not saved again: a run stopped by a signal saves at any step."""
    model = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=16, context_length=8, vocab_size=50))
    initialize(model, 0)
    state = TrainState(model, build_optimizer(model, OptimizerConfig()))
    left = tmp_path / ".building-step-00000007"
    left.mkdir()
    (left / "model.safetensors").write_text("half")
    path = save_checkpoint(state, tmp_path)
    assert [*tmp_path.iterdir()] == list_checkpoints(tmp_path) == [path]
