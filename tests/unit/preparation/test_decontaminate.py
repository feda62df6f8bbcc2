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
from overnight.preparation import prepare as prepare_module
from overnight.preparation.command import summarize_prepared
from overnight.preparation.decontaminate import BenchmarkSearch, _read_texts, benchmark_names, build_index
from overnight.preparation.ngrams import Words, hash_windows, hash_words
from overnight.preparation.prepare import prepare
from overnight.preparation.prepare_config import PrepareConfig
from overnight.preparation.sources import python_documents

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


# words


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=30), max_size=6), st.integers(0, 9))
def test_words_are_what_a_regular_expression_finds(texts: list[str], block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ngrams, "BLOCK_CHARACTERS", block)
        found = hash_words(texts)
    expected = [words_of(text) for text in texts]
    assert np.diff(found.bounds).tolist() == [len(words) for words in expected]
    flat = list(itertools.chain.from_iterable(expected))
    numbers = dict(zip(flat, found.hashes.tolist(), strict=True))
    assert [numbers[word] for word in flat] == found.hashes.tolist()  # equal words, equal numbers
    assert len(set(numbers.values())) == len(numbers)


def test_numbers_of_words_are_these_on_every_machine() -> None:
    found = hash_words(["Ünder_score's 42"])
    assert list(map(hex, found.hashes)) == [  # ünder score s 42
        *("0xf1886e5e07388f3c", "0xa5c709be3bfd4d8a", "0xb9352cc9fbd7921", "0xc780ec80c9663778")
    ]
    assert list(map(hex, hash_windows(found, 2)[0])) == [
        *("0xe4a21115791e868e", "0x280f29de3a1c9cbf", "0x69afc3280f4c9f9")
    ]


def test_runs_of_words_stay_within_a_text() -> None:
    texts = ["a b c", "", "d", "a b c d", "b c"]
    hashes, places = hash_windows(hash_words(texts), 2)
    assert places.tolist() == [0, 0, 3, 3, 3, 4]
    assert len(set(hashes.tolist())) == 3  # ab bc cd
    assert hashes[:2].tolist() == hashes[2:4].tolist()
    assert hashes[1] == hashes[5]
    assert hash_windows(Words(hashes[:1], np.array([0, 1])), 2)[0].size == 0


def test_a_million_runs_have_as_many_numbers() -> None:
    words = [str(number % 1000) for number in range(1_000_000)]
    random.Random(0).shuffle(words)
    hashes, _ = hash_windows(hash_words([" ".join(words)]), 13)
    assert np.unique(hashes).size == hashes.size == 1_000_000 - 12


# search


def search_for(tmp_path: Path, *texts: str) -> Callable[[str], bool]:
    path = write_lines(tmp_path / "benchmark.jsonl", list(texts))
    search = BenchmarkSearch(build_index(benchmark_names([path])))
    return lambda text: bool(search.find([text])[0])


def test_thirteen_words_are_found_whatever_stands_between_them(tmp_path: Path) -> None:
    is_found = search_for(tmp_path, PASSAGE)
    words = PASSAGE.split()
    assert is_found("So: " + "\n -- ".join(words[1:14]).upper() + "!")
    assert not is_found(" ".join(words[1:13]) + " and")
    assert not is_found(" ".join([*words[:7], "nimbly", *words[7:]][:14]))
    assert not is_found("")


def test_a_short_text_counts_as_a_whole_and_a_label_not_at_all(tmp_path: Path) -> None:
    is_found = search_for(tmp_path, "one two three four five six seven eight", "a label of seven words it is")
    assert is_found("zero One, two, three, four, five, six, seven; eight. Nine.")
    assert not is_found("one two three four five six seven")
    assert not is_found("a label of seven words it is")


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


def check_against_sets(files: dict[str, Path], documents: list[str]) -> np.ndarray:
    search = BenchmarkSearch(build_index(files))
    found = np.concatenate(
        [search.find(documents[start : start + 7]) for start in range(0, len(documents), 7)]
    )
    for number, path in enumerate(files.values()):
        passages = passages_of(list(_read_texts(path)))
        expected = [is_shared(document, passages) for document in documents]
        assert ((found >> np.uint64(number)) & np.uint64(1)).astype(bool).tolist() == expected
    return found


