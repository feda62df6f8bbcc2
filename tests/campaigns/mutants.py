"""Replace a part of overnight in the process of a trial, by a string such as "overnight.run.train:fit".

Each such string in this folder is resolved by a test, so that a mutant does not outlive what it replaces.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any


def resolve(target: str) -> tuple[Any, str]:
    """The module or class that defines `target` ("module:name" or "module:Class.name"), and the name."""
    module, _, path = target.partition(":")
    owner: Any = importlib.import_module(module)
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    if not hasattr(owner, name):
        raise AttributeError(f"{target} does not exist")
    return owner, name


def original(target: str) -> Any:
    """What `target` is at present."""
    owner, name = resolve(target)
    return getattr(owner, name)


def replace(target: str, new: object) -> None:
    """Make `target` `new`, also in each of overnight's modules that has imported it by its name."""
    owner, name = resolve(target)
    real = getattr(owner, name)
    setattr(owner, name, new)
    for module in [module for key, module in sys.modules.items() if key.startswith("overnight.")]:
        if vars(module).get(name) is real:
            setattr(module, name, new)
