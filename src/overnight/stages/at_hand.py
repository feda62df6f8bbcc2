"""Which of a recipe's texts lie on this machine, prepared: those that are small are prepared first."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import NamedTuple

from overnight.cache import cache_folder
from overnight.stages.forecast import find_prepared
from overnight.stages.materials import DataConfig
from overnight.stages.texts import find_text, find_told_commands

SMALL_BYTES = 20_000_000  # of text: prepared in seconds


class TextAtHand(NamedTuple):
    """One text of a recipe."""

    path: str
    """As the recipe has it."""
    folder: Path | None
    """Its shards; None if there are none here."""
    why_not: str = ""
    """Why not, and what to do."""


def find_texts_at_hand(config: DataConfig, name: str) -> list[TextAtHand]:
    """All texts of the recipe `name`. Raises ValueError for one that is neither there nor known."""
    paths = [each.path for each in config.sources] or [config.data]
    return [_find(dataclasses.replace(config, data=path, sources=()), name) for path in paths]


def _find(config: DataConfig, name: str) -> TextAtHand:
    path = config.data
    if "://" in path:
        return TextAtHand(
            path, None, f"{path} lies elsewhere, and is verified shard by shard while it is read"
        )
    if prepared := find_prepared(config):
        return TextAtHand(path, prepared)
    folder, command = find_text(path, config)
    if is_small_and_local(path):
        from overnight.stages.materials import open_materials

        open_materials(dataclasses.replace(config, shuffle_tokens=None))
        return TextAtHand(path, Path(folder))
    command = find_told_commands(name).get(folder, command)
    if not command:
        from overnight.data.sources import source_name

        source_name(path)  # refuses, with what to do, what is not there
        command = ("overnight", "prepare", path)
    return TextAtHand(path, None, f"{folder} is not prepared yet: {shlex.join(command)}")


def is_small_and_local(path: str) -> bool:
    """True of text that `overnight prepare` is done with in seconds, without a network."""
    from overnight.data.files import find_files, is_remote

    if path == "python-docs":
        return True
    if path == "shakespeare":
        return (cache_folder() / "shakespeare" / "input.txt").is_file()
    if is_remote(path) or not Path(path).exists():
        return False
    return sum(file.bytes for file in find_files(path)) <= SMALL_BYTES
