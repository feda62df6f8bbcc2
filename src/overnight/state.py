"""Everything that training changes: weights, optimizer, step. The rest of a run is a function of these."""

from __future__ import annotations

from dataclasses import dataclass

from torch.optim import AdamW

from overnight.model.gpt import GPT


@dataclass
class TrainState:
    """A run at one moment."""

    model: GPT
    optimizer: AdamW
    step: int = 0
    """Finished optimizer steps."""
