from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from overnight.jobs.request import JobRequest, block, quote, yaml_text

TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30)


@given(st.lists(TEXTS, max_size=4))
def test_what_is_quoted_is_on_one_line(words: list[str]) -> None:
    assert all(len(quote(word).splitlines()) == 1 for word in words)


def test_a_shell_reads_every_word_as_it_was() -> None:
    words = [
        "",
        "math",
        "two words",
        "it's",
        'a "b"',
        "$HOME",
        "$(ls)",
        "new\nline",
        "tab\t\\n",
        "é\u2028x",
        "*",
    ]
    script = f"printf '%s\\0' {' '.join(map(quote, words))}"
    shown = subprocess.run(["bash", "-c", script], capture_output=True, check=True, env={"LC_ALL": "C.UTF-8"})
    assert shown.stdout.decode().split("\0")[:-1] == words


@given(TEXTS)
def test_yaml_reads_every_text_as_it_was(word: str) -> None:
    quoted = yaml_text(word)
    assert len(quoted.splitlines()) == 1
    assert yaml.safe_load(f"key: {quoted}") == {"key": word}


def test_a_block_of_yaml_holds_the_script_as_it_was() -> None:
    script = "if true; then\n  echo 'a: b' # c\n\nfi\n"
    assert yaml.safe_load(f"run: |\n{block(script, 4)}\n") == {"run": script}


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
def test_a_name_is_one_that_all_clusters_allow(
    run_name: str, name: str, request_job: Callable[..., JobRequest]
) -> None:
    assert request_job(run_name=run_name).name == name


@pytest.mark.parametrize(
    "nodes, gpus, size",
    [
        (1, 1, "1 node with 1 GPU"),
        (1, 8, "1 node with 8 GPUs"),
        (2, 8, "2 nodes with 8 GPUs each"),
        (2, 0, "2 nodes, without GPUs"),
    ],
)
def test_the_size_is_told_in_words(
    nodes: int, gpus: int, size: str, request_job: Callable[..., JobRequest]
) -> None:
    job = request_job(nodes=nodes, gpus_per_node=gpus)
    assert job.size == size
    assert job.processes_per_node == max(1, gpus)
