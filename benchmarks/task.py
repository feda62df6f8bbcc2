"""What train_step.py asks of one side, and stepper.py reads from its standard input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LLM_C = "llm.c"


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a process is to train, and how."""

    peer: str | None
    """None: it is overnight that trains."""
    checkout: str | None
    """Where the peer lies; None for what is installed."""
    precision: str | None
    """fp32 or bf16; None: what `overnight train` takes on this machine."""
    compile: bool
    device: str
    """cpu or cuda."""
    model: Mapping[str, Any]
    """The fields of a ModelConfig."""
    rows: int
    """Of a micro-batch."""
    micro_batches: int
    """Of a step."""
    folder: str
    """For files, until all sides have ended. Its ids.npy holds the text, as one row of ids."""

    @property
    def ids(self) -> str:
        """The file of the text's ids."""
        return str(Path(self.folder) / "ids.npy")
