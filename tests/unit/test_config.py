"""Configurations, read from TOML and from the command line."""

from __future__ import annotations

import re
import subprocess
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overnight.config import (
    flat_names,
    from_toml,
    parse_duration,
    to_toml,
)
from overnight.options import as_option, from_arguments
from overnight.terminal import shell_command


@dataclass(frozen=True, kw_only=True)
class Size:
    """A section."""

    n_layer: int = 12
    """Blocks."""
    dropout: float = 0.0
    """Share dropped."""
    vocab_size: int | None = None
    """Ids."""
    limit: float | None = 1.0
    """On unless it is switched off."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """A record."""

    path: str
    weight: float


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A recipe."""

    run_name: str = "x"
    """Name."""
    kind: Literal["fused", "math"] = "fused"
    """Kind."""
    compile: bool | None = None
    """Compile."""
    processes: int | Literal["auto"] | None = None
    """A number or a word."""
    prompts: tuple[str, ...] = ("a",)
    """Prompts."""
    shares: tuple[Share, ...] = ()
    """Records."""
    size: Size = field(default_factory=Size)


texts = st.text(st.characters(exclude_categories=["Cs"]))


@given(
    st.builds(
        Settings,
        run_name=texts,
        kind=st.sampled_from(["fused", "math"]),
        compile=st.none() | st.booleans(),
        prompts=st.lists(texts).map(tuple),
        shares=st.lists(st.builds(Share, path=texts, weight=st.floats(allow_nan=False))).map(tuple),
        size=st.builds(
            Size,
            n_layer=st.integers(-(2**63), 2**63 - 1),
            dropout=st.floats(allow_nan=False),
            vocab_size=st.none() | st.integers(0, 2**63 - 1),
            limit=st.none() | st.floats(allow_nan=False),
        ),
    )
)
def test_toml_round_trip(settings):
    written = to_toml(settings)
    tomllib.loads(written)
    assert all(name in written for name in flat_names(Settings))
    assert from_toml(Settings, written, "recipe") == settings


@pytest.mark.parametrize(
    "text, named",
    [
        ("[size]\nn_layr = 3", "n_layr is not a setting; did you mean n_layer?"),
        ("n_layer = 3", "n_layer belongs in [size]"),
        ("[size]\nrun_name = 'x'", "run_name belongs above the first section"),
        *[("[size]\nn_layer = true", "n_layer = True"), ("[size]\nn_layer = 1.5", "n_layer = 1.5")],
        *[("[size]\nvocab_size = 'x'", "vocab_size = 'x'"), ("kind = 'quick'", "kind = 'quick'")],
        *[("prompts = 'a'", "prompts = 'a'"), ("prompts = [1]", "prompts = [1]"), ("size = 3", "size = 3")],
        ("shares = ['a']", "shares = 'a' should be a table of path and weight"),
        ("shares = [{path = 'a'}]", "shares = {'path': 'a'} lacks weight"),
        ("shares = [{path = 'a', weight = '1'}]", "weight = '1'"),
        ("shares = [{path = 'a', weight = 1, wieght = 1}]", "wieght is not a setting; did you mean weight?"),
        ("[size]\nn_layr = 3\ndropout = 'much'", "dropout = 'much'"),  # all problems at once
    ],
)
def test_wrong_recipe_is_one_sentence(text, named):
    with pytest.raises(ValueError, match=r"^mine\.toml") as error:
        from_toml(Settings, text, "mine.toml")
    assert named in str(error.value)
    assert "\n" not in str(error.value)
    assert "n_layr" not in text or "n_layr" in str(error.value)


def test_values_are_read_in_all_of_toml_s_forms():
    expected = (Share(path="a", weight=0.7), Share(path="b", weight=2))
    inline = "shares = [{path = 'a', weight = 0.7}, {path = 'b', weight = 2}]"
    tables = "[[shares]]\npath = 'a'\nweight = 0.7\n[[shares]]\npath = 'b'\nweight = 2"
    assert from_toml(Settings, inline, "r").shares == from_toml(Settings, tables, "r").shares == expected
    assert from_toml(Settings, "[size]\ndropout = 0", "r").size.dropout == 0
    assert from_toml(Settings, '[size]\nlimit = "off"', "r").size.limit is None
    with pytest.raises(ValueError, match="n_layer = 'off'"):
        from_toml(Settings, '[size]\nn_layer = "off"', "r")


def options(*words: str, default: Settings | None = None) -> Settings:
    return from_arguments(Settings, words, prog="overnight train", about="Train.", default=default)


def test_options_in_any_spelling_change_the_default():
    for words in (["--n_layer=4"], ["--n-layer", "4"], ["--n-layer=4"], ["--n_layer", "4"]):
        assert options(*words).size.n_layer == 4
    default = Settings(run_name="mine", size=Size(dropout=0.5, vocab_size=3))
    changed = options("--n_layer=3", "--compile=False", "--vocab_size=None", default=default)
    assert changed == Settings(run_name="mine", compile=False, size=Size(n_layer=3, dropout=0.5))


