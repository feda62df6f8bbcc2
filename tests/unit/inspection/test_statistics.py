from __future__ import annotations

import dataclasses
import random
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from overnight.data.shards import (
    SPLITS,
    Manifest,
    Shard,
    ShardWriter,
    read_manifest,
    write_manifest,
)
from overnight.inspection import statistics
from overnight.inspection.statistics import Inspection, count_duplicates, inspect_shards
from overnight.tokenizer.bpe import BytePair

END = 256
TOKENIZER = BytePair([])  # ids 0 to 255 are bytes in the order of their spelling, 256 is end-of-text
Texts = dict[str, list[str]]


def random_texts(seed: int) -> Texts:
    """Some hundred short texts, many of them equal, within and across the splits."""
    draw = random.Random(seed)
    pool = ["".join(draw.choices("abcdefgh \né€", k=draw.randint(1, 60))) for _ in range(120)]
    return {"train": draw.choices(pool[:100], k=150), "validation": draw.choices(pool[60:], k=40)}


def write_texts(folder: Path, texts: Texts, shard_tokens: int = 700) -> Path:
    """A prepared folder of these documents, as `overnight prepare` would write it."""
    documents = {
        split: [([END, *TOKENIZER.encode(text)], len(text.encode())) for text in texts[split]]
        for split in SPLITS
    }
    return write_documents(folder, documents, shard_tokens)


def write_ids(folder: Path, train: list[int], validation: list[int]) -> Path:
    """A prepared folder of any ids; the manifest counts documents by end-of-text ids."""
    write_documents(folder, {"train": [(train, 0)], "validation": [(validation, 0)]}, 10**9)
    manifest = read_manifest(folder)

    def counted(shard: Shard, ids: list[int]) -> Shard:
        ends = ids.count(END)
        return dataclasses.replace(shard, documents=max(1, ends), text_bytes=len(ids) - ends)

    shards = {"train": (counted(manifest.train[0], train),)}
    shards["validation"] = (counted(manifest.validation[0], validation),)
    write_manifest(folder, dataclasses.replace(manifest, **shards))
    return folder


def write_documents(
    folder: Path, documents: dict[str, list[tuple[list[int], int]]], shard_tokens: int
) -> Path:
    """A prepared folder of (ids, bytes of text)."""
    folder.mkdir()
    shards = {}
    for split in SPLITS:
        writer = ShardWriter(folder, split, TOKENIZER.vocab_size, shard_tokens)
        for ids, text_bytes in documents[split]:
            writer.add(np.array(ids, dtype=np.uint32), text_bytes)
        shards[split] = writer.finish()
    counts = ("duplicate_documents", "empty_documents", "skipped_documents", "repaired_documents")
    manifest = Manifest(
        overnight_version="0",
        source="made up",
        licence="none",
        request={},
        split_rule="by hand",
        tokenizer=TOKENIZER.name,
        tokenizer_fingerprint=TOKENIZER.fingerprint,
        vocab_size=TOKENIZER.vocab_size,
        end_of_text=END,
        documents=sum(map(len, documents.values())),
        **dict.fromkeys(counts, 0),
        **shards,
    )
    TOKENIZER.save(folder / "tokenizer")
    write_manifest(folder, manifest)
    return folder


def without_samples(found: Inspection) -> dict[str, object]:
    return {**dataclasses.asdict(found), "folder": "", "samples": ()}


@pytest.fixture(params=[700, 23])
def found(tmp_path: Path, request: pytest.FixtureRequest) -> Inspection:
    """What is found in shards of that many tokens; in the short ones, documents span several."""
    return inspect_shards(write_texts(tmp_path / "made-up", random_texts(0), request.param))


# Counts


def test_counts_equal_those_of_the_texts(found: Inspection) -> None:
    texts = random_texts(0)
    for split in found.splits:
        written = texts[split.split]
        assert split.documents == len(written)
        assert split.text_bytes == sum(len(text.encode()) for text in written)
        assert split.tokens == split.text_bytes + len(written)
        for name in ("documents", "tokens", "text_bytes"):
            assert sum(shard[name] for shard in split.shards) == getattr(split, name)
    assert {shard["tokens"] for shard in found.splits[0].shards[:-1]} <= {700, 23}


