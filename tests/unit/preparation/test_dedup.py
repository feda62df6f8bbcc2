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
from overnight.preparation import assemble, minhash
from overnight.preparation import prepare as prepare_module
from overnight.preparation.command import summarize_prepared
from overnight.preparation.dedup import dedup_steps
from overnight.preparation.minhash import WordSignature
from overnight.preparation.prepare import prepare_shards
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


# What stays


def test_first_of_near_duplicates_stays(config: PrepareConfig, texts_in: Any) -> None:
    assert min(map(similarity, TEXTS, ALMOST)) > 0.96
    manifest = prepare_shards(config)
    train, validation = (texts_in(config, split) for split in ("train", "validation"))
    assert {*train, *validation} == {*TEXTS}
    assert most_similar(validation, train) < 0.1
    counts = (manifest.documents, manifest.near_duplicate_documents, manifest.duplicate_documents)
    assert counts == (60, 25, 1)
    assert any("near-duplicates 25" in line for line in summarize_prepared(manifest))
    with pytest.raises(ValueError, match="near_duplicates"):
        prepare_shards(dataclasses.replace(config, near_duplicates="keep"))
    keeping = elsewhere(config, "all", near_duplicates="keep")
    manifest = prepare_shards(keeping)
    train, validation = (texts_in(keeping, split) for split in ("train", "validation"))
    assert {*train, *validation} == {*TEXTS, *ALMOST}
    assert most_similar(validation, train) > 0.96
    assert (manifest.documents, manifest.near_duplicate_documents) == (85, 0)


def test_texts_that_share_a_part_stay(config: PrepareConfig, write_texts: Any) -> None:
    halves = [nearly(text, 20) for text in TEXTS[:20]]  # a probability of 0.01 each
    assert all(0.3 < similarity(one, other) < 0.6 for one, other in zip(TEXTS, halves, strict=False))
    write_texts(Path(str(config.source)) / "9.jsonl", halves)
    manifest = prepare_shards(config)
    assert 25 <= manifest.near_duplicate_documents <= 28


def test_contaminated_document_does_not_stand_for_its_cluster(
    config: PrepareConfig, tmp_path: Path, texts_in: Any, write_texts: Any
) -> None:
    """The first of a cluster is contaminated: then the second stays."""
    words = TEXTS[0].split()
    place = next(i for i in range(300) if words[i] != ALMOST[0].split()[i])  # what the second has not
    passage = " ".join(words[max(0, place - 6) :][:13])
    write_texts(tmp_path / "benchmark.jsonl", [passage])
    benchmarks = (str(tmp_path / "benchmark.jsonl"),)
    manifest = prepare_shards(dataclasses.replace(config, decontaminate=benchmarks, on_contaminated="drop"))
    kept = set(texts_in(config, "train") + texts_in(config, "validation"))
    assert kept == {ALMOST[0], *TEXTS[1:]}
    assert manifest.contaminated_documents == {"benchmark": 1}


# Who does the work


def stop(*_: object) -> None:
    raise KeyboardInterrupt


def test_near_duplicates_do_not_depend_on_the_order_of_ranks(
    config: PrepareConfig, small_units: None, monkeypatch: pytest.MonkeyPatch, contents: Any
) -> None:
    """As an array of Slurm's jobs would do it."""
    monkeypatch.setattr(assemble, "decide_layout", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare_shards(config)
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


@pytest.mark.parametrize("step", ["get_signature", "MinhashDedupBuckets", "MinhashDedupCluster"])
def test_interrupted_step_continues(
    config: PrepareConfig, small_units: None, step: str, monkeypatch: pytest.MonkeyPatch, contents: Any
) -> None:
    expected = elsewhere(config, "expected")
    prepare_shards(expected)
    owner = WordSignature if step == "get_signature" else minhash
    real, calls = getattr(owner, step), []

    def stop_at(*given: Any, **more: Any) -> Any:
        calls.append(None)
        return stop() if len(calls) == (20 if owner is WordSignature else 1) else real(*given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(owner, step, stop_at)
        with pytest.raises(KeyboardInterrupt):
            prepare_shards(config)
    if owner is minhash:  # the signatures are complete
        monkeypatch.setattr(WordSignature, "run", lambda *_: pytest.fail("signed again"))
    prepare_shards(config)
    assert contents(config.out) == contents(expected.out)


def test_more_units_are_compared_again(
    config: PrepareConfig, monkeypatch: pytest.MonkeyPatch, contents: Any, texts_in: Any, write_texts: Any
) -> None:
    """With a limit on tokens, units are asked for until there are enough."""
    source = Path(str(config.source))
    pairs = [text for both in zip(TEXTS, map(nearly, TEXTS), strict=True) for text in both]
    for number in range(12):
        write_texts(source / f"{number}.jsonl", pairs[number * 10 :][:10])
    kept = sorted(range(12), key=str)  # the order of the files
    texts = [TEXTS[number * 5 + k] for number in kept for k in range(5)][:40]
    limited = {"tokens": sum(len(text) + 1 for text in texts)}
    prepare_shards(elsewhere(config, "full", **limited))
    wanted: list[int] = []
    real = prepare_module.request_units
    monkeypatch.setattr(prepare_module, "UNIT_BYTES", 10_000)
    monkeypatch.setattr(prepare_module, "BYTES_PER_TOKEN_AT_MOST", 1)
    monkeypatch.setattr(
        prepare_module, "request_units", lambda place, units: wanted.append(units) or real(place, units)
    )
    for workers in (1, 3):
        cut = elsewhere(config, f"cut-{workers}", workers=workers, **limited)
        prepare_shards(cut)
        assert sorted(texts_in(cut, "train") + texts_in(cut, "validation")) == sorted(texts)
        assert contents(cut.out) == contents(f"{config.out}-full")
    assert len(wanted) == 4
    assert wanted[0] < wanted[1] < 12


# Datatrove


def test_signatures_equal_datatroves(tmp_path: Path) -> None:
    signature = WordSignature(tmp_path)
    for text in ("one two three four five", TEXTS[0], " ".join(TEXTS)):
        shingles = signature.get_shingles(text)
        assert len(shingles) == len(text.split()) - 4
        theirs = MinhashDedupSignature.get_signature(signature, shingles)
        assert signature.get_signature(shingles) == theirs
        assert (len(theirs), {len(bucket) for bucket in theirs}) == (14, {8})
    assert signature.get_shingles("one two three four").size == 0


def test_near_duplicates_need_datatrove(config: PrepareConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "overnight.preparation.minhash", None)
    with pytest.raises(ValueError, match=r"near_duplicates=drop .*'overnight\[data\]'"):
        prepare_shards(config)
    assert not Path(config.out or "").exists()
    prepare_shards(dataclasses.replace(config, near_duplicates="keep"))


def test_datatrove_is_silent(config: PrepareConfig, capfd: pytest.CaptureFixture[str]) -> None:
    prepare_shards(config)
    said = capfd.readouterr()
    assert said.out == ""
    assert [line.split(":")[0] for line in said.err.splitlines()] == [
        *("hashing", "tokenizer", "encoding", "near-duplicates")
    ]
