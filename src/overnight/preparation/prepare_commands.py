"""The folders of shards that a recipe reads, and the commands that prepare them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from overnight.data import DataConfig, MixtureSource
from overnight.options import as_option
from overnight.preparation.prepare_config import PrepareConfig, output_folder
from overnight.preparation.sources import NAMED_SOURCES
from overnight.recipe import Recipe, with_settings

Command = tuple[str, ...]


@dataclass(frozen=True)
class JobText:
    """A folder of shards that a run reads."""

    folder: str
    """The folder as the recipe names it, or a URL, which every machine reads directly."""
    prepare: Command = ()
    """The command that prepares it; () if it needs files of this machine, or is unknown."""
    weight: float | None = None
    """The weight in a mixture; None outside a mixture."""

    @property
    def is_remote(self) -> bool:
        """True for a URL."""
        return "://" in self.folder


def find_recipe_texts(config: DataConfig, name: str, *, with_files: bool) -> tuple[JobText, ...]:
    """The texts of the recipe `name`; commands that need files of this machine only `with_files`."""
    sources: list[tuple[str, float | None]] = [(source.path, source.weight) for source in config.mixture]
    known = find_listed_commands(name)
    texts = []
    for path, weight in sources or [(config.data, None)]:
        folder, prepare = find_recipe_text(path, config)
        is_shown = with_files or needs_no_files(prepare)
        texts.append(JobText(folder, known.get(folder, prepare) if is_shown else (), weight))
    return tuple(texts)


def find_recipe_text(path: str, config: DataConfig) -> tuple[str, Command]:
    """(folder or URL of the shards, command that fills it or () if unknown) of one text of a recipe."""
    if "://" in path:
        return path, ()
    is_text = path in NAMED_SOURCES or (Path(path).exists() and not (Path(path) / "manifest.json").is_file())
    source = path if is_text else Path(path).name  # a folder of shards is named after its source
    if not is_text and source not in NAMED_SOURCES:
        return path, ()
    options = {"tokenizer": config.tokenizer, "validation_fraction": config.validation_fraction}
    usual = str(output_folder(PrepareConfig(source=source, **options)))  # type: ignore[arg-type]
    folder = usual if is_text else path
    options["out"] = None if folder == usual else folder
    words = [
        word
        for name, value in options.items()
        if value != getattr(PrepareConfig(), name)
        for word in as_option(name, value, str)
    ]
    return folder, ("overnight", "prepare", source, *words)


def needs_no_files(prepare: Command) -> bool:
    """True for a command that any machine can run: a named source, and no file among the options."""
    return bool({*prepare[2:3]} & {*NAMED_SOURCES}) and not any(Path(word).exists() for word in prepare[3:])


def find_listed_commands(name: str) -> dict[str, Command]:
    """The commands in a recipe's first lines that prepare its texts, by the folder that they fill."""
    path = Path(name) if name.endswith(".toml") else resources.files("overnight") / "recipes" / f"{name}.toml"
    lines = re.findall(r"^# +(overnight prepare [a-z].*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    commands = [tuple(shlex.split(line)) for line in lines]
    return {f"data/{command[2]}": command for command in commands}


def with_folders(recipe: Recipe, texts: tuple[JobText, ...]) -> Recipe:
    """`recipe` with the folders of its texts, for a machine that does not have their sources."""
    mixture = tuple(
        MixtureSource(path=text.folder, weight=source.weight)
        for source, text in zip(recipe.data.mixture, texts, strict=False)
    )
    folder = recipe.data.data if mixture else texts[0].folder
    return with_settings(recipe, data=folder, mixture=mixture)
