"""Is what is saved what comes back? Weights, moments, step, to the bit."""

from __future__ import annotations

from pathlib import Path

import torch

from overnight import trainer
from overnight.checkpoint import loading, saving
from overnight.checks.check import Build, Finding
from overnight.state import TrainState

STEPS = 2


def check_saving(build: Build, folder: Path) -> Finding:
    """Train a little, save into `folder`, load into another state: all that training changes is the same."""
    saved, loaded = build(), build()
    for _ in range(STEPS):
        trainer.train_step(saved.state, saved.training)
    written = saving.save_checkpoint(saved.state, folder)
    loading.load_checkpoint(loaded.state, written)
    faults = _compare(saved.state, loaded.state)
    parameters = len(dict(saved.state.model.named_parameters()))
    return Finding(
        passed=not faults,
        measured="the same to the bit" if not faults else f"{len(faults)} differ",
        bound=f"{parameters} weights, moments, step",
        cause=f"a run that is resumed would not go on as it was: {'; '.join(faults[:3])}; look at "
        "save_checkpoint and load_checkpoint in the folder checkpoint",
        figures={"differences": len(faults)},
    )


def _compare(saved: TrainState, loaded: TrainState) -> list[str]:
    """What is not the same, in words."""
    faults = []
    if saved.step != loaded.step:
        faults.append(f"the step is {loaded.step} instead of {saved.step}")
    others = dict(loaded.model.named_parameters())
    for name, weight in saved.model.named_parameters():
        if not torch.equal(weight, others[name]):
            off = (weight - others[name]).detach().abs().max().item()
            faults.append(f"the weights {name} differ by {off:.1e}")
        before, after = saved.optimizer.state[weight], loaded.optimizer.state.get(others[name], {})
        faults += [
            f"{name} has lost AdamW's {moment}"
            if moment not in after
            else f"AdamW's {moment} of {name} differs"
            for moment, value in before.items()
            if moment not in after or not torch.equal(torch.as_tensor(value), torch.as_tensor(after[moment]))
        ]
    return faults