def test_lengths_equal_those_of_the_texts(found: Inspection) -> None:
    lengths = np.array([1 + len(text.encode()) for each in random_texts(0).values() for text in each])
    measured = found.lengths
    assert measured.mean == pytest.approx(lengths.mean())
    assert measured.median == np.quantile(lengths, 0.5, method="inverted_cdf")
    assert measured.percentile_90 == np.quantile(lengths, 0.9, method="inverted_cdf")
    assert (measured.shortest, measured.longest) == (lengths.min(), lengths.max())
    edges = [bucket["shortest"] for bucket in measured.histogram] + [measured.histogram[-1]["longest"] + 1]
    first = edges[0].bit_length() - 1
    assert edges == [2 ** (first + number) for number in range(len(edges))]
    assert [bucket["longest"] + 1 for bucket in measured.histogram] == edges[1:]
    assert [bucket["documents"] for bucket in measured.histogram] == np.histogram(lengths, edges)[0].tolist()


def test_frequent_tokens_equal_numpys_counts(found: Inspection, tmp_path: Path) -> None:
    contents = [path.read_bytes()[1024:] for path in sorted((tmp_path / "made-up").glob("*.bin"))]
    values, counts = np.unique(np.frombuffer(b"".join(contents), dtype="<u2"), return_counts=True)
    expected = Counter(dict(zip(values.tolist(), counts.tolist(), strict=True)))
    assert found.ids_used == len(expected)
    del expected[END]
    assert {token["id"]: token["count"] for token in found.frequent} == expected  # fewer than 20 occur
    assert [token["count"] for token in found.frequent] == sorted(expected.values(), reverse=True)
    assert {"a", "\n", r"\xe2", r"\x82"} <= {token["text"] for token in found.frequent}


# Duplicates


def naive_duplicates(texts: Texts) -> tuple[int, int, int, int | None]:
    train, validation = texts["train"], texts["validation"]
    shared = [number for number, text in enumerate(validation) if text in train]
    return (
        sum(text in train[:number] for number, text in enumerate(train)),
        sum(text in validation[:number] for number, text in enumerate(validation)),
        len(shared),
        shared[0] if shared else None,
    )


def test_duplicates_equal_naive_twin(found: Inspection) -> None:
    expected = naive_duplicates(random_texts(0))
    assert dataclasses.astuple(found.duplicates) == expected
    assert min(expected[:3]) > 0
    leak, repeated, _ = found.problems
    assert leak.startswith(f"{expected[2]:,} of 40 validation documents ")
    assert repeated.startswith(f"{expected[0]:,} of 150 train documents ")


@given(
    train=st.lists(st.integers(0, 12), max_size=40),
    validation=st.lists(st.integers(0, 12), max_size=20),
    at_once=st.integers(1, 30),
)
def test_digest_ranges_equal_naive_twin(train: list[int], validation: list[int], at_once: int) -> None:
    digests = [b"".join(bytes([n, 7 * n % 13]) * 8 for n in split) for split in (train, validation)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "DIGESTS_AT_ONCE", at_once)
        measured = count_duplicates(*digests)
    texts = {"train": list(map(str, train)), "validation": list(map(str, validation))}
    assert dataclasses.astuple(measured) == naive_duplicates(texts)


def test_half_a_digest_is_no_duplicate() -> None:
    """The negative control: all sixteen bytes count."""
    one, high, low = bytes(16), bytes(8) + b"\1" * 8, b"\1" * 8 + bytes(8)
    assert count_duplicates(one, high + low).validation_in_train == 0
    assert count_duplicates(one, high + low + one).validation_in_train == 1


# Documents at the edges


def test_empty_documents_are_counted_and_no_duplicates(tmp_path: Path) -> None:
    folder = write_ids(tmp_path / "x", [END, END, 5, 6, END, END], [END, 7, END])
    found = inspect_shards(folder)
    assert [(split.documents, split.empty_documents) for split in found.splits] == [(4, 3), (2, 1)]
    assert found.duplicates.train == found.duplicates.validation_in_train == 0
    assert [problem[:12] for problem in found.problems] == ["3 documents ", "1 documents "]


def test_ids_before_the_first_separator_are_a_document(tmp_path: Path) -> None:
    """As in nanoGPT's files, where end-of-text comes after a document."""
    found = inspect_shards(write_ids(tmp_path / "x", [5, 6, END, 7, 8], [5, 6]))
    assert [split.documents for split in found.splits] == [2, 1]
    assert found.duplicates.validation_in_train == 1
    assert [bucket["documents"] for bucket in found.lengths.histogram] == [3]


