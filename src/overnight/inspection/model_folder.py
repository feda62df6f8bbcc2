"""What a folder in the format of Transformers contains."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from overnight.conversion.families import read_model_config
from overnight.conversion.open_model import open_model
from overnight.model.gpt import gpt2_sizes
from overnight.model.model_config import ModelConfig
from overnight.terminal import byte_size, echo, shell_command
from overnight.tokenizer.open_tokenizer import read_json_object

CONFIG = "config.json"
WIDTH = 80


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """A model of Transformers that can be evaluated, continued and generated from."""

    folder: str
    class_name: str
    """The class of Transformers."""
    parameters: int
    weights_bytes: int
    model: dict[str, Any]
    """The fields of our configuration."""
    switches: dict[str, Any]
    """Those of them in which it is not GPT-2."""
    tokenizer: str
    end_ids: list[int]
    """The ids that end a text."""


def print_model(folder: Path, *, as_json: bool) -> None:
    """Print what a folder contains. Raises ValueError if its files do not fit each other."""
    found = inspect_model(folder)
    if as_json:
        sys.stdout.write(json.dumps(asdict(found), indent=2) + "\n")
        return
    for line in describe_model(found):
        echo(line)


def inspect_model(folder: Path) -> ModelFolder:
    """Read configuration, weights and tokenizer. Raises ValueError if one of them does not fit."""
    family, _ = read_model_config(read_json_object(folder / CONFIG), folder / CONFIG)
    opened = open_model(str(folder))
    config = opened.model.config
    return ModelFolder(
        folder=str(folder),
        class_name=family.class_name,
        parameters=config.parameter_count(),
        weights_bytes=sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        model=asdict(config),
        switches=_switches(config),
        tokenizer=opened.tokenizer.name,
        end_ids=sorted(opened.end_ids),
    )


def _switches(config: ModelConfig) -> dict[str, Any]:
    gpt2 = vars(gpt2_sizes(config))
    return {name: value for name, value in vars(config).items() if value != gpt2[name]}


def describe_model(found: ModelFolder) -> Iterator[str]:
    """The same in lines."""
    sizes = found.model
    yield f"{found.folder}: {found.class_name} of Transformers"
    yield f"{found.parameters:,} parameters, {byte_size(found.weights_bytes)} of weights"
    yield (
        f"{sizes['n_layer']} blocks, {sizes['n_head']} heads, {sizes['n_embd']} channels, context "
        f"{sizes['context_length']:,}, {sizes['vocab_size']:,} ids"
    )
    switches = [f"{name}={value}" for name, value in found.switches.items()]
    differs = f"differs from GPT-2 in {', '.join(switches)}" if switches else "it is a GPT-2"
    yield from textwrap.wrap(differs, WIDTH)
    yield f"tokenizer {found.tokenizer}; a text ends at the id {' or '.join(map(str, found.end_ids))}"
    yield f'next: {shell_command("generate", found.folder)} "Once upon a time"'
