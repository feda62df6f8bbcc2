"""Configurations: a dataclass, read from TOML and written to it. Command-line options are in options.py.

A recipe is a dataclass whose fields are values or sections; a section is a dataclass of values. In TOML a
section is a table, and `"off"` is None. A value may be a list of records, dataclasses of plain values:
`[{path = "a", weight = 2}]`.
"""

from __future__ import annotations

import dataclasses
import difflib
import errno
import json
import os
import re
import tomllib
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from overnight.renamed import renamed_settings

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")
AnyPath = TypeVar("AnyPath", str, str | None)
OFF = "off"  # TOML has no null
LARGEST_FLOAT = 2**1024  # an integer of this size overflows a float


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message: '; did you mean X?', or the known names if none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"


def raise_problems(problems: Sequence[str], where: str) -> None:
    """Raise one ValueError that lists all of `problems`; nothing if there are none."""
    if problems:
        raise ValueError(f"{where}: " + "; ".join(problems))


def parse_duration(text: str) -> float:
    """Seconds of 7h50m, 90m, 45s, 1d12h. Raises ValueError for anything else."""
    found = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text.strip())
    if not text.strip() or found is None:
        raise ValueError(f"{text!r} is not a duration; write 7h50m, 90m, 45s or 1d12h")
    days, hours, minutes, seconds = (int(count or 0) for count in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60.0 + seconds


def field_types(cls: type) -> dict[str, Any]:
    """Every field's type, section fields included as their dataclass."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def is_section(kind: Any) -> bool:
    """True for a field type that is itself a dataclass: a table in TOML."""
    return dataclasses.is_dataclass(kind)


def record_kind(kind: Any) -> type | None:
    """The dataclass of a list of records (tuple[SomeDataclass, ...]); None for any other field type."""
    arguments = typing.get_args(kind)
    is_list = typing.get_origin(kind) is tuple and is_section(arguments[0])
    return arguments[0] if is_list else None


def flat_names(cls: type) -> dict[str, str | None]:
    """Every option's name and its section (None for the top level)."""
    found: dict[str, str | None] = {}
    for name, kind in field_types(cls).items():
        for option in field_types(kind) if is_section(kind) else (name,):
            assert option not in found, f"{option} occurs twice in {cls.__name__}"
            found[option] = name if is_section(kind) else None
    return found


def flat_types(cls: type) -> dict[str, Any]:
    """Every option's name and type."""
    found: dict[str, Any] = {}
    for name, kind in field_types(cls).items():
        found |= field_types(kind) if is_section(kind) else {name: kind}
    return found


def from_toml(cls: type[Config], text: str, origin: str) -> Config:
    """Read a recipe; what it leaves out keeps its default. Raises one ValueError with all problems."""
    try:
        table = tomllib.loads(text)
    except RecursionError:
        raise ValueError(f"{origin} is nested too deeply to be read as TOML") from None
    except ValueError as error:  # also raised for a number with too many digits
        raise ValueError(f"{origin} is not TOML: {error}") from None
    problems: list[str] = []
    values = _read_table(cls, table, cls, problems)
    raise_problems(problems, origin)
    return cls(**values)


def _read_table(cls: type, table: dict[str, Any], recipe: type, problems: list[str]) -> dict[str, Any]:
    kinds = field_types(cls)
    values: dict[str, Any] = {}
    renamed = renamed_settings(recipe)
    for written, given in table.items():
        name = written if written in kinds else renamed.name(written)
        value = renamed.value(name, given)
        kind = kinds.get(name)
        if kind is None:
            problems.append(_unknown(name, recipe))
        elif is_section(kind) and isinstance(value, dict):
            values[name] = kind(**_read_table(kind, value, recipe, problems))
        elif (record := record_kind(kind)) and isinstance(value, list):
            values[name] = _read_records(name, record, value, problems)
        elif value == OFF and type(None) in typing.get_args(kind):
            values[name] = None
        elif not _fits(value, kind):
            problems.append(f"{name} = {value!r} should be {describe_type(kind)}")
        else:
            values[name] = tuple(value) if isinstance(value, list) else value
    return values


def _read_records(name: str, record: type, entries: list[Any], problems: list[str]) -> tuple[Any, ...]:
    """Each entry of a list of tables; incomplete ones are added to `problems` and left out."""
    found = []
    for entry in entries:
        if not isinstance(entry, dict):
            problems.append(f"{name} = {entry!r} should be {_describe_item(record)}")
            continue
        before = len(problems)
        values = _read_table(record, entry, record, problems)
        missing = [field for field in field_types(record) if field not in entry]
        if missing:
            problems.append(f"{name} = {entry!r} lacks {' and '.join(missing)}")
        if len(problems) == before:
            found.append(record(**values))
    return tuple(found)


def _unknown(name: str, recipe: type) -> str:
    sections = flat_names(recipe)
    if name in sections:
        return f"{name} belongs " + (
            f"in [{sections[name]}]" if sections[name] else "above the first section"
        )
    return f"{name} is not a setting{nearest(name, [*sections, *field_types(recipe)])}"


def _fits(value: Any, kind: Any) -> bool:
    """True if a TOML value has the type a field declares; an int does for a float, a bool not for an int."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in {typing.Union, types.UnionType}:
        return any(_fits(value, one) for one in arguments)
    if origin is typing.Literal:
        return value in arguments
    if origin is tuple:
        return isinstance(value, list) and all(_fits(item, arguments[0]) for item in value)
    if kind is float:
        return type(value) is float or (type(value) is int and abs(value) < LARGEST_FLOAT)
    return type(value) is kind


def describe_type(kind: Any) -> str:
    """A field's type in words for an error message."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in {typing.Union, types.UnionType}:
        return " or ".join(describe_type(one) for one in arguments if one is not type(None))
    if origin is typing.Literal:
        return "one of " + ", ".join(map(repr, arguments))
    if origin is tuple:
        return f"a list, each {_describe_item(arguments[0])}"
    if is_section(kind):
        return "a section"
    return {int: "a whole number", float: "a number", str: "a text in quotes", bool: "true or false"}[kind]


def _describe_item(kind: Any) -> str:
    return f"a table of {' and '.join(field_types(kind))}" if is_section(kind) else describe_type(kind)


def to_toml(config: Any) -> str:
    """The whole recipe, defaults included. Optional settings that are not set are written as comments."""
    values = {field: getattr(config, field.name) for field in dataclasses.fields(config)}
    lines = [_toml_line(field, value) for field, value in values.items() if not is_section(value)]
    sections = [
        f"\n[{field.name}]\n{to_toml(value).rstrip()}" for field, value in values.items() if is_section(value)
    ]
    return "\n".join(lines + sections) + "\n"


def _toml_line(field: dataclasses.Field[Any], value: Any) -> str:
    if value is None and field.default is None:
        return f"# {field.name}: not set"
    return f"{field.name} = {_toml_value(OFF if value is None else value)}"


def _toml_value(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml_value, value))}]"
    if is_section(value):
        return f"{{{', '.join(f'{name} = {_toml_value(each)}' for name, each in vars(value).items())}}}"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


