"""Everything that training changes: weights, optimizer, step. The rest of a run is a function of these."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.amp import GradScaler
from torch.optim import AdamW

from overnight.model.gpt import GPT


def build_scaler(device: str, precision: str | None) -> GradScaler:
    """What keeps float16 gradients from vanishing: on for fp16, and without effect for all else.

    The scale begins at 65,536, is halved by every overflow and doubled after 2,000 steps without one
    (Micikevicius et al. 2018, section 3.2; the numbers are torch's).
    """
    return GradScaler(device.partition(":")[0], enabled=precision == "fp16")


@dataclass
class TrainState:
    """A run at one moment."""

    model: GPT
    optimizer: AdamW
    step: int = 0
    """Finished optimizer steps."""
    scaler: GradScaler = field(default_factory=lambda: build_scaler("cpu", None))
    """The one thing that a run learns beside its weights, and only in fp16."""
