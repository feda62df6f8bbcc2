"""Checkpoints: verified, kept as configured, and written by a thread."""

from __future__ import annotations

import json
import random
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.amp import GradScaler

from overnight.distributed.world import SINGLE_PROCESS
from overnight.model.gpt import GPT
from overnight.model.model_config import ModelConfig
from overnight.training import OptimizerConfig
from overnight.training.checkpoint import load, save
from overnight.training.checkpoint.format import (
    FORMAT,
    discard_checkpoints_after,
    file_digest,
    keep_only,
    list_checkpoints,
    manifest,
    retained_steps,
)
from overnight.training.checkpoint.load import (
    load_checkpoint,
    open_checkpoint,
    read_model,
    read_newest,
    verify_checkpoint,
)
from overnight.training.checkpoint.save import Saver, save_checkpoint
from overnight.training.guard import Guard
from overnight.training.optim import build_optimizer, step_if
from overnight.training.state import TensorShard, TrainState

CONFIG = ModelConfig(n_layer=1, n_head=2, n_embd=16, context_length=8, vocab_size=50)


def train_on(state: TrainState, steps: int) -> None:
    """Take steps on ids that are a function of the step."""
    for _ in range(steps):
        ids = torch.randint(50, (2, 8), generator=torch.Generator().manual_seed(state.step))
        state.model(ids).logsumexp(-1).sum().backward()
        step_if(state.optimizer, state.scaler, torch.tensor(True), 1e-2)
        state.optimizer.zero_grad(set_to_none=True)
        state.step += 1


def build_state(steps: int) -> TrainState:
    """The state of a tiny model after some steps."""
    model = GPT(CONFIG, seed=0)
    state = TrainState(model, build_optimizer(model, OptimizerConfig()))
    train_on(state, steps)
    return state


def newest(folder: Path) -> Path | None:
    """The newest checkpoint that verifies."""
    found = read_newest(folder, open_checkpoint)
    return found and found.path


def test_model_can_be_read_alone_and_its_padding_is_not_saved(tmp_path):
    state = build_state(2)
    path = save_checkpoint(state, tmp_path)
    assert load_file(path / "model.safetensors")["wte.weight"].shape == (50, 16)
    model = read_model(path)
    assert model.config == state.model.config
    assert not model.training
    ids = torch.arange(8)[None]
    assert torch.equal(model(ids), state.model.eval()(ids))


def test_every_flipped_bit_is_detected(tmp_path):
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


def test_flipped_bit_would_pass_without_verification(tmp_path, monkeypatch):
    """The negative control: the manifest protects, not the file format."""
    path = save_checkpoint(build_state(1), tmp_path) / "model.safetensors"
    monkeypatch.setattr(load, "verify_checkpoint", lambda checkpoint, world: None)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # in a weight, behind the header
    path.write_bytes(data)
    read_model(path.parent)


def test_all_of_a_state_is_restored(tmp_path):
    state = build_state(3)
    state.step, state.guard = 5, Guard(losses=(3.0, 2.5), norms=(1.0, 0.5), bad_steps=2)  # two were skipped
    state.scaler = GradScaler("cpu", init_scale=8.0)
    restored = build_state(0)
    restored.scaler = GradScaler("cpu", init_scale=4.0)
    load_checkpoint(restored, save_checkpoint(state, tmp_path))
    assert (restored.step, restored.guard, restored.scaler.get_scale()) == (5, state.guard, 8.0)
    for ours, theirs in zip(restored.model.parameters(), state.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        found, expected = restored.optimizer.state[ours], state.optimizer.state[theirs]
        assert found["step"] == expected["step"] == 3
        assert all(torch.equal(found[name], expected[name]) for name in ("exp_avg", "exp_avg_sq"))


def write_about(path: Path, **changes: object) -> None:
    """Change state.json and confirm it in the manifest."""
    state = path / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), **changes}))
    files = {file.name: file_digest(file) for file in path.iterdir() if file.name != "MANIFEST.json"}
    (path / "MANIFEST.json").write_text(manifest(files, FORMAT))


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"format": FORMAT + 1}, f"format {FORMAT + 1}, .* reads {FORMAT}"),
        ({"files": {"model": ["model-00001-of-00002.safetensors"]}}, "model-00001-of-00002"),
        ({"model": {**vars(CONFIG), "n_embd": 32}}, r"do not fit the model: h\.0\..*wte\.weight"),
        ({"model": {**vars(CONFIG), "n_layer": 2}}, r"do not fit the model: h\.1\."),
    ],
)
def test_checkpoint_of_another_version_or_model_is_refused(tmp_path, changes, named):
    path = save_checkpoint(build_state(1), tmp_path)
    write_about(path)
    read_model(path)
    write_about(path, **changes)
    verify_checkpoint(path)
    with pytest.raises(ValueError, match=named):
        read_model(path)


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
        lambda path: (path / "MANIFEST.json").write_text("[" * 100_000),
        lambda path: (path / "MANIFEST.json").write_text(manifest({}, FORMAT)),
    ],
)
def test_damaged_newest_checkpoint_is_passed_over(tmp_path, capsys, damage):
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


