"""Which folders of shards a recipe reads, and the commands that prepare them, before any is there."""

from __future__ import annotations

import dataclasses
import re
import shlex
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from overnight.data import DataConfig
from overnight.preparation.prepare_config import PrepareConfig, output_folder
from overnight.preparation.sources import NAMED_SOURCES
from overnight.recipe import Recipe
from overnight.recipe_options import as_option

Command = tuple[str, ...]


def find_recipe_texts(config: DataConfig, name: str, *, with_files: bool) -> tuple[JobText, ...]:
    """What a run of the recipe `name` reads; commands that need files of this machine only `with_files`."""
    found = [
        find_recipe_text(path, config) for path in [each.path for each in config.mixture] or [config.data]
    ]
    weights: list[float | None] = [each.weight for each in config.mixture] or [None]
    told = find_told_commands(name)
    return tuple(
        JobText(folder, told.get(folder, prepare) if with_files or needs_no_files(prepare) else (), weight)
        for (folder, prepare), weight in zip(found, weights, strict=True)
    )


def find_recipe_text(path: str, config: DataConfig) -> tuple[str, Command]:
    """Of what `data` may be, (the folder or URL of shards, the command that fills it or () if unknown)."""
    if "://" in path:
        return path, ()
    is_text = path in NAMED_SOURCES or (Path(path).exists() and not (Path(path) / "manifest.json").is_file())
    source = path if is_text else Path(path).name  # a folder of shards is named after what is in it
    if not is_text and source not in NAMED_SOURCES:
        return path, ()
    wanted = PrepareConfig(
        source=source, tokenizer=config.tokenizer, validation_fraction=config.validation_fraction
    )
    folder = str(output_folder(wanted)) if is_text else path
    if folder != str(output_folder(wanted)):
        wanted = dataclasses.replace(wanted, out=folder)
    options = ("tokenizer", "validation_fraction", "out")
    given = {
        name: getattr(wanted, name)
        for name in options
        if getattr(wanted, name) != getattr(PrepareConfig(), name)
    }
    words = [word for name, value in given.items() for word in as_option(name, value, str)]
    return folder, ("overnight", "prepare", source, *words)


def needs_no_files(prepare: Command) -> bool:
    """True for a command that prepares what can be had anywhere."""
    return bool({*prepare[2:3]} & {*NAMED_SOURCES}) and not any(Path(word).exists() for word in prepare[3:])


def find_told_commands(name: str) -> dict[str, Command]:
    """The commands in the recipe's first lines that prepare its text, by the folder that they fill."""
    path = Path(name) if name.endswith(".toml") else resources.files("overnight") / "recipes" / f"{name}.toml"
    lines = re.findall(r"^# +(overnight prepare [a-z].*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    commands = [tuple(shlex.split(line)) for line in lines]
    return {f"data/{command[2]}": command for command in commands}


def with_folders(recipe: Recipe, texts: tuple[JobText, ...]) -> Recipe:
    """`recipe` that names the folders of its text, for a machine that does not have what they are made of."""
    data = recipe.data
    if data.mixture:
        pairs = zip(data.mixture, texts, strict=True)
        sources = tuple(dataclasses.replace(source, path=text.folder) for source, text in pairs)
        data = dataclasses.replace(data, mixture=sources)
    else:
        data = dataclasses.replace(data, data=texts[0].folder)
    return dataclasses.replace(recipe, data=data)


@dataclass(frozen=True)
class JobText:
    """A folder of shards that the run reads."""

    folder: str
    """As the recipe names it; or a URL, which every machine reads for itself."""
    prepare: tuple[str, ...] = ()
    """The command that fills it; () if that needs files of the machine at hand, or is not known."""
    weight: float | None = None
    """In a mixture."""

    @property
    def is_remote(self) -> bool:
        """True for a URL."""
        return "://" in self.folder
