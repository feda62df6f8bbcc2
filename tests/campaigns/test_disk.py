"""In which order a run's bytes come to the disk, and what is left behind by a save that did not end."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from overnight import run_directory
from overnight.model.gpt import GPT, initialize
from overnight.model.model_config import ModelConfig
from overnight.run_directory import RunDirectory, write_atomically
from overnight.training import OptimizerConfig
from overnight.training.checkpoint import format
from overnight.training.checkpoint.format import TensorShard, list_checkpoints, write_tensors
from overnight.training.checkpoint.save import save_checkpoint
from overnight.training.optim import build_optimizer
from overnight.training.state import TrainState


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(path, bytes in it) of each file or folder whenever the disk is told to keep it."""
    found: list[tuple[str, int]] = []

    def keep(descriptor: int) -> None:
        found.append((os.readlink(f"/proc/self/fd/{descriptor}"), os.fstat(descriptor).st_size))

    monkeypatch.setattr(run_directory, "flush_to_disk", keep)
    return found


@pytest.mark.parametrize("size", [1, 100, 10**5])
def test_all_bytes_are_with_the_kernel_when_the_disk_is_told_to_keep_them(
    tmp_path: Path, kept: list[tuple[str, int]], size: int
) -> None:
    write_atomically(tmp_path / "file", "x" * size)
    (_, first), (folder, _) = kept
    assert first == size
    assert folder == str(tmp_path)


def test_the_name_of_a_new_run_is_kept_too(tmp_path: Path, kept: list[tuple[str, int]]) -> None:
    directory = RunDirectory(tmp_path / "runs" / "small")
    directory.begin("", {})
    assert {str(tmp_path), str(tmp_path / "runs"), str(directory.path)} <= {path for path, _ in kept}
    kept.clear()
    directory.begin("", {})
    assert str(tmp_path) not in {path for path, _ in kept}


def test_what_the_disk_refuses_is_an_error_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command tells of an OSError in one sentence; of safetensors' own error it knows nothing."""

    def refuse(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(format, "save_file", refuse)
    with pytest.raises(OSError, match=r"model.safetensors can't be written: .*No space left"):
        write_tensors(tmp_path / "model.safetensors", {"wte": TensorShard(torch.zeros(2), 0)})


def test_what_a_killed_save_has_left_is_gone_after_the_next(tmp_path: Path) -> None:
    """Also that of a step at which nobody saves any more: a run stopped by a signal saves at any step."""
    model = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=16, context_length=8, vocab_size=50))
    initialize(model, 0)
    state = TrainState(model, build_optimizer(model, OptimizerConfig()))
    left = tmp_path / ".building-step-00000007"
    left.mkdir()
    (left / "model.safetensors").write_text("half")
    path = save_checkpoint(state, tmp_path)
    assert [*tmp_path.iterdir()] == list_checkpoints(tmp_path) == [path]
