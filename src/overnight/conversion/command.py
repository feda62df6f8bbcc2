"""The command `overnight convert`: write a model in a format that other programs read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from overnight.terminal import echo


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Write a model as a folder that Hugging Face Transformers opens, and all that reads its format."""

    model: Positional[str]
    """A run, a checkpoint, a Hugging Face folder or name, a .pt file of nanoGPT or build-nanogpt."""
    to: Literal["hf"] = "hf"
    """The format: hf is Hugging Face's."""
    out: str | None = None
    """The folder to write; MODEL-hf in the current folder if left out."""


def run(config: ConvertConfig) -> Path:
    """Write the folder and say where it lies. Raises ValueError if it is already there."""
    from overnight.conversion.huggingface import write_huggingface
    from overnight.conversion.open_model import open_model

    opened = open_model(config.model)
    origin = opened.run or Path(config.model)
    name = origin.stem if origin.is_file() else origin.resolve().name
    folder = Path(config.out) if config.out else Path(f"{name}-{config.to}")
    write_huggingface(opened.model, opened.tokenizer, folder)
    size = sum(path.stat().st_size for path in folder.iterdir())
    echo(f"wrote {opened.origin} as {folder}: {size / 1e6:,.1f} MB, opened by Transformers' from_pretrained")
    echo(f'next: overnight generate {folder} "Once upon a time"')
    return folder
