from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from overnight.options import from_arguments
from overnight.preparation.prepare_config import PrepareConfig, output_folder, parse_count


def test_each_problem_is_named() -> None:
    config = PrepareConfig(
        source="python-docs",
        validation_fraction=1.5,
        on_bad_text="ignore",  # type: ignore[arg-type]
        on_bad_file="ignore",  # type: ignore[arg-type]
        near_duplicates="find",  # type: ignore[arg-type]
        shard_tokens=2**31,
        tokens=0,
        workers=0,
        train_tokenizer=400,
        tokenizer="characters",
        tasks=3,
    )
    names = ("validation_fraction", "on_bad_text", "on_bad_file", "near_duplicates", "shard_tokens", "tokens")
    names += ("workers", "train_tokenizer", "tasks")
    problems = config.problems()
    assert len(problems) == len(names)
    assert all(name in problem for name, problem in zip(names, problems, strict=True))
    assert PrepareConfig(source="python-docs").problems() == []


def test_output_folder_has_the_names_of_source_and_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "books").mkdir()
    for options, folder in [
        ({"source": "python-docs"}, "data/python-docs"),
        ({"source": str(tmp_path / "books")}, "data/books"),
        ({"source": "shakespeare", "tokenizer": "characters"}, "data/shakespeare-characters"),
        ({"source": "shakespeare", "train_tokenizer": 400}, "data/shakespeare-bpe-400"),
        ({"source": "shakespeare", "tokenizer": "mine/tokenizer.json"}, "data/shakespeare-tokenizer"),
        ({"source": "python-docs", "out": "x/y"}, "x/y"),
    ]:
        assert output_folder(PrepareConfig(**options)) == Path(folder)
    with pytest.raises(ValueError, match="did you mean shakespeare"):
        output_folder(PrepareConfig(source="shakespere", out="x"))


def test_help_needs_no_heavy_library() -> None:
    code = (
        "import overnight.preparation.command, sys; print({'torch', 'pyarrow', 'datatrove'} & {*sys.modules})"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"


def test_command_line_reads_counts() -> None:
    def read(*words: str) -> PrepareConfig:
        return from_arguments(PrepareConfig, ["x", *words], prog="overnight prepare", about="")

    for text, count in {
        "1000": 1000,
        "1_000": 1000,
        "500K": 500_000,
        "1.3T": 13 * 10**11,
        "10b": 10**10,
        "1" + "0" * 400: 10**400,  # more than a float holds
    }.items():
        assert read("--tokens", text).tokens == parse_count(text) == count
    assert read("--shard-tokens=10K").shard_tokens == 10_000
    assert read().tokens is None
    for text in ("many", "-5", "1.5.2K", "10 Q", ""):
        with pytest.raises(ValueError, match="count"):
            parse_count(text)
    with pytest.raises(ValueError, match="'many'"):
        read("--tokens", "many")
