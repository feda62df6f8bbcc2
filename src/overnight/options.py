"""Command-line options: a configuration over its defaults, and back.

All names are flat, and unique over the whole recipe: `--n_layer=4` and `--n-layer 4` both set `[model]
n_layer`. Whole numbers may be written 1_000, 1e3 or 1k (M, B), `off` unsets an optional setting, `~` is the
home, and after `--` no word is an option. The items of a list follow its option. One that begins with - is
written `--name=item`; such an option may be repeated, and adds an item each time.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import inspect
import io
import itertools
import os
import re
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import tyro

from overnight.config import (
    OFF,
    describe_type,
    field_types,
    flat_names,
    flat_types,
    is_section,
    nearest,
    record_kind,
)
from overnight.renamed import renamed_settings

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

LONGEST_SHOWN = 60  # characters of a wrong value
UNITS = {"k": 10**3, "M": 10**6, "B": 10**9}
Config = TypeVar("Config", bound="DataclassInstance")


def from_arguments(
    cls: type[Config], arguments: Sequence[str], *, prog: str, about: str, default: Config | None = None
) -> Config:
    """Read command-line options over `default`. Raises ValueError, one sentence; --help prints and exits."""
    arguments, literal = _split_literal(arguments)
    given, arguments = arguments, renamed_settings(cls).options(arguments)
    for word, now in zip(given, arguments, strict=True):
        if word != now:
            sys.stderr.write(f"overnight: {word} is now spelled {now}\n")
    is_on = _switches(cls, default)
    known = {*flat_names(cls), *(f"no_{name}" for name in is_on)}
    for argument in arguments:
        name = argument.removeprefix("--").split("=")[0].replace("-", "_")
        if argument.startswith("--") and name and name not in {*known, "help"}:
            written = {option.replace("_", "-") for option in known}
            raise ValueError(
                f"{prog} has no option {argument.split('=')[0]}{nearest(name.replace('_', '-'), written)}"
            )
    # tyro knows only the form of a switch that changes its default, which is all that --help needs to show.
    already = {f"__{name}" if value else f"__no_{name}" for name, value in is_on.items()}
    arguments = [word for word in arguments if word.replace("-", "_") not in already]
    arguments, lists = _take_lists(cls, arguments)
    try:
        arguments = _plain_values(cls, arguments)
    except ValueError as wrong:
        raise ValueError(f"{wrong} (see {prog} --help)") from None
    markers = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            options: dict[str, Any] = {"prog": prog, "description": about, "config": markers}
            if default is not None:
                options["default"] = default
            words = [*arguments, *(name for name in literal if name not in arguments)]
            read: Config = tyro.cli(cls, args=words, registry=_how_to_read(cls), **options)
            return _with_lists(_with_literal(read, literal), lists)
    except _WordError as wrong:
        raise ValueError(f"{wrong} (see {prog} --help)") from None
    except SystemExit as stopped:
        if not stopped.code:
            raise
        sentence = _first_sentence(complaint.getvalue())
        sentence = re.sub("\0\\d+", lambda name: literal.get(name[0], name[0]), sentence)
        raise ValueError(f"{sentence} (see {prog} --help)") from None


def _split_literal(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The words before `--`, and a name for each word after it, which is never an option."""
    words = list(arguments)
    at = words.index("--") if "--" in words else len(words)
    return words[:at], {f"\0{number}": word for number, word in enumerate(words[at + 1 :])}


def _with_literal(read: Config, literal: dict[str, str]) -> Config:
    """The config with the words that `_split_literal` has named."""
    changes: dict[str, Any] = {}
    for name, value in vars(read).items():
        if isinstance(value, str) and value in literal:
            changes[name] = literal[value]
        elif isinstance(value, tuple) and any(isinstance(each, str) and each in literal for each in value):
            changes[name] = tuple(literal.get(each, each) for each in value)
    return dataclasses.replace(read, **changes) if changes else read


