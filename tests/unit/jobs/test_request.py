from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from overnight.jobs.request import JobRequest, join_words, quote, yaml_string


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30))
def test_every_word_stays_what_it_is_on_one_line(word: str) -> None:
    assert len(quote(word).splitlines()) == 1
    assert len(yaml_string(word).splitlines()) == 1
    assert yaml.safe_load(f"key: {yaml_string(word)}") == {"key": word}


def test_bash_reads_every_word_unchanged() -> None:
    words = ["", "a b", "it's", 'a "b"', "$HOME", "$(ls)", "new\nline", "tab\t\\n", "é\u2028x", "*"]
    script = f"printf '%s\\0' {join_words(words)}"
    shown = subprocess.run(["bash", "-c", script], capture_output=True, check=True, env={"LC_ALL": "C.UTF-8"})
    assert shown.stdout.decode().split("\0")[:-1] == words


@pytest.mark.parametrize(
    "run_name, name",
    [
        ("gpt2-124m", "gpt2-124m"),
        ("My Run_2", "my-run-2"),
        ("2nd", "run-2nd"),
        ("---", "run"),
        ("é", "run"),
        ("a" * 80, "a" * 45),
        ("a" * 44 + ".b", "a" * 44),
    ],
)
def test_name_is_allowed_by_all_targets(
    run_name: str, name: str, request_job: Callable[..., JobRequest]
) -> None:
    assert request_job(run_name=run_name).name == name
