"""Passages of benchmarks in the documents: against sets of tuples of words, over real texts."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from overnight.data.shards import Manifest, read_manifest
from overnight.preparation import ngrams
from overnight.preparation.command import summarize_prepared
from overnight.preparation.decontaminate import BenchmarkSearch, _read_texts, benchmark_names, build_index
from overnight.preparation.ngrams import Words, hash_windows, hash_words
from overnight.preparation.prepare import prepare_shards
from overnight.preparation.prepare_config import PrepareConfig
from overnight.preparation.sources import python_texts

PASSAGE = "the quick brown fox jumps over a lazy dog that sleeps beside the old red barn"  # 16 words
FILLER = [
    f"Document {number} is about number {number} and about nothing else at all." for number in range(60)
]


def words_of(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def runs_of(words: list[str], length: int) -> set[tuple[str, ...]]:
    return {tuple(words[start : start + length]) for start in range(len(words) - length + 1)}


def passages_of(texts: list[str]) -> set[tuple[str, ...]]:
    """What is looked for, said plainly."""
    found: set[tuple[str, ...]] = set()
    for words in map(words_of, texts):
        if len(words) >= 8:
            found |= runs_of(words, min(13, len(words)))
    return found


def is_shared(text: str, passages: set[tuple[str, ...]]) -> bool:
    return any(runs_of(words_of(text), length) & passages for length in range(8, 14))


def write_lines(path: Path, lines: list[object]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


# Words


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=30), max_size=6), st.integers(0, 9))
def test_words_equal_a_regular_expression(texts: list[str], block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ngrams, "BLOCK_CHARACTERS", block)
        found = hash_words(texts)
    expected = [words_of(text) for text in texts]
    assert np.diff(found.bounds).tolist() == [len(words) for words in expected]
    flat = list(itertools.chain.from_iterable(expected))
    numbers = dict(zip(flat, found.hashes.tolist(), strict=True))
    assert [numbers[word] for word in flat] == found.hashes.tolist()  # equal words, equal numbers
    assert len(set(numbers.values())) == len(numbers)


def test_hashes_are_the_same_on_every_machine() -> None:
    found = hash_words(["Ünder_score's 42"])
    assert list(map(hex, found.hashes)) == [  # ünder score s 42
        *("0xf1886e5e07388f3c", "0xa5c709be3bfd4d8a", "0xb9352cc9fbd7921", "0xc780ec80c9663778")
    ]
    assert list(map(hex, hash_windows(found, 2)[0])) == [
        *("0xe4a21115791e868e", "0x280f29de3a1c9cbf", "0x69afc3280f4c9f9")
    ]


def test_windows_stay_within_a_text() -> None:
    texts = ["a b c", "", "d", "a b c d", "b c"]
    hashes, places = hash_windows(hash_words(texts), 2)
    assert places.tolist() == [0, 0, 3, 3, 3, 4]
    assert len(set(hashes.tolist())) == 3  # ab bc cd
    assert hashes[:2].tolist() == hashes[2:4].tolist()
    assert hashes[1] == hashes[5]
    assert hash_windows(Words(hashes[:1], np.array([0, 1])), 2)[0].size == 0


def test_a_million_windows_have_different_hashes() -> None:
    words = [str(number % 1000) for number in range(1_000_000)]
    random.Random(0).shuffle(words)
    hashes, _ = hash_windows(hash_words([" ".join(words)]), 13)
    assert np.unique(hashes).size == hashes.size == 1_000_000 - 12


# Search


def test_thirteen_words_or_a_short_text_are_found(tmp_path: Path) -> None:
    texts = [PASSAGE, "one two three four five six seven eight", "a label of seven words it is"]
    search = BenchmarkSearch(build_index(benchmark_names([write_lines(tmp_path / "a.jsonl", texts)])))
    words = PASSAGE.split()
    found = [
        "So: " + "\n -- ".join(words[1:14]).upper() + "!",
        "zero One, two, three, four, five, six, seven; eight. Nine.",
    ]
    not_found = [
        " ".join(words[1:13]) + " and",
        " ".join([*words[:7], "nimbly", *words[7:]][:14]),
        "one two three four five six seven",
        "a label of seven words it is",
        "",
    ]
    assert search.find(found).all()
    assert not search.find(not_found).any()


def test_benchmarks_are_read_field_by_field(tmp_path: Path) -> None:
    path = tmp_path / "all.jsonl"
    write_lines(
        path,
        [
            {"ctx": "A man.", "endings": ["sits", "runs"], "label": 3, "split": "val"},
            {"question": "Why?", "choices": {"text": ["so", "no"], "label": ["A", "B"]}},
            {"goal": "Boil it", "sol1": "hot", "sol2": "cold"},
            {"text": "alone", "more": [["deep"], None, 1.5]},
            ["a list"],
        ],
    )
    path.write_text(path.read_text() + "\n\n")
    assert list(_read_texts(path)) == [
        *("A man. sits", "A man. runs", "val", "Why? so", "Why? no", "Why? A", "Why? B"),
        *("Boil it", "hot", "cold", "deep", "alone", "a list"),
    ]
    (tmp_path / "text.tokens").write_text(" = Title = \n \n A text .\n")
    assert list(_read_texts(tmp_path / "text.tokens")) == [" = Title = \n \n A text .\n"]


def test_python_documents_against_sets(tmp_path: Path) -> None:
    """Benchmarks cut from the documents themselves, so that many share much and most nothing."""
    documents = list(itertools.islice(python_texts(), 80, 280))
    cut = random.Random(1)
    benchmarks = []
    for number in range(3):
        sources = cut.sample(documents, 12)
        texts = [" ".join(text.split()[5 : 5 + cut.randrange(6, 40)]) for text in sources]
        benchmarks.append(write_lines(tmp_path / f"{number}.jsonl", [{"text": text} for text in texts]))
    files = benchmark_names(benchmarks)
    search = BenchmarkSearch(build_index(files))
    batches = (documents[start : start + 7] for start in range(0, len(documents), 7))
    found = np.concatenate([search.find(batch) for batch in batches])
    for number, path in enumerate(files.values()):
        passages = passages_of(list(_read_texts(path)))
        expected = [is_shared(document, passages) for document in documents]
        assert ((found >> np.uint64(number)) & np.uint64(1)).astype(bool).tolist() == expected
    assert 20 < np.count_nonzero(found) < 120


# In a preparation

OTHER = "where are the songs of spring, aye, where are they? Think not of them, thou hast"


@pytest.fixture
def config(make_config: Any, tmp_path: Path) -> PrepareConfig:
    """Three documents hold the passage of "a", one that of "b", one both; one of them is there twice."""
    (tmp_path / "none.txt").write_text("nothing of this is in any of the documents that are prepared here")
    first, planted = f"First. {PASSAGE}", [f"{PASSAGE.upper()}!", OTHER, f"{OTHER}: {PASSAGE}"]
    texts = [*FILLER[:30], first, *FILLER[30:], *planted, first, ""]
    benchmarks = (
        write_lines(tmp_path / "b.jsonl", [{"text": OTHER}]),
        write_lines(tmp_path / "a.jsonl", [{"text": PASSAGE}]) + f",{tmp_path}/none.txt",
    )
    return make_config(texts, files=3, validation_fraction=0.3, decontaminate=benchmarks)


@pytest.mark.parametrize("policy", ["report", "drop"])
def test_contaminated_documents_are_counted(config: PrepareConfig, texts_in: Any, policy: Any) -> None:
    manifest = prepare_shards(dataclasses.replace(config, on_contaminated=policy))
    assert manifest.contaminated_documents == {"a": 3, "b": 2, "none": 0}
    assert (manifest.documents, manifest.duplicate_documents) == (64 if policy == "report" else 60, 1)
    (line,) = [line for line in summarize_prepared(manifest) if line.startswith("contaminated: ")]
    assert "a 3 documents" in line
    if policy == "drop":
        assert {*sum(texts_in(config).values(), [])} == {*FILLER}
        return
    plain = prepare_shards(dataclasses.replace(config, decontaminate=(), out=f"{config.out}-without"))
    assert (plain.train, plain.validation) == (manifest.train, manifest.validation)
    assert plain.contaminated_documents == {}
    assert not any("contaminated" in line for line in summarize_prepared(plain))


def test_documents_after_the_limit_are_not_counted(config: PrepareConfig) -> None:
    tokens = sum(len(text) + 1 for text in FILLER[:30]) + 1  # with the first that holds the passage
    manifest = prepare_shards(dataclasses.replace(config, tokens=tokens))
    assert manifest.contaminated_documents == {"a": 1, "b": 0, "none": 0}


def test_changed_benchmark_is_another_request(config: PrepareConfig) -> None:
    manifest = prepare_shards(config)
    assert prepare_shards(dataclasses.replace(config, decontaminate=config.decontaminate[::-1])) == manifest
    for other in (
        dataclasses.replace(config, decontaminate=()),
        dataclasses.replace(config, on_contaminated="drop"),
    ):
        with pytest.raises(ValueError, match="decontaminate|on_contaminated"):
            prepare_shards(other)
    Path(config.decontaminate[0]).write_text(json.dumps({"text": PASSAGE[::-1]}))
    with pytest.raises(ValueError, match="--out"):
        prepare_shards(config)


@pytest.mark.parametrize(
    "content,where",
    [
        (b'{"text": 1}\n', "8 words"),
        (b'{"text": "x"}\n{\n', "line 2"),
        (b'\xef\xbb\xbf{"text": "x"}\n{\n', "line 2"),
        (b'{"text": "\xff"}\n', "byte 10"),
    ],
)
def test_damaged_benchmark_is_named(
    config: PrepareConfig, tmp_path: Path, content: bytes, where: str
) -> None:
    (tmp_path / "c.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=rf"decontaminate: .*c\.jsonl .*{where}"):
        prepare_shards(dataclasses.replace(config, decontaminate=(f"{tmp_path}/c.jsonl",)))
    assert not Path(config.out).exists()


def test_useless_benchmarks_are_refused(config: PrepareConfig, tmp_path: Path) -> None:
    named = dataclasses.replace(config, decontaminate=("hellaswag", str(tmp_path / "texts")))
    assert ["decontaminate" in problem for problem in named.problems()] == [True, True]
    nothing = PrepareConfig(source="python-docs", on_contaminated="drop")
    assert ["decontaminate" in problem for problem in nothing.problems()] == [True]
    for paths in (["x/a.jsonl", "y/a.txt"], [f"{number}.txt" for number in range(65)]):
        with pytest.raises(ValueError, match="decontaminate"):
            benchmark_names(paths)
    for number in range(3):
        write_lines(tmp_path / "texts" / f"{number}.jsonl", [{"text": f"{number} {PASSAGE}"}])
    with pytest.raises(ValueError, match="every document"):
        prepare_shards(dataclasses.replace(config, on_contaminated="drop"))


def test_manifest_without_these_fields_verifies(tmp_path: Path, prepared: Callable[..., Manifest]) -> None:
    manifest = prepared(tmp_path / "folder", [1, 2, 3])
    written = (tmp_path / "folder" / "manifest.json").read_text()
    assert "contaminated" not in written
    assert "near_duplicate" not in written
    assert read_manifest(tmp_path / "folder") == manifest