def require_readable(*paths: Path) -> None:
    """Raise PermissionError for the first path that this user may not read.

    Libraries call such a file missing or damaged.
    """
    for path in paths:
        if path.exists() and not os.access(path, os.R_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Context manager: an OSError that names no file, as that of a write to a full disk, names `path`."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            error.filename = error.filename or str(path)
        raise


def working_directory() -> Path | None:
    """The working directory of this process; None if it was deleted."""
    try:
        return Path.cwd()
    except FileNotFoundError:
        return None


def folders_of_paths(environment: Path) -> list[Path]:
    """The folders that a run's relative paths may be meant in, the likeliest first.

    The one whose runs/ holds the run, which is the copy's if a whole project was copied; then the one in
    which the run was begun or resumed last, as its environment.json says.
    """
    runs = environment.absolute().parent.parent
    holders = [runs.parent] if runs.name == "runs" else []
    try:
        facts = json.loads(environment.read_text(encoding="utf-8"))
        places = [start.get("working_directory") for start in (facts, *facts.get("resumed", []))]
        return holders + [Path(place) for place in reversed(places) if place][:1]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return holders


def path_from(folders: Sequence[Path], path: AnyPath, *, may_be_name: bool = False) -> AnyPath:
    """A relative path as it was meant in one of the `folders`, as seen from the working directory.

    It is the first that is there; a path that is in none, but here, is that of a project that was moved. With
    `may_be_name`, one that is nowhere is a name.
    """
    if not path or "://" in path:
        return path
    here = working_directory()
    found = next((folder for folder in folders if (folder / path).exists()), None)
    if found is None and folders and not may_be_name and not Path(path).exists():
        found = folders[-1]
    return path if found in {None, here} else str(found / path)
