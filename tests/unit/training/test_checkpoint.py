from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from overnight.model.gpt import GPT, initialize
from overnight.model.model_config import ModelConfig
from overnight.training import OptimizerConfig
from overnight.training.checkpoint import load, save
from overnight.training.checkpoint.format import (
    discard_checkpoints_after,
    keep_only,
    list_checkpoints,
    retained_steps,
)
from overnight.training.checkpoint.load import load_checkpoint, read_model, read_newest, verify_checkpoint
from overnight.training.checkpoint.save import save_checkpoint
from overnight.training.optim import apply_gradients, build_optimizer
from overnight.training.state import TrainState

CONFIG = ModelConfig(n_layer=1, n_head=2, n_embd=16, context_length=8, vocab_size=50)


def trained_state(steps: int, seed: int = 0) -> TrainState:
    model = GPT(CONFIG)
    initialize(model, seed)
    state = TrainState(model, build_optimizer(model, OptimizerConfig()))
    train_on(state, steps)
    return state


def train_on(state: TrainState, steps: int) -> None:
    for _ in range(steps):
        ids = torch.randint(50, (2, 8), generator=torch.Generator().manual_seed(state.step))
        state.model(ids).logsumexp(-1).sum().backward()
        apply_gradients(state.optimizer, list(state.model.parameters()), 1e-2, 1.0, state.scaler)
        state.step += 1


def newest(folder: Path) -> Path | None:
    """The newest checkpoint that verifies."""

    def verified(checkpoint: Path) -> Path:
        verify_checkpoint(checkpoint)
        return checkpoint

    return read_newest(folder, verified)


def everything(state: TrainState) -> dict[str, torch.Tensor]:
    """Weights and moments by name."""
    found = {name: parameter.detach().clone() for name, parameter in state.model.named_parameters()}
    for name, parameter in state.model.named_parameters():
        for key, value in state.optimizer.state[parameter].items():
            found[f"{name}.{key}"] = value.clone()
    return found


def test_a_loaded_state_goes_on_exactly_as_the_saved_one(tmp_path: Path) -> None:
    state = trained_state(3)
    path = save_checkpoint(state, tmp_path)
    assert path.name == "step-00000003"
    restored = trained_state(0, seed=9)
    load_checkpoint(restored, path)
    assert restored.step == 3
    for goes_on in (state, restored):
        train_on(goes_on, 4)
    expected, found = everything(state), everything(restored)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_state_before_its_first_step_can_be_saved(tmp_path: Path) -> None:
    path = save_checkpoint(trained_state(0), tmp_path)
    restored = trained_state(0, seed=9)
    load_checkpoint(restored, path)
    assert restored.step == 0


def test_the_padding_of_the_vocabulary_is_not_saved(tmp_path: Path) -> None:
    path = save_checkpoint(trained_state(1), tmp_path)
    assert load_file(path / "model.safetensors")["wte.weight"].shape == (50, 16)


def test_a_model_can_be_read_by_itself(tmp_path: Path) -> None:
    state = trained_state(2)
    model = read_model(save_checkpoint(state, tmp_path))
    assert model.config == CONFIG
    assert not model.training
    ids = torch.arange(8)[None]
    assert torch.equal(model(ids), state.model.eval()(ids))


def flip_bit(path: Path, where: random.Random) -> None:
    data = bytearray(path.read_bytes())
    position = where.randrange(len(data))
    data[position] ^= 1 << where.randrange(8)
    path.write_bytes(data)


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    path = save_checkpoint(trained_state(1), tmp_path)
    files = sorted(path.iterdir())
    where = random.Random(0)
    for trial in range(200):
        damaged = files[trial % len(files)]
        sound = damaged.read_bytes()
        flip_bit(damaged, where)
        with pytest.raises(ValueError, match="damaged|incomplete"):
            verify_checkpoint(path)
        damaged.write_bytes(sound)
    verify_checkpoint(path)