def test_python_documents_against_sets(tmp_path: Path) -> None:
    """Benchmarks cut from the documents themselves, so that many share much and most nothing."""
    documents = [document.text for document in itertools.islice(python_documents(), 80, 280)]
    cut = random.Random(1)
    benchmarks = []
    for number in range(3):
        sources = cut.sample(documents, 12)
        texts = [" ".join(text.split()[5 : 5 + cut.randrange(6, 40)]) for text in sources]
        benchmarks.append(write_lines(tmp_path / f"{number}.jsonl", [{"text": text} for text in texts]))
    found = check_against_sets(benchmark_names(benchmarks), documents)
    assert 20 < np.count_nonzero(found) < 120


def test_real_benchmarks_against_sets(shared_data: Path, tmp_path: Path) -> None:
    files = benchmark_names(
        [
            str(shared_data / "hellaswag" / "hellaswag_val_first2000.jsonl"),
            str(shared_data / "lambada" / "lambada_test_first500.jsonl"),
        ]
    )
    assert list(files) == ["hellaswag_val_first2000", "lambada_test_first500"]
    lines = [json.loads(line) for line in files["hellaswag_val_first2000"].read_text().splitlines()]
    planted = [f"Seen: {line['ctx'].upper()}... {line['endings'][line['label']]}" for line in lines[:40]]
    endings = [" ".join(line["endings"]) for line in lines[40:80]]
    passage = json.loads(files["lambada_test_first500"].read_text().splitlines()[7])["text"]
    clean = (shared_data / "shakespeare" / "input.txt").read_text()[:40_000].split("\n\n")
    found = check_against_sets(files, [*planted, *endings, passage, *clean])
    assert np.count_nonzero(found[:40] & np.uint64(1)) >= 39
    assert found[80] == 2
    assert not found[81:].any()


# in the pipeline


@pytest.fixture
def config(tmp_path: Path) -> PrepareConfig:
    """Three documents hold the passage of "a", one that of "b", one both; one of them comes twice."""
    texts = [
        *FILLER[:30],
        f"First. {PASSAGE}",
        *FILLER[30:],
        f"{PASSAGE.upper()}!",
        OTHER,
        f"{OTHER}: {PASSAGE}",
        f"First. {PASSAGE}",
        "",
    ]
    (tmp_path / "texts").mkdir()
    for number in range(3):
        write_lines(
            tmp_path / "texts" / f"{number}.jsonl", [{"text": text} for text in texts[number * 25 :][:25]]
        )
    return PrepareConfig(
        source=str(tmp_path / "texts"),
        out=str(tmp_path / "out"),
        tokenizer="characters",
        validation_fraction=0.3,
        workers=1,
        decontaminate=(
            write_lines(tmp_path / "b.jsonl", [{"text": OTHER}]),
            write_lines(tmp_path / "a.jsonl", [{"text": PASSAGE}]) + f",{tmp_path}/none.txt",
        ),
    )


OTHER = "where are the songs of spring, aye, where are they? Think not of them, thou hast"


@pytest.fixture(autouse=True)
def _clean_benchmark(tmp_path: Path) -> None:
    (tmp_path / "none.txt").write_text(
        "nothing of this stands in any of the documents that are prepared here"
    )


def test_they_are_counted_and_kept(config: PrepareConfig) -> None:
    manifest = prepare(config)
    assert manifest is not None
    assert manifest.contaminated_documents == {"a": 3, "b": 2, "none": 0}
    assert (manifest.documents, manifest.duplicate_documents) == (64, 1)
    assert (
        "contaminated: a 3 documents, b 2 documents, none 0 documents (reported, kept)"
        in summarize_prepared(manifest)
    )
    without = dataclasses.replace(config, decontaminate=(), out=f"{config.out}-without")
    plain = prepare(without)
    assert plain is not None
    assert (plain.train, plain.validation) == (manifest.train, manifest.validation)
    assert plain.contaminated_documents == {}
    assert not any("contaminated" in line for line in summarize_prepared(plain))


def test_they_are_left_out(config: PrepareConfig, texts_in: Any) -> None:
    manifest = prepare(dataclasses.replace(config, on_contaminated="drop"))
    assert manifest is not None
    assert manifest.contaminated_documents == {"a": 3, "b": 2, "none": 0}
    assert (manifest.documents, manifest.duplicate_documents) == (60, 1)
    assert {*texts_in(config, "train"), *texts_in(config, "validation")} == set(FILLER)
    assert "contaminated: a 3 documents, b 2 documents, none 0 documents (left out)" in summarize_prepared(
        manifest
    )