def test_record_is_one_word():
    default = Settings(shares=(Share(path="x", weight=1),))
    expected = (Share(path="data/a", weight=0.7), Share(path="s3://b/date=1", weight=3.0))
    assert options("--shares", "data/a=0.7", "s3://b/date=1=3", default=default).shares == expected
    assert options("--n_layer=4", default=default).shares == default.shares


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--n-layer", "1e1", "--dropout", "1e-1"], {"size": Size(n_layer=10, dropout=0.1)}),
        (["--n-layer=1_000"], {"size": Size(n_layer=1000)}),
        (["--processes=1e1"], {"processes": 10}),
        (["--processes", "auto"], {"processes": "auto"}),
        (["--limit", "off", "--vocab-size=OFF"], {"size": Size(limit=None)}),
        (["--run-name", "~/x"], {"run_name": str(Path("~/x").expanduser())}),
        (["--run-name", ""], {"run_name": ""}),
        (["--run-name", "1e3"], {"run_name": "1e3"}),
    ],
)
def test_values_in_other_spellings(words, expected):
    assert options(*words) == Settings(**expected)


@pytest.mark.parametrize(
    "words, prompts",
    [
        (["--prompts", "b", "c", "--n-layer", "3"], ("b", "c")),
        (["--prompts=-x y", "--prompts=--n-layer", "--prompts", "--n-layer", "3"], ("-x y", "--n-layer")),
        (["--prompts", "-", "-1.5", "--prompts=", "--n-layer=3"], ("-", "-1.5", "")),
        (["--prompts", "--n-layer=3"], ()),
    ],
)
def test_items_of_a_list(words, prompts):
    assert options(*words) == Settings(prompts=prompts, size=Size(n_layer=3))


ITEMS = st.lists(st.one_of(st.text(), st.sampled_from(["-x", "--n-layer=3", "--", "~", "-1", "a=b", "'"])))


@given(ITEMS.map(tuple), ITEMS)
def test_printed_list_can_be_pasted(prompts, paths):
    """Through a shell as well; a NUL can be in no word of a command."""
    prompts = tuple(item.replace("\0", "") for item in prompts)
    shares = tuple(Share(path=path.replace("\0", ""), weight=-0.5) for path in paths)
    printed = shell_command(
        "train",
        "--n-layer=3",
        *as_option("prompts", prompts, tuple[str, ...]),
        *as_option("shares", shares, tuple[Share, ...]),
        "--compile=True",
    )
    bash = f"printf '%s\\0' {printed.removeprefix('overnight train')}"
    pasted = subprocess.run(["bash", "-c", bash], capture_output=True, check=True).stdout.decode()
    assert options(*pasted.split("\0")[:-1]) == Settings(
        prompts=prompts, shares=shares, compile=True, size=Size(n_layer=3)
    )


@pytest.mark.parametrize("value", ["1.5", "1e-1", "inf", "nan", "9" * 5000, "", "off", "--run-name"])
def test_what_is_no_whole_number_is_refused(value):
    with pytest.raises(ValueError, match="--n-layer .*whole number"):
        options("--n_layer", value)


@pytest.mark.parametrize(
    "words, named",
    [
        *[(["--n_layr=4"], "n-layer?"), (["--n_layer=four"], "--n-layer"), (["stray"], "stray")],
        *[(["--kind=quick"], "quick"), (["--shares", "a=1", "b/c"], "b/c")],
        (["--shares", "a=much"], "a=much"),
    ],
)
def test_wrong_option_is_one_sentence(words, named):
    with pytest.raises(ValueError, match=re.escape(named)) as error:
        options(*words)
    assert not {*"\n│"} & {*str(error.value)}


def test_help_lists_every_option(capsys):
    with pytest.raises(SystemExit) as stopped:
        options("--help")
    assert not stopped.value.code
    shown = capsys.readouterr().out
    assert all("--" + name.replace("_", "-") in shown for name in flat_names(Settings))


@dataclass(frozen=True, kw_only=True)
class Switches:
    """Two switches, one of them on."""

    fast: bool = False
    """Off by default."""
    safe: bool = True
    """On by default."""


def switches(*words: str, default: Switches | None = None) -> Switches:
    return from_arguments(Switches, words, prog="overnight", about="", default=default)


@pytest.mark.parametrize("default", [None, Switches(fast=True, safe=False), Switches(fast=True)])
def test_switch_can_be_turned_on_and_off_whatever_its_default(default):
    assert switches("--fast", "--safe", default=default) == Switches(fast=True)
    assert switches("--no-fast", "--no_safe", default=default) == Switches(safe=False)
    assert switches(default=default) == (default or Switches())
    with pytest.raises(ValueError, match="no option --no-slow"):
        switches("--no-slow", default=default)
    with pytest.raises(ValueError, match="no_safe"):
        switches("no_safe", default=default)


@pytest.mark.parametrize(
    "text, seconds",
    [
        *[("7h50m", 28_200), ("90m", 5400), ("45s", 45), ("1d12h", 129_600), (" 2d ", 172_800)],
        *dict.fromkeys(("", "  ", "90", "7:50", "5m1h", "-1h", "1.5h", "h", "7 h")).items(),
    ],
)
def test_duration_is_parsed_or_refused(text, seconds):
    if seconds is not None:
        assert parse_duration(text) == seconds
    else:
        with pytest.raises(ValueError, match="7h50m"):
            parse_duration(text)