def test_manifest_with_other_counts_is_a_problem(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "x", {"train": ["one", "two"], "validation": ["four"]})
    assert inspect_shards(folder).problems == ()
    manifest = read_manifest(folder)
    wrong = dataclasses.replace(manifest.train[0], text_bytes=99, documents=7)
    write_manifest(folder, dataclasses.replace(manifest, train=(wrong,)))
    text_bytes, documents = inspect_shards(folder).problems
    assert "99" in text_bytes
    assert "7 documents" in documents


def test_inspect_refuses_damaged_shards(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "x", random_texts(0))
    path = folder / "train-00001.bin"
    content = bytearray(path.read_bytes())
    content[1500] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"train-00001\.bin was changed"):
        inspect_shards(folder)


# A part, and samples


@pytest.mark.parametrize("documents", [1, 17, 39, 150, 1000])
@pytest.mark.parametrize("shard_tokens", [23, 700])
def test_first_documents_equal_a_folder_of_them(tmp_path: Path, documents: int, shard_tokens: int) -> None:
    texts = random_texts(3)
    first = {split: texts[split][:documents] for split in SPLITS}
    whole = write_texts(tmp_path / "full", texts, shard_tokens)
    found = without_samples(inspect_shards(whole, documents=documents))
    alone = without_samples(inspect_shards(write_texts(tmp_path / "first", first, shard_tokens)))
    for measured in (found, alone):
        for split in measured["splits"]:  # type: ignore[attr-defined]
            split["shards"] = [shard for shard in split["shards"] if shard["tokens"]]
    assert found == {**alone, "first_documents_only": documents}


def test_samples_are_drawn_by_seed(tmp_path: Path) -> None:
    texts = random_texts(4)
    texts["train"][5] = "€" * 500
    folder = write_texts(tmp_path / "x", texts, shard_tokens=61)
    drawn = [inspect_shards(folder, samples=12, seed=seed).samples for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    everything = inspect_shards(folder, samples=1000).samples
    assert len(everything) == 190
    for sample in everything:
        text = texts[sample["split"]][sample["document"] - 1]
        assert sample["text"] == text[:240]
        assert sample["is_shortened"] == (len(text) > 240)
        assert sample["tokens"] == 1 + len(text.encode())
    assert sum(sample["is_shortened"] for sample in everything) == 1
    assert inspect_shards(folder, samples=0).samples == ()


def test_oddities_are_counted_among_spread_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {
        "train": ["A plain sentence.", "bad \ufffd", "42 + 17 = 59"] * 100,
        "validation": ["SHOUTING"] * 30,
    }
    folder = write_texts(tmp_path / "x", texts)
    found = inspect_shards(folder)
    assert found.sampled_documents == 330
    assert {name: count for name, count in found.oddities.items() if count} == {
        "replacement_character": 100,
        "mostly_not_letters": 100,
        "mostly_upper_case": 30,
    }
    monkeypatch.setattr(statistics, "SAMPLED_DOCUMENTS", 110)
    some = inspect_shards(folder)
    assert some.sampled_documents == 110
    assert some.oddities["mostly_upper_case"] == 10  # one in three of every stretch
    assert some.duplicates == found.duplicates


def test_long_documents_are_decoded_up_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "LONGEST_LOOK_TOKENS", 10)
    texts = {"train": ["€€€€" + "\ufffd"], "validation": ["12 bytes \ufffd"]}
    found = inspect_shards(write_texts(tmp_path / "x", texts))
    assert found.oddities["replacement_character"] == 0  # nor one made by cutting a character
    monkeypatch.setattr(statistics, "LONGEST_LOOK_TOKENS", 15)
    assert inspect_shards(tmp_path / "x").oddities["replacement_character"] == 2


def test_inspect_memory_is_bounded(tmp_path: Path) -> None:
    """Three megabytes of shards are looked at in far less memory of Python's than they take."""
    ids = ([END] + [5] * 2999) * 500
    folder = write_ids(tmp_path / "x", ids, [END, 7])
    inspect_shards(folder)  # what is kept from the first time on
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    inspect_shards(folder, samples=0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak - before < 12e6 + 500 * 1000  # a chunk in bincount's int64 is 8.4 MB
