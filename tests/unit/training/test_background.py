"""A checkpoint that a thread writes: what was copied, published when whole, or an error that is told."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from overnight.distributed.world import SINGLE_PROCESS
from overnight.model.gpt import GPT, initialize
from overnight.model.model_config import ModelConfig
from overnight.training import OptimizerConfig
from overnight.training.checkpoint import save
from overnight.training.checkpoint.format import list_checkpoints
from overnight.training.checkpoint.load import verify_checkpoint
from overnight.training.checkpoint.save import Saver, save_checkpoint
from overnight.training.optim import apply_gradients, build_optimizer
from overnight.training.state import TrainState

CONFIG = ModelConfig(n_layer=1, n_head=2, n_embd=16, context_length=8, vocab_size=50)


def nothing() -> None:
    pass


@pytest.fixture
def state() -> TrainState:
    model = GPT(CONFIG)
    initialize(model, 0)
    state = TrainState(model, build_optimizer(model, OptimizerConfig()))
    train_on(state)
    return state


def train_on(state: TrainState) -> None:
    ids = torch.randint(50, (2, 8), generator=torch.Generator().manual_seed(state.step))
    state.model(ids).logsumexp(-1).sum().backward()
    apply_gradients(state.optimizer, list(state.model.parameters()), 1e-2, 1.0, state.scaler)
    state.step += 1


def contents(checkpoint: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in checkpoint.iterdir()}


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Threads write nothing before it is set."""
    gate = threading.Event()
    write_own = save.write_rank_files

    def wait_and_write(*given: Any) -> str:
        assert gate.wait(60)
        return write_own(*given)

    monkeypatch.setattr(save, "write_rank_files", wait_and_write)
    return gate


def test_what_is_saved_is_the_state_as_it_was(
    tmp_path: Path, state: TrainState, gate: threading.Event
) -> None:
    """Bytes as in the foreground, though every weight, moment and count has changed by then."""
    expected = contents(save_checkpoint(state, tmp_path / "foreground"))
    saver = Saver(tmp_path / "background", SINGLE_PROCESS, nothing, nothing, {})
    saver.save(state)
    for _ in range(3):
        train_on(state)
    saver.look()
    assert list_checkpoints(tmp_path / "background") == []
    gate.set()
    saver.finish()
    (found,) = list_checkpoints(tmp_path / "background")
    verify_checkpoint(found)
    assert contents(found) == expected


def test_without_a_copy_it_would_not_be(
    tmp_path: Path, state: TrainState, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control."""
    monkeypatch.setattr(save, "_copy", dict)
    expected = contents(save_checkpoint(state, tmp_path / "foreground"))
    saver = Saver(tmp_path / "background", SINGLE_PROCESS, nothing, nothing, {})
    saver.save(state)
    train_on(state)
    gate.set()
    saver.finish()
    assert contents(list_checkpoints(tmp_path / "background")[0]) != expected


def test_one_after_the_other_and_each_flushed_before_and_tidied_after(
    tmp_path: Path, state: TrainState
) -> None:
    seen: list[tuple[str, int]] = []

    def note(what: str) -> Callable[[], None]:
        return lambda: seen.append((what, len(list_checkpoints(tmp_path))))

    saver = Saver(tmp_path, SINGLE_PROCESS, note("flush"), note("tidy"), {})
    for _ in range(3):
        saver.save(state)
        train_on(state)
    saver.finish()
    saver.finish()
    assert seen == [("flush", 0), ("tidy", 1), ("flush", 1), ("tidy", 2), ("flush", 2), ("tidy", 3)]
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"step-{step:08}" for step in (1, 2, 3)]


@pytest.mark.parametrize("told_by", ["look", "finish", "save"])
@pytest.mark.parametrize("moment", ["write_tensors", "flush_to_disk", "manifest", "write_atomically"])
def test_what_goes_wrong_in_a_thread_is_told_once(
    tmp_path: Path,
    state: TrainState,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    moment: str,
    told_by: str,
) -> None:
    saver = Saver(tmp_path, SINGLE_PROCESS, nothing, nothing, {})

    def crash(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(save, moment, crash)
        saver.save(state)
        saver.settle()
    assert "the checkpoint under way is lost: no space" in capsys.readouterr().err
    train_on(state)
    with pytest.raises(OSError, match="no space"):
        saver.save(state) if told_by == "save" else getattr(saver, told_by)()
    assert list_checkpoints(tmp_path) == []
    saver.save(state)
    saver.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]
