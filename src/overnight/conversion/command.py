"""The command `overnight convert`: write a model in another program's format."""

from __future__ import annotations

from pathlib import Path

from overnight.conversion import ConvertConfig
from overnight.conversion.huggingface import write_huggingface
from overnight.conversion.open_model import open_model
from overnight.terminal import byte_size, echo, shell_command


def run(config: ConvertConfig) -> Path:
    """Write the folder and return its path. Raises ValueError if it already exists."""
    opened = open_model(config.model)
    origin = opened.run or Path(config.model)
    name = origin.stem if origin.is_file() else origin.resolve().name
    folder = Path(config.out) if config.out else Path(f"{name}-{config.to}")
    class_name = write_huggingface(opened.model, opened.tokenizer, folder)
    written = sum(path.stat().st_size for path in folder.iterdir())
    echo(f"wrote {opened.origin} to {folder}: {byte_size(written)}, for Transformers' {class_name}")
    echo(f'next: {shell_command("generate", folder)} "Once upon a time"')
    return folder