def _take_lists(cls: type, arguments: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """The words without the options that are lists, and the items of each of those.

    The parser would take a positional word after a list for one more item.
    """
    lists = {name for name, kind in flat_types(cls).items() if typing.get_origin(kind) is tuple}
    lists -= _annotated_names(cls)
    rest: list[str] = []
    found: dict[str, list[str]] = {}
    into = rest
    for word in arguments:
        option, equals, value = word.partition("=")
        name = option.removeprefix("--").replace("-", "_")
        if option.startswith("--") and name in lists:
            items = found.setdefault(name, [])
            items += [value] * bool(equals)
            into = rest if equals else items
            continue
        if word.startswith("-") and word != "-" and not _reads_as(word, (float,)):  # another option
            into = rest
        into.append(word)
    return rest, found


def _with_lists(read: Config, lists: Mapping[str, Sequence[str]]) -> Config:
    """The config with the lists that `_take_lists` has found."""
    kinds, sections = flat_types(type(read)), flat_names(type(read))
    for name, words in lists.items():
        record = record_kind(kinds[name])
        items = tuple(words if record is None else (_record_from_word(record, word) for word in words))
        part = getattr(read, section) if (section := sections[name]) else read
        part = dataclasses.replace(part, **{name: items})
        read = dataclasses.replace(read, **{section: part}) if section else part
    return read


def _plain_values(cls: type, arguments: Sequence[str]) -> list[str]:
    """The words, each value of a number or a choice in the form that the parser reads, `~` as the home.

    Raises ValueError for a value of the wrong type.
    """
    kinds, annotated = flat_types(cls), _annotated_names(cls)
    words, found = iter(arguments), []
    for word in words:
        option, equals, value = word.partition("=")
        name = option.removeprefix("--").replace("-", "_")
        kind = kinds.get(name)
        if not option.startswith("--") or kind is None or name in annotated or record_kind(kind):
            found.append(word)
            continue
        if not equals and kind is not bool and typing.get_origin(kind) is not tuple:
            following = next(words, None)
            found += [option] if following is None else [option, _plain_value(option, following, kind)]
        else:
            found.append(f"{option}={_plain_value(option, value, kind)}" if equals else option)
    return found


def _annotated_names(cls: type) -> set[str]:
    """The options that have a parser of their own."""
    hints = typing.get_type_hints(cls, include_extras=True)
    sections = [kind for kind in field_types(cls).values() if is_section(kind)]
    own = {name for name, kind in hints.items() if typing.get_origin(kind) is typing.Annotated}
    return own.union(*map(_annotated_names, sections))


def _plain_value(option: str, value: str, kind: Any) -> str:
    choices = typing.get_args(kind) if typing.get_origin(kind) in {typing.Union, types.UnionType} else (kind,)
    if type(None) in choices and value.lower() in {OFF, "none"}:
        return "None"
    literals = [each for choice in choices for each in typing.get_args(choice) if isinstance(each, str)]
    if literals and str not in choices and value not in literals and not _reads_as(value, choices):
        raise ValueError(f"{_shown(option, value)}: choose {', '.join(literals)}")
    if str in choices or value in literals:
        return os.path.expanduser(value) if value.startswith("~") else value  # noqa: PTH111 - any text
    if int in choices or float in choices:
        if not _reads_as(value, choices):
            raise ValueError(f"{_shown(option, value)}: give {describe_type(kind)}")
        return str(_number(value))
    return value


def _shown(option: str, value: str) -> str:
    short = value if len(value) <= LONGEST_SHOWN else f"{value[:LONGEST_SHOWN]}..."
    return f"{option.replace('_', '-')} {short}"


def _reads_as(value: str, choices: Sequence[Any]) -> bool:
    """True for a number of one of these types: 1e3, 1_000 and 1k are whole numbers, 1.5 is not."""
    try:
        number = _number(value)
    except ValueError:
        return False
    return float in choices or (int in choices and isinstance(number, int))


def _number(text: str) -> int | float:
    unit = UNITS.get(text[-1:], 1)
    text = text if unit == 1 else text[:-1]
    try:
        return int(text) * unit
    except ValueError:
        number = float(text) * unit
        return int(number) if number.is_integer() and abs(number) < 2**53 else number


def _switches(cls: type, default: Any) -> dict[str, bool]:
    """Every boolean option and its default."""
    top, kinds, found = field_types(cls), flat_types(cls), {}
    for name, section in flat_names(cls).items():
        if kinds[name] is bool:
            part = getattr(default, section, top[section]) if section else default or cls
            found[name] = bool(getattr(part, name))
    return found


def _how_to_read(cls: type) -> Any:
    """A tyro registry: a record is one word, its values joined by `=`; a help text is one paragraph."""
    records = {record_kind(kind) for kind in flat_types(cls).values()}
    registry = tyro.constructors.ConstructorRegistry()

    @registry.struct_rule
    def describe(found: Any) -> Any:
        if not is_section(found.type) or found.type in records:
            return None
        fields = [_describe_field(each, found) for each in dataclasses.fields(found.type)]
        return tyro.constructors.StructConstructorSpec(instantiate=found.type, fields=tuple(fields))

    @registry.primitive_rule
    def rule(found: Any) -> Any:
        if found.type not in records:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="=".join(field_types(found.type)).upper(),
            instance_from_str=lambda words: _record_from_word(found.type, words[0]),
            is_instance=lambda value: isinstance(value, found.type),
            str_from_instance=lambda value: [_as_word(value)],
        )

    return registry


