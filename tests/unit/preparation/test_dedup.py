"""Near-duplicates, through datatrove: what is found, what stays, whoever does the work."""

from __future__ import annotations

import dataclasses
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from datatrove.pipeline.dedup.minhash import MinhashDedupSignature

from overnight.data.atomic_folder import staging_path
from overnight.preparation import prepare as prepare_module
from overnight.preparation.command import summarize_prepared
from overnight.preparation.dedup import dedup_steps
from overnight.preparation.minhash import WordSignature
from overnight.preparation.prepare import prepare
from overnight.preparation.prepare_config import PrepareConfig

VOCABULARY = [f"w{number}" for number in range(500)]
TEXTS = [" ".join(random.Random(number).choices(VOCABULARY, k=300)) for number in range(60)]


def nearly(text: str, changes: int = 1) -> str:
    """The text with some of its words replaced, so that 1 - 10 * changes / 300 of its runs stay, about."""
    words = text.split()
    chosen = random.Random(text)
    for place in chosen.sample(range(len(words)), changes):
        words[place] = f"other{chosen.random()}"[:9].replace(".", "")
    return " ".join(words)


ALMOST = [nearly(text) for text in TEXTS[:25]]


@pytest.fixture
def config(tmp_path: Path, write_texts: Any) -> PrepareConfig:
    """All texts, then 25 that are almost among them, an equal one and an empty one."""
    source = tmp_path / "texts"
    source.mkdir()
    documents = [*TEXTS, TEXTS[3], "", *ALMOST]
    for number in range(9):
        write_texts(source / f"{number}.jsonl", documents[number * 10 :][:10])
    return PrepareConfig(
        source=str(source),
        out=str(tmp_path / "out"),
        tokenizer="characters",
        validation_fraction=0.3,
        workers=1,
        near_duplicates="drop",
    )


def elsewhere(config: PrepareConfig, name: str, **changes: Any) -> PrepareConfig:
    return dataclasses.replace(config, out=f"{config.out}-{name}", **changes)


def runs_of(text: str) -> set[tuple[str, ...]]:
    words = text.lower().split()
    return {tuple(words[start : start + 5]) for start in range(len(words) - 4)}


def similarity(one: str, other: str) -> float:
    """Jaccard's: the share of the two texts' runs of five words that both have."""
    both = runs_of(one), runs_of(other)
    return len(both[0] & both[1]) / len(both[0] | both[1])


def most_similar(texts: list[str], others: list[str]) -> float:
    return max(similarity(one, other) for one in texts for other in others)


# what stays


def test_of_texts_that_are_nearly_alike_the_first_stays(config: PrepareConfig, texts_in: Any) -> None:
    assert min(map(similarity, TEXTS, ALMOST)) > 0.96
    manifest = prepare(config)
    assert manifest is not None
    assert set(texts_in(config, "train") + texts_in(config, "validation")) == set(TEXTS)
    counts = (manifest.documents, manifest.near_duplicate_documents, manifest.duplicate_documents)
    assert counts == (60, 25, 1)
    assert "left out: duplicates 1, near-duplicates 25, empty 1" in summarize_prepared(manifest)


def test_without_the_option_all_stay(config: PrepareConfig, texts_in: Any) -> None:
    kept = dataclasses.replace(config, near_duplicates="keep")
    manifest = prepare(kept)
    assert manifest is not None
    assert set(texts_in(config, "train") + texts_in(config, "validation")) == {*TEXTS, *ALMOST}
    assert (manifest.documents, manifest.near_duplicate_documents) == (85, 0)
    with pytest.raises(ValueError, match="holds something else .near_duplicates is None there and drop here"):
        prepare(config)


def test_validation_shares_nothing_with_training(config: PrepareConfig, texts_in: Any) -> None:
    prepare(config)
    assert most_similar(texts_in(config, "validation"), texts_in(config, "train")) < 0.1
    kept = elsewhere(config, "kept", near_duplicates="keep")
    prepare(kept)
    assert most_similar(texts_in(kept, "validation"), texts_in(kept, "train")) > 0.96


def test_texts_that_share_a_part_stay(config: PrepareConfig, write_texts: Any) -> None:
    halves = [nearly(text, 20) for text in TEXTS[:20]]  # a probability of 0.01 each
    assert all(0.3 < similarity(one, other) < 0.6 for one, other in zip(TEXTS, halves, strict=False))
    write_texts(Path(str(config.source)) / "9.jsonl", halves)
    manifest = prepare(config)
    assert manifest is not None
    assert 25 <= manifest.near_duplicate_documents <= 28


def test_what_is_left_out_for_itself_speaks_for_nobody(
    config: PrepareConfig, tmp_path: Path, texts_in: Any, write_texts: Any
) -> None:
    """The first of a cluster is contaminated: then the second stays."""
    words = TEXTS[0].split()
    place = next(i for i in range(300) if words[i] != ALMOST[0].split()[i])  # what the second has not
    passage = " ".join(words[max(0, place - 6) :][:13])
    write_texts(tmp_path / "benchmark.jsonl", [passage])
    manifest = prepare(
        dataclasses.replace(
            config, decontaminate=(str(tmp_path / "benchmark.jsonl"),), on_contaminated="drop"
        )
    )
    assert manifest is not None
    kept = set(texts_in(config, "train") + texts_in(config, "validation"))
    assert kept == {ALMOST[0], *TEXTS[1:]}
    assert manifest.contaminated_documents == {"benchmark": 1}


def test_short_texts_are_compared_by_nothing(config: PrepareConfig, write_texts: Any) -> None:
    write_texts(Path(str(config.source)) / "9.jsonl", ["one two three four", "one two three four."])
    manifest = prepare(config)
    assert manifest is not None
    assert (manifest.documents, manifest.near_duplicate_documents) == (62, 25)


