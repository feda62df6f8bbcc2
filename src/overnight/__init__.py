"""Reproduce GPT-2 while you sleep; keep the proof when you wake.

`overnight.load`, `prepare` and `train` are the Python interface, `GPT` and `ModelConfig` the plain model.
They are imported on first use, so that the command line starts without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from overnight.api import Model, Run, load, prepare, train
    from overnight.model.gpt import GPT
    from overnight.model.model_config import ModelConfig
    from overnight.recipe import Recipe

__version__ = "0.1.0"
__all__ = ["GPT", "Model", "ModelConfig", "Recipe", "Run", "load", "prepare", "train"]

_MODULES = {"GPT": "model.gpt", "ModelConfig": "model.model_config", "Recipe": "recipe"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'overnight' has no attribute {name!r}")
    return getattr(importlib.import_module(f"overnight.{_MODULES.get(name, 'api')}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