def _describe_field(field: Any, found: Any) -> Any:
    """The description of a field of the class `found.type`, its docstring without the line breaks."""
    default = field.default if field.default is not dataclasses.MISSING else tyro.MISSING
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    if isinstance(found.default, found.type):
        default = getattr(found.default, field.name)
    text = next(filter(None, (_docstrings(each).get(field.name) for each in found.type.__mro__)), "")
    kind = typing.get_type_hints(found.type, include_extras=True)[field.name]
    return tyro.constructors.StructFieldSpec(field.name, kind, default, " ".join(text.split()) or None)


@functools.cache
def _docstrings(cls: type) -> dict[str, str]:
    """The docstring under each field."""
    if not dataclasses.is_dataclass(cls):
        return {}
    (body,) = ast.parse(inspect.getsource(cls)).body
    statements = body.body if isinstance(body, ast.ClassDef) else []
    return {
        one.target.id: other.value.value
        for one, other in itertools.pairwise(statements)
        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)
        if isinstance(other, ast.Expr) and isinstance(other.value, ast.Constant)
        if isinstance(other.value.value, str)
    }


class _WordError(Exception):
    """Not a valid record. Not a ValueError: tyro replaces the message of those."""


def _record_from_word(record: type, word: str) -> Any:
    """The record of PATH=WEIGHT, say. Only the first value may contain `=`."""
    kinds = field_types(record)
    values = word.rsplit("=", len(kinds) - 1)
    try:
        pairs = zip(kinds.items(), values, strict=True)
        return record(**{name: kind(value) for (name, kind), value in pairs})
    except ValueError:
        raise _WordError(f"{word!r} should be {'='.join(kinds).upper()}") from None


def _first_sentence(box: str) -> str:
    """The text of a framed message of tyro before its first horizontal line."""
    words: list[str] = []
    for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()[1:]:  # without the colours of a terminal
        text = line.strip("│|╰╯+ ")
        if text.startswith(("─", "--" * 5)):
            if words:
                break
        else:
            words.append(text)
    return " ".join(words)


def as_option(name: str, value: Any, kind: Any) -> list[str]:
    """One setting of the type `kind` as words of a command line."""
    option = f"--{name.replace('_', '-')}"
    if kind is bool:
        return [option if value else f"--no-{name.replace('_', '-')}"]
    if isinstance(value, tuple):
        words = [_as_word(item) for item in value]
        is_plain = not any(word.startswith(("-", "~")) for word in words)  # ~ could be taken for the home
        return [option, *words] if is_plain else [f"{option}={word}" for word in words]
    return [f"{option}={value}"] if str(value).startswith("-") else [option, str(value)]


def _as_word(value: Any) -> str:
    """An item of a list; a record is its values, joined by `=`."""
    return "=".join(map(str, vars(value).values())) if is_section(value) else str(value)