@pytest.mark.parametrize("on_contaminated", ["report", "drop"])
def test_it_depends_neither_on_the_units_nor_on_who_works(
    config: PrepareConfig, on_contaminated: str, monkeypatch: pytest.MonkeyPatch, contents: Any
) -> None:
    config = dataclasses.replace(config, on_contaminated=on_contaminated)  # type: ignore[arg-type]
    prepare(config)
    monkeypatch.setattr(prepare_module, "UNIT_BYTES", 500)
    for workers in (1, 8):
        other = dataclasses.replace(config, out=f"{config.out}-{workers}", workers=workers)
        prepare(other)
        assert contents(other.out) == contents(config.out)


def test_documents_behind_the_last_that_was_wanted_are_not_counted(config: PrepareConfig) -> None:
    tokens = sum(len(text) + 1 for text in FILLER[:30]) + 1  # with the first that holds the passage
    manifest = prepare(dataclasses.replace(config, tokens=tokens))
    assert manifest is not None
    assert manifest.contaminated_documents == {"a": 1, "b": 0, "none": 0}


def test_another_benchmark_is_another_request(config: PrepareConfig) -> None:
    manifest = prepare(config)
    assert prepare(dataclasses.replace(config, decontaminate=config.decontaminate[::-1])) == manifest
    for other in (
        dataclasses.replace(config, decontaminate=()),
        dataclasses.replace(config, on_contaminated="drop"),
    ):
        with pytest.raises(ValueError, match=r"holds something else \((decontaminate|on_contaminated) is "):
            prepare(other)
    Path(config.decontaminate[0]).write_text(json.dumps({"text": PASSAGE[::-1]}))
    with pytest.raises(ValueError, match="holds something else"):
        prepare(config)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b'{"text": 1}\n', r"c\.jsonl holds no text of 8 words or more"),
        (b'{"text": "x"}\n{\n', r"c\.jsonl line 2 is not JSON"),
        (b'{"text": "\xff"}\n', r"c\.jsonl is not UTF-8 at byte 10"),
    ],
)
def test_a_benchmark_that_cannot_be_read_is_named(
    config: PrepareConfig, tmp_path: Path, content: bytes, sentence: str
) -> None:
    (tmp_path / "c.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        prepare(dataclasses.replace(config, decontaminate=(f"{tmp_path}/c.jsonl",)))
    assert not Path(config.out or "").exists()


def test_what_makes_no_sense_is_refused(config: PrepareConfig, tmp_path: Path) -> None:
    named = dataclasses.replace(config, decontaminate=("hellaswag", str(tmp_path / "texts")))
    assert [problem[:33] for problem in named.problems()] == [
        "decontaminate: hellaswag is no .j",
        f"decontaminate: {tmp_path}"[:33],
    ]
    nothing = PrepareConfig(source="python-docs", on_contaminated="drop", near_duplicates="find")  # type: ignore[arg-type]
    assert nothing.problems() == [
        "near_duplicates='find' must be keep or drop",
        "on_contaminated=drop needs decontaminate: the benchmarks' files",
    ]
    with pytest.raises(ValueError, match=r"two of x/a\.jsonl, y/a\.txt have one name"):
        benchmark_names(["x/a.jsonl", "y/a.txt"])
    with pytest.raises(ValueError, match="65 files are more than 64"):
        benchmark_names([f"{number}.txt" for number in range(65)])
    everything = dataclasses.replace(config, on_contaminated="drop")
    for number in range(3):
        write_lines(tmp_path / "texts" / f"{number}.jsonl", [{"text": f"{number} {PASSAGE}"}])
    with pytest.raises(ValueError, match="every document of texts shares a passage with a benchmark"):
        prepare(everything)


def test_a_manifest_without_these_fields_still_verifies(
    tmp_path: Path, prepared: Callable[..., Manifest]
) -> None:
    manifest = prepared(tmp_path / "folder", [1, 2, 3])
    written = (tmp_path / "folder" / "manifest.json").read_text()
    assert "contaminated" not in written
    assert "near_duplicate" not in written
    assert read_manifest(tmp_path / "folder") == manifest
