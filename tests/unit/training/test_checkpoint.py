"""Checkpoints: verified, atomic, kept as configured; resumed to the bit."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from overnight.training.checkpoint import load, save
from overnight.training.checkpoint.format import (
    discard_checkpoints_after,
    keep_only,
    list_checkpoints,
    retained_steps,
)
from overnight.training.checkpoint.load import load_checkpoint, read_model, read_newest, verify_checkpoint
from overnight.training.checkpoint.save import save_checkpoint
from overnight.training.state import TrainState


def newest(folder: Path) -> Path | None:
    """The newest checkpoint that verifies."""

    def verified(checkpoint: Path) -> Path:
        verify_checkpoint(checkpoint)
        return checkpoint

    return read_newest(folder, verified)


def names_in(folder: Path) -> list[str]:
    return [path.name for path in list_checkpoints(folder)]


def weights_and_moments(state: TrainState) -> list[torch.Tensor]:
    parameters = list(state.model.parameters())
    return parameters + [value for each in parameters for value in state.optimizer.state[each].values()]


@pytest.mark.parametrize("steps", [0, 3])
def test_loaded_state_continues_exactly(tmp_path, build_state, train_on, steps):
    """Also one that was saved before its first step."""
    state, restored = build_state(steps), build_state(0, seed=9)
    path = save_checkpoint(state, tmp_path)
    assert path.name == f"step-0000000{steps}"
    load_checkpoint(restored, path)
    assert restored.step == steps
    for each in (state, restored):
        train_on(each, 4)
    pairs = zip(weights_and_moments(state), weights_and_moments(restored), strict=True)
    assert all(torch.equal(expected, found) for expected, found in pairs)


def test_model_can_be_read_alone_and_its_padding_is_not_saved(tmp_path, build_state):
    state = build_state(2)
    path = save_checkpoint(state, tmp_path)
    assert load_file(path / "model.safetensors")["wte.weight"].shape == (50, 16)
    model = read_model(path)
    assert model.config == state.model.config
    assert not model.training
    ids = torch.arange(8)[None]
    assert torch.equal(model(ids), state.model.eval()(ids))


def test_every_flipped_bit_is_detected(tmp_path, build_state):
    path = save_checkpoint(build_state(1), tmp_path)
    files, draw = sorted(path.iterdir()), random.Random(0)
    for trial in range(200):
        damaged = files[trial % len(files)]
        sound = damaged.read_bytes()
        data = bytearray(sound)
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        damaged.write_bytes(data)
        with pytest.raises(ValueError, match="damaged|incomplete"):
            verify_checkpoint(path)
        damaged.write_bytes(sound)
    verify_checkpoint(path)


def test_flipped_bit_would_pass_without_verification(tmp_path, build_state, monkeypatch):
    """The negative control: the manifest protects, not the file format."""
    path = save_checkpoint(build_state(1), tmp_path) / "model.safetensors"
    monkeypatch.setattr(load, "verify_checkpoint", lambda checkpoint, world: None)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # in a weight, behind the header
    path.write_bytes(data)
    read_model(path.parent)


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
def test_damaged_newest_checkpoint_is_passed_over(tmp_path, build_state, train_on, capsys, damage):
    assert newest(tmp_path) is None
    state = build_state(1)
    good = save_checkpoint(state, tmp_path)
    train_on(state, 1)
    damage(save_checkpoint(state, tmp_path))
    assert newest(tmp_path) == good
    assert "step-00000002" in capsys.readouterr().err
    damage(good)
    with pytest.raises(ValueError, match=str(tmp_path)):
        newest(tmp_path)


@pytest.mark.parametrize("seed", range(10))
def test_retention_keeps_newest_best_and_multiples(seed):
    """A thousand steps of a run as a set of numbers: saved, evaluated, deleted."""
    draw, is_best_kept = random.Random(seed), seed % 2 == 0
    last, every = draw.choice([None, 1, 2, 5]), draw.choice([None, 7, 100])
    steps: list[int] = []
    losses: dict[int, float] = {}
    for step in range(1, 1001):
        if draw.random() < 0.02:
            last = draw.choice([1, 2, 5])  # the run was resumed with another setting
        steps.append(step)
        if draw.random() < 0.7:
            losses[step] = draw.random()
        evaluated = [each for each in steps if each in losses]
        best = min(evaluated, key=losses.__getitem__) if evaluated and is_best_kept else None
        kept = retained_steps(steps, last, every, best)
        assert {*steps[-max(1, last or len(steps)) :]} <= kept <= {*steps}
        assert best is None or best in kept
        assert every is None or {each for each in steps if each % every == 0} <= kept
        steps = sorted(kept)
    assert len(steps) < 1000, "the control: something is deleted"


@pytest.mark.parametrize(
    "steps, last, best, kept", [([1, 2, 3], 0, None, {3}), ([], 2, None, set()), ([1, 2, 3], 1, 9, {3})]
)
def test_newest_is_always_kept(steps, last, best, kept):
    assert retained_steps(steps, last, best=best) == kept


@pytest.mark.parametrize("moment", ["write_tensors", "manifest", "flush_to_disk", "write_atomically"])
def test_crash_while_saving_leaves_the_one_before(tmp_path, build_state, train_on, monkeypatch, moment):
    state = build_state(1)
    good = save_checkpoint(state, tmp_path)
    train_on(state, 1)

    def crash(*_, **__):
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(save, moment, crash)
        with pytest.raises(OSError, match="no space"):
            save_checkpoint(state, tmp_path)
    assert newest(tmp_path) == good
    assert save_checkpoint(state, tmp_path).name == "step-00000002"


def test_passed_over_checkpoint_does_not_displace_a_good_one(tmp_path, build_state, train_on):
    """A damaged one, newer than where the run resumes, would be counted among those to keep."""
    state = build_state(1)
    save_checkpoint(state, tmp_path)
    truncate(save_checkpoint(build_state(2), tmp_path))
    discard_checkpoints_after(state.step, tmp_path)
    assert names_in(tmp_path) == ["step-00000001"]
    train_on(state, 1)
    save_checkpoint(state, tmp_path)
    keep_only(retained_steps([1, 2], 1), tmp_path)
    assert names_in(tmp_path) == ["step-00000002"]


def test_another_format_is_refused(tmp_path, build_state, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(save, "FORMAT", 99)
        path = save_checkpoint(build_state(1), tmp_path)
    with pytest.raises(ValueError, match="format 99"):
        read_model(path)
