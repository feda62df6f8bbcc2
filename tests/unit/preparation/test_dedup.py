"""Duplicates and near-duplicates: what is found and what stays, compared with datatrove."""

from __future__ import annotations

import dataclasses
import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datatrove.data import Document as TroveDocument
from datatrove.pipeline.dedup.minhash import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupSignature,
)
from datatrove.utils.hashing import HashConfig
from datatrove.utils.word_tokenizers import WhitespaceTokenizer
from hypothesis import given
from hypothesis import strategies as st

from overnight.preparation import dedup, tokenize
from overnight.preparation import prepare as prepare_module
from overnight.preparation.command import summarize_prepared
from overnight.preparation.dedup import find_duplicates, find_near_duplicates, min_hashes, sign_texts
from overnight.preparation.documents import RECORD, STATUSES, document_hash
from overnight.preparation.ngrams import Hashes, hash_windows, hash_words
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
def config(make_config: Any) -> PrepareConfig:
    """All texts, then 25 that are almost among them, an equal one and an empty one."""
    texts = [*TEXTS, TEXTS[3], "", *ALMOST]
    return make_config(texts, files=9, validation_fraction=0.3, near_duplicates="drop")


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
    keeping = elsewhere(config, "all", near_duplicates="keep")
    manifest, whole = (prepare_shards(each) for each in (config, keeping))
    counts = manifest.documents, manifest.near_duplicate_documents, manifest.duplicate_documents
    assert counts == (60, 25, 1)
    assert (whole.documents, whole.near_duplicate_documents) == (85, 0)
    for each, texts, is_near in ((config, TEXTS, False), (keeping, [*TEXTS, *ALMOST], True)):
        found = texts_in(each)
        assert {*found["train"], *found["validation"]} == {*texts}
        assert (most_similar(found["validation"], found["train"]) > 0.96) == is_near
    assert any("near-duplicates 25" in line for line in summarize_prepared(manifest))
    with pytest.raises(ValueError, match="near_duplicates"):
        prepare_shards(dataclasses.replace(config, near_duplicates="keep"))


def test_texts_that_share_a_part_stay(config: PrepareConfig, write_texts: Any) -> None:
    halves = [nearly(text, 20) for text in TEXTS[:20]]  # a probability of 0.01 each
    assert all(0.3 < similarity(one, other) < 0.6 for one, other in zip(TEXTS, halves, strict=False))
    write_texts(Path(config.source) / "9.jsonl", halves)
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
    assert {*sum(texts_in(config).values(), [])} == {ALMOST[0], *TEXTS[1:]}
    assert manifest.contaminated_documents == {"benchmark": 1}


def test_more_units_are_compared_again(
    config: PrepareConfig, monkeypatch: pytest.MonkeyPatch, contents: Any, texts_in: Any, write_texts: Any
) -> None:
    """With a limit on tokens, units are asked for until there are enough."""
    source = Path(config.source)
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
        assert sorted(sum(texts_in(cut).values(), [])) == sorted(texts)
        assert contents(cut.out) == contents(f"{config.out}-full")
    assert len(wanted) == 4
    assert wanted[0] < wanted[1] < 12


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_interrupted_unit_is_signed_again(
    config: PrepareConfig, monkeypatch: pytest.MonkeyPatch, contents: Any, failing: int
) -> None:
    """Interrupted before the records, the signatures, or the mark of a complete unit are written."""
    expected = elsewhere(config, "expected")
    prepare_shards(expected)
    real, calls = tokenize.write_atomically, itertools.count(1)

    def stop(*given: Any) -> None:
        if next(calls) == failing:
            raise KeyboardInterrupt
        real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(tokenize, "write_atomically", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare_shards(config)
    prepare_shards(config)
    assert contents(config.out) == contents(expected.out)


# What is found


@given(st.lists(st.text("abc", max_size=2), max_size=60), st.integers(1, 50))
def test_first_of_equal_texts_is_kept(texts: list[str], at_once: int) -> None:
    def records(*statuses: str, texts: list[str] = texts) -> np.ndarray:
        codes = [STATUSES.index(status) for status in statuses]
        rows = [(*document_hash(text), 0, 1, 1, code) for text, code in zip(texts, codes, strict=True)]
        return np.array(rows, dtype=RECORD)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dedup, "HASHES_AT_ONCE", at_once)  # so that ranges are compared one by one
        duplicates = find_duplicates(records(*["kept"] * len(texts)))
    kept = [text for text, again in zip(texts, duplicates, strict=True) if not again]
    assert kept == [*dict.fromkeys(texts)]
    # A text that is skipped, since its file is damaged, does not remove a sound copy after it.
    assert not find_duplicates(records("skipped", "kept", "skipped", texts=["a", "a", "a"])).any()


TROVE = MinhashConfig(
    n_grams=5, num_buckets=14, hashes_per_bucket=8, hash_config=HashConfig(precision=64, hash_fc="sha1")
)


class TroveSignature(MinhashDedupSignature):  # untyped there
    """Datatrove's first stage with this package's words."""

    def get_shingles(self, text: str) -> Hashes:
        return hash_windows(hash_words([text]), 5)[0].reshape(-1, 1)


def test_near_duplicates_equal_datatroves(tmp_path: Path) -> None:
    """Chains of ever more changed copies, halves, and texts too short to compare."""
    chains = [TEXTS[:20]]
    for _ in range(6):
        chains.append([nearly(text, 4) for text in chains[-1]])
    halves = [nearly(text, 20) for text in TEXTS[:40]]
    texts = [*itertools.chain(*chains), *TEXTS, *halves, "one two three four", "one two three four", ""]
    random.Random(1).shuffle(texts)
    stages = [str(tmp_path / name) for name in ("signatures", "pairs", "clusters")]
    signature = TroveSignature(stages[0], TROVE, language=WhitespaceTokenizer())
    signature.run((TroveDocument(text, str(n)) for n, text in enumerate(texts)), 0)
    for bucket in range(14):
        MinhashDedupBuckets(*stages[:2], config=TROVE).run(None, bucket, 14)
    MinhashDedupCluster(*stages[1:], config=TROVE, save_cluster_id=True).run(None, 0, 1)
    found = np.fromfile(tmp_path / "clusters" / "000000.clusters", "<u4").reshape(-1, 2)
    again = found[:, 0][np.setdiff1d(np.arange(len(found)), np.unique(found[:, 1], return_index=True)[1])]
    kept = np.full(len(texts), STATUSES.index("kept"), dtype=np.uint8)
    signed = np.concatenate([sign_texts(texts[:99]), sign_texts(texts[99:])], axis=1)
    assert np.flatnonzero(find_near_duplicates(signed, kept)).tolist() == again.tolist()
    assert 120 < len(again) < 200
    for text in (TEXTS[0], " ".join(TEXTS), "one two three four five"):
        shingles = signature.get_shingles(text)
        assert min_hashes(shingles.ravel()).tolist() == signature.get_signature(shingles)