def test_without_verification_most_flipped_bits_would_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: it is the manifest that protects, not the file format."""
    path = save_checkpoint(trained_state(1), tmp_path)
    monkeypatch.setattr(load, "verify_checkpoint", lambda checkpoint, world: None)
    sound = (path / "model.safetensors").read_bytes()
    where, passed = random.Random(0), 0
    for _ in range(20):
        flip_bit(path / "model.safetensors", where)
        try:
            read_model(path)
            passed += 1
        except Exception:  # noqa: BLE001, S110  # any refusal counts as one
            pass
        (path / "model.safetensors").write_bytes(sound)
    assert passed > 0


def truncate(path: Path) -> None:
    file = path / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def swap(path: Path) -> None:
    one, other = path / "model.safetensors", path / "optimizer.safetensors"
    one.rename(path / "held")
    other.rename(one)
    (path / "held").rename(other)


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        swap,
        lambda path: (path / "state.json").unlink(),
        lambda path: (path / "MANIFEST.json").unlink(),
        lambda path: (path / "MANIFEST.json").write_text("{}"),
    ],
)
def test_a_damaged_newest_checkpoint_is_passed_over_loudly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None]
) -> None:
    state = trained_state(1)
    good = save_checkpoint(state, tmp_path)
    train_on(state, 1)
    damage(save_checkpoint(state, tmp_path))
    assert newest(tmp_path) == good
    assert "step-00000002" in capsys.readouterr().err
    damage(good)
    with pytest.raises(ValueError, match="no checkpoint"):
        newest(tmp_path)


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert newest(tmp_path / "checkpoints") is None


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    state = trained_state(0)
    for _ in range(4):
        train_on(state, 1)
        save_checkpoint(state, tmp_path)
        keep_only(retained_steps([*range(1, state.step + 1)], 2), tmp_path)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000003", "step-00000004"]


class Folder:
    """Ten thousand steps of a run as sets of numbers: what is saved, judged, damaged, deleted."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.steps: list[int] = []
        self.losses: dict[int, float] = {}
        self.deleted: set[int] = set()

    def save(self, step: int, last: int | None, every: int | None, *, is_best_kept: bool) -> None:
        self.steps.append(step)
        if self.draw.random() < 0.7:
            self.losses[step] = self.draw.random()
        judged = [each for each in self.steps if each in self.losses]
        best = min(judged, key=self.losses.__getitem__) if judged and is_best_kept else None
        kept = retained_steps(self.steps, last, every, best)
        assert kept <= {*self.steps}
        assert {*self.steps[-max(1, last or len(self.steps)) :]} <= kept, "the newest"
        assert best is None or best in kept
        assert every is None or {each for each in self.steps if each % every == 0} <= kept
        self.deleted |= {*self.steps} - kept
        self.steps = sorted(kept)


@pytest.mark.parametrize("seed", range(10))
def test_retention_never_deletes_what_is_to_be_kept(seed: int) -> None:
    folder = Folder(seed)
    last, every = folder.draw.choice([None, 1, 2, 5]), folder.draw.choice([None, 7, 100])
    for step in range(1, 1001):
        if folder.draw.random() < 0.02:
            last = folder.draw.choice([1, 2, 5])  # the run was resumed with another setting
        folder.save(step, last, every, is_best_kept=seed % 2 == 0)
        assert folder.steps[-1] == step
    assert folder.deleted, "the control: something is deleted"


def test_the_newest_is_kept_whatever_is_asked() -> None:
    assert retained_steps([1, 2, 3], 0) == {3}
    assert retained_steps([], 2) == set()
    assert retained_steps([1, 2, 3], 1, best=9) == {3}


def test_a_crash_while_saving_leaves_the_checkpoint_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = trained_state(1)
    good = save_checkpoint(state, tmp_path)
    train_on(state, 1)
    for moment in ("write_tensors", "manifest", "flush_to_disk", "write_atomically"):
        with monkeypatch.context() as patched:

            def crash(*_: object, **__: object) -> None:
                raise OSError("no space left on device")

            patched.setattr(save, moment, crash)
            with pytest.raises(OSError, match="no space"):
                save_checkpoint(state, tmp_path)
        assert newest(tmp_path) == good, moment
    assert newest(tmp_path) == good
    assert save_checkpoint(state, tmp_path).name == "step-00000002"
    shutil.rmtree(tmp_path)


def test_a_passed_over_checkpoint_does_not_crowd_out_a_good_one(tmp_path: Path) -> None:
    """A damaged one that is newer than where the run goes on would be counted among those to keep."""
    state = trained_state(1)
    save_checkpoint(state, tmp_path)
    later = trained_state(2)
    truncate(save_checkpoint(later, tmp_path))
    discard_checkpoints_after(state.step, tmp_path)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000001"]
    train_on(state, 1)
    assert newest(tmp_path) != save_checkpoint(state, tmp_path)
    keep_only(retained_steps([1, 2], 1), tmp_path)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002"]


def test_another_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(save, "FORMAT", 99)
        path = save_checkpoint(trained_state(1), tmp_path)
    with pytest.raises(ValueError, match="damaged|format 99"):
        read_model(path)
