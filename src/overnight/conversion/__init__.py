"""Reading and writing models in the formats of other programs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tyro.conf import Positional


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Write a model as a folder in the format of Hugging Face Transformers.

    The class is the one that computes the same: GPT-2, NanoChat, Llama, Qwen3, Qwen3Moe or DeepseekV3.
    """

    model: Positional[str]
    """A run, a checkpoint, a Hugging Face folder or name, a .pt file of nanoGPT or build-nanogpt."""
    to: Literal["hf"] = "hf"
    """The format: hf is Hugging Face's."""
    out: str | None = None
    """The folder to write; MODEL-hf in the current folder if left out."""
