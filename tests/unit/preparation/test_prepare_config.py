from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from overnight.config import from_arguments
from overnight.preparation.prepare_config import PrepareConfig, output_folder, parse_count


def test_each_problem_is_named() -> None:
    config = PrepareConfig(
        source="python-docs",
        validation_fraction=1.5,
        on_bad_text="ignore",  # type: ignore[arg-type]
        tokens=0,
        shard_tokens=2**31,
        workers=0,
    )
    assert config.problems() == [
        "validation_fraction=1.5 must lie between 0 and 1",
        "on_bad_text='ignore' must be fail, replace or skip",
        "shard_tokens=2147483648 must lie between 1 and 2,147,483,647",
        "tokens=0 must be at least 1, or left out",
        "workers=0 must be at least 1, or left out",
    ]
    assert PrepareConfig(source="python-docs").problems() == []


def test_the_folder_has_the_names_of_source_and_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "books").mkdir()
    assert output_folder(PrepareConfig(source="python-docs")) == Path("data/python-docs")
    assert output_folder(PrepareConfig(source=str(tmp_path / "books"))) == Path("data/books")
    characters = PrepareConfig(source="shakespeare", tokenizer="characters")
    assert output_folder(characters) == Path("data/shakespeare-characters")
    from_path = PrepareConfig(source="shakespeare", tokenizer="mine/tokenizer.json")
    assert output_folder(from_path) == Path("data/shakespeare-tokenizer")
    assert output_folder(PrepareConfig(source="python-docs", out="x/y")) == Path("x/y")


def test_a_source_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match="did you mean shakespeare"):
        output_folder(PrepareConfig(source="shakespere", out="x"))


def test_help_needs_neither_torch_nor_numpy() -> None:
    code = "import overnight.data.request, sys; print({'torch', 'numpy', 'pyarrow'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"


@pytest.mark.parametrize(
    "text,count",
    [("1000", 1000), ("1_000", 1000), ("500K", 500_000), ("1.3T", 1_300_000_000_000), ("10b", 10**10)],
)
def test_counts_are_read_as_people_write_them(text: str, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["many", "-5", "1.5.2K", "10 Q", ""])
def test_what_is_no_count_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no count; write 1000000, 500K, 10M, 1B or 1.3T"):
        parse_count(text)


def test_the_command_line_reads_counts() -> None:
    words = ["python-docs", "--tokens", "2M", "--shard-tokens=10K"]
    config = from_arguments(PrepareConfig, words, prog="overnight prepare", about="")
    assert (config.tokens, config.shard_tokens) == (2_000_000, 10_000)
    assert from_arguments(PrepareConfig, ["x"], prog="overnight prepare", about="").tokens is None
    with pytest.raises(ValueError, match="'many' is no count"):
        from_arguments(PrepareConfig, ["x", "--tokens", "many"], prog="overnight prepare", about="")