def test_passed_over_checkpoint_does_not_displace_a_good_one(tmp_path):
    """A damaged one, newer than where the run resumes, would be counted among those to keep."""
    state = build_state(1)
    save_checkpoint(state, tmp_path)
    truncate(save_checkpoint(build_state(2), tmp_path))
    discard_checkpoints_after(state.step, tmp_path)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000001"]
    train_on(state, 1)
    save_checkpoint(state, tmp_path)
    keep_only(retained_steps([1, 2], 1), tmp_path)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002"]


def build_saver(folder: Path) -> Saver:
    return Saver(folder, SINGLE_PROCESS, lambda step: None, lambda: None, {})


def files_of(checkpoint: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in checkpoint.iterdir()}


@pytest.mark.parametrize("is_copied", [True, False])
def test_checkpoint_is_of_the_state_as_it_was_copied(tmp_path, monkeypatch, is_copied):
    """As a synchronous save writes it, though everything has changed since; not so without a copy."""
    if not is_copied:
        monkeypatch.setattr(
            save, "_copy", lambda tensors, length: {n: TensorShard(t[:length], 0) for n, t in tensors.items()}
        )
    state, gate, write_rank_files = build_state(1), threading.Event(), save.write_rank_files
    expected = files_of(save_checkpoint(state, tmp_path / "synchronous"))

    def wait_and_write(*given):
        assert gate.wait(60)
        return write_rank_files(*given)

    monkeypatch.setattr(save, "write_rank_files", wait_and_write)
    saver = build_saver(tmp_path / "asynchronous")
    saver.save(state)
    train_on(state, 3)
    saver.poll()
    assert list_checkpoints(tmp_path / "asynchronous") == []
    gate.set()
    saver.wait()
    (found,) = list_checkpoints(tmp_path / "asynchronous")
    verify_checkpoint(found)
    assert (files_of(found) == expected) == is_copied


def test_checkpoints_are_written_in_turn_between_flush_and_deletion(tmp_path):
    state, seen = build_state(1), []

    def note(what):
        return lambda *step: seen.append((what, *step, len(list_checkpoints(tmp_path))))

    saver = Saver(tmp_path, SINGLE_PROCESS, note("flush"), note("delete"), {})
    for _ in range(3):
        saver.save(state)
        train_on(state, 1)
    saver.wait()
    saver.wait()
    assert seen == [each for done in range(3) for each in (("flush", done + 1, done), ("delete", done + 1))]
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"step-{step:08}" for step in (1, 2, 3)]


@pytest.mark.parametrize("raised_by", ["poll", "wait", "save"])
@pytest.mark.parametrize("moment", ["write_tensors", "flush_to_disk", "manifest", "write_atomically"])
def test_thread_s_error_is_raised_once(tmp_path, monkeypatch, capsys, moment, raised_by):
    state, saver = build_state(1), build_saver(tmp_path)

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
