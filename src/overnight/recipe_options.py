"""The command-line options that turn one recipe into another."""

from __future__ import annotations

import dataclasses
from collections.abc import Set
from typing import Any

from overnight.config import field_types, flat_names
from overnight.recipe import Recipe, flatten


def plain_recipe(config: Recipe) -> Recipe:
    """The recipe of a command's config, without the command's own options."""
    return Recipe(**{field.name: getattr(config, field.name) for field in dataclasses.fields(Recipe)})


def changed_options(recipe: Recipe, original: Recipe, left_out: Set[str] = frozenset()) -> list[str]:
    """The words that turn `original` into `recipe`, without the settings in `left_out`."""
    return [word for option in list_options(recipe, original, left_out) for word in option]


def list_options(recipe: Recipe, original: Recipe, left_out: Set[str] = frozenset()) -> list[list[str]]:
    """`changed_options` with a list of words for each option."""
    now, before = flatten(recipe), flatten(original)
    changed = [name for name in now if name not in left_out and now[name] != before[name]]
    if {"total_tokens", "total_steps"} <= {*changed}:  # either option replaces the other
        changed.remove("total_steps" if now["total_steps"] is None else "total_tokens")
    sections = flat_names(Recipe)
    kinds = {
        name: field_types(type(getattr(recipe, part)) if part else Recipe) for name, part in sections.items()
    }
    return [as_option(name, now[name], kinds[name][name]) for name in changed]


def as_option(name: str, value: Any, kind: Any) -> list[str]:
    """One setting of the type `kind` as words of a command line."""
    option = f"--{name.replace('_', '-')}"
    if kind is bool:
        return [option if value else f"--no-{name.replace('_', '-')}"]
    if isinstance(value, tuple):
        return [option, *map(_as_word, value)]
    return [f"{option}={value}"] if str(value).startswith("-") else [option, str(value)]


def _as_word(value: Any) -> str:
    """An item of a list; a record is its values, joined by `=`."""
    return "=".join(map(str, vars(value).values())) if dataclasses.is_dataclass(value) else str(value)