# who does the work


def test_it_depends_neither_on_the_units_nor_on_who_works(
    config: PrepareConfig, monkeypatch: pytest.MonkeyPatch, contents: Any
) -> None:
    prepare(config)
    for unit_bytes, workers in ((1, 1), (10_000, 2), (10_000, 8)):
        monkeypatch.setattr(prepare_module, "UNIT_BYTES", unit_bytes)
        other = elsewhere(config, f"{unit_bytes}-{workers}", workers=workers)
        prepare(other)
        assert contents(other.out) == contents(config.out)


def stop(*_: object) -> None:
    raise KeyboardInterrupt


def test_ranks_in_any_order_find_the_same(
    config: PrepareConfig, small_units: None, monkeypatch: pytest.MonkeyPatch, contents: Any
) -> None:
    """As an array of Slurm's jobs would do it."""
    monkeypatch.setattr(prepare_module, "decide_layout", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare(config)
    place = staging_path(Path(config.out or ""))
    found = contents(place / "near")
    assert any(found[name] for name in found if name.endswith(".clusters"))
    (place / "near").rename(place / "before")
    steps = dedup_steps(4)
    assert [ranks for _, ranks in steps] == [4, 4, 1]
    for step, ranks in steps:
        for rank in reversed(range(ranks)):
            step(place, rank, ranks)
    assert contents(place / "near") == found


@pytest.mark.parametrize("step", ["build_buckets", "build_clusters"])
def test_it_goes_on_where_it_was(
    config: PrepareConfig, small_units: None, step: str, monkeypatch: pytest.MonkeyPatch, contents: Any
) -> None:
    expected = elsewhere(config, "expected")
    prepare(expected)
    from overnight.preparation import minhash

    with monkeypatch.context() as patch:
        patch.setattr(minhash, step, stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(config)
    signed: list[int] = []
    monkeypatch.setattr(WordSignature, "run", lambda self, data, rank: signed.append(rank))
    prepare(config)
    assert signed == []
    assert contents(config.out) == contents(expected.out)


def test_an_interrupted_signature_is_written_anew(
    config: PrepareConfig, small_units: None, monkeypatch: pytest.MonkeyPatch, contents: Any
) -> None:
    expected = elsewhere(config, "expected")
    prepare(expected)
    real = WordSignature.get_signature
    calls: list[None] = []

    def stop_at_the_twentieth(self: WordSignature, shingles: Any) -> Any:
        calls.append(None)
        return stop() if len(calls) == 20 else real(self, shingles)

    with monkeypatch.context() as patch:
        patch.setattr(WordSignature, "get_signature", stop_at_the_twentieth)
        with pytest.raises(KeyboardInterrupt):
            prepare(config)
    prepare(config)
    assert contents(config.out) == contents(expected.out)


def test_more_units_are_compared_anew(
    config: PrepareConfig, monkeypatch: pytest.MonkeyPatch, contents: Any, texts_in: Any, write_texts: Any
) -> None:
    """With a limit on tokens, units are asked for until there are enough."""
    source = Path(str(config.source))
    for path in source.iterdir():
        path.unlink()
    pairs = [text for both in zip(TEXTS, map(nearly, TEXTS), strict=True) for text in both]
    write_texts(source / "all.jsonl", pairs)
    tokens = sum(len(text) + 1 for text in TEXTS[:40])
    whole = elsewhere(config, "full", tokens=tokens)
    prepare(whole)
    assert sorted(texts_in(whole, "train") + texts_in(whole, "validation")) == sorted(TEXTS[:40])
    (source / "all.jsonl").unlink()
    for number in range(12):
        write_texts(source / f"{number:02d}.jsonl", pairs[number * 10 :][:10])
    monkeypatch.setattr(prepare_module, "UNIT_BYTES", 10_000)
    wanted: list[int] = []
    real = prepare_module.request_units
    monkeypatch.setattr(
        prepare_module, "request_units", lambda place, units: wanted.append(units) or real(place, units)
    )
    monkeypatch.setattr(prepare_module, "BYTES_PER_TOKEN_AT_MOST", 1)
    for workers in (1, 3):
        cut = elsewhere(config, f"cut-{workers}", tokens=tokens, workers=workers)
        prepare(cut)
        for name, content in contents(whole.out).items():
            assert name == "manifest.json" or contents(cut.out)[name] == content  # which names the texts
    assert len(wanted) == 4
    assert wanted[0] < wanted[1] < 12


# datatrove


def test_signatures_are_those_that_datatrove_would_work_out(tmp_path: Path) -> None:
    signature = WordSignature(tmp_path)
    for text in ("one two three four five", TEXTS[0], " ".join(TEXTS)):
        shingles = signature.get_shingles(text)
        assert len(shingles) == len(text.split()) - 4
        theirs = MinhashDedupSignature.get_signature(signature, shingles)
        assert signature.get_signature(shingles) == theirs
        assert (len(theirs), {len(bucket) for bucket in theirs}) == (14, {8})
    assert signature.get_shingles("one two three four").size == 0


def test_it_needs_datatrove(config: PrepareConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "overnight.preparation.minhash", None)
    with pytest.raises(ValueError, match=r"^near_duplicates=drop needs datatrove, .*'overnight\[data\]'$"):
        prepare(config)
    assert not Path(config.out or "").exists()
    prepare(dataclasses.replace(config, near_duplicates="keep"))


def test_it_says_nothing_of_its_own(config: PrepareConfig, capfd: pytest.CaptureFixture[str]) -> None:
    prepare(config)
    said = capfd.readouterr()
    assert said.out == ""
    assert [line.split(":")[0] for line in said.err.splitlines()] == [
        *("hashing", "tokenizer", "encoding", "near-duplicates")
    ]
