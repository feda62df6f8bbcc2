"""The texts of a recipe that are prepared on this machine, or can be within seconds."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import NamedTuple

from overnight.data import DataConfig
from overnight.data.text_files import find_files, is_remote
from overnight.planning.estimate import find_prepared
from overnight.preparation.prepare import ensure_prepared
from overnight.preparation.prepare_commands import find_listed_commands, find_recipe_text
from overnight.preparation.sources import source_name
from overnight.run_directory import cache_folder

SMALL_BYTES = 20_000_000  # of text: prepared in seconds


class LocalDataset(NamedTuple):
    """One text of a recipe."""

    path: str
    """As the recipe has it."""
    folder: Path | None
    """Its shards; None if there are none here."""
    missing_reason: str = ""
    """Why there are none, and what to do."""


def find_local_datasets(config: DataConfig, name: str) -> list[LocalDataset]:
    """All texts of the recipe `name`. Raises ValueError for one that does not exist."""
    paths = [each.path for each in config.mixture] or [config.data]
    return [_find(path, config, name) for path in paths]


def _find(path: str, config: DataConfig, name: str) -> LocalDataset:
    if "://" in path:
        return LocalDataset(path, None, f"{path} is remote: each shard is verified when it is read")
    if prepared := find_prepared(path, config.tokenizer):
        return LocalDataset(path, prepared)
    folder, command = find_recipe_text(path, config)
    if is_small_and_local(path):
        ensure_prepared(dataclasses.replace(config, data=path, mixture=(), shuffle_window=None))
        return LocalDataset(path, Path(folder))
    command = find_listed_commands(name).get(folder, command)
    if not command:
        source_name(path)  # raises ValueError if the source does not exist
        command = ("overnight", "prepare", path)
    return LocalDataset(path, None, f"{folder} is not prepared yet: {shlex.join(command)}")


def is_small_and_local(path: str) -> bool:
    """True for text that `overnight prepare` can prepare within seconds and without a network."""
    if path == "python-docs":
        return True
    if path == "shakespeare":
        return (cache_folder() / "shakespeare" / "input.txt").is_file()
    if is_remote(path) or not Path(path).exists():
        return False
    return sum(file.bytes for file in find_files(path)) <= SMALL_BYTES
