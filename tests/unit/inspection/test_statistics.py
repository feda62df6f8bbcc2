from __future__ import annotations

import dataclasses
import itertools
import random
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from overnight.data.shards import SPLITS, read_manifest, write_manifest
from overnight.inspection import statistics
from overnight.inspection.statistics import Duplicates, count_duplicates, inspect_shards
from overnight.tokenizer.bpe import BytePair

END = 256
TOKENIZER = BytePair([])  # ids 0 to 255 are bytes in the order of their spelling, 256 is end-of-text


def random_texts(seed):
    """Some hundred short texts, many of them equal, within and across the splits."""
    draw = random.Random(seed)
    pool = ["".join(draw.choices("abcdefgh \né€", k=draw.randint(1, 60))) for _ in range(120)]
    return {"train": draw.choices(pool[:100], k=150), "validation": draw.choices(pool[60:], k=40)}


def ids_of(texts):
    return [id for text in texts for id in (END, *TOKENIZER.encode(text))]


@pytest.fixture
def write_ids(tmp_path, prepared_documents):
    """`write_ids(train, validation)`: a prepared folder of ids, in which end-of-text begins a document."""
    folders = (tmp_path / f"made-up-{number}" for number in itertools.count())
    names = {"tokenizer": TOKENIZER.name, "tokenizer_fingerprint": TOKENIZER.fingerprint}

    def write(train, validation, shard_tokens=700):
        folder = next(folders)
        documents = {}
        for split, ids in zip(SPLITS, map(np.array, (train, validation)), strict=True):
            pieces = np.split(ids, np.flatnonzero(ids == END))
            documents[split] = [(each, np.count_nonzero(each != END)) for each in pieces if each.size]
        layout = {"vocab_size": END + 1, "end_of_text": END}
        prepared_documents(folder, documents, shard_tokens, **names, **layout)
        TOKENIZER.save(folder / "tokenizer")
        return folder

    return write


@pytest.fixture
def write_texts(write_ids):
    """`write_texts(train, validation)`: a prepared folder of texts, as `overnight prepare` would write it."""
    return lambda train, validation, shard_tokens=700: write_ids(
        ids_of(train), ids_of(validation), shard_tokens
    )


@pytest.fixture(params=[700, 23])
def found(write_texts, request):
    """What is found in shards of that many tokens; in the short ones, documents span several."""
    return inspect_shards(write_texts(**random_texts(0), shard_tokens=request.param))


def test_counts_and_lengths_equal_those_of_the_texts(found):
    texts = random_texts(0)
    for split in found.splits:
        written = texts[split.split]
        text_bytes = sum(len(text.encode()) for text in written)
        counts = {"documents": len(written), "tokens": text_bytes + len(written), "text_bytes": text_bytes}
        assert {name: getattr(split, name) for name in counts} == counts
        assert {name: sum(shard[name] for shard in split.shards) for name in counts} == counts
    assert {shard["tokens"] for shard in found.splits[0].shards[:-1]} <= {700, 23}
    lengths = np.array([1 + len(text.encode()) for each in texts.values() for text in each])
    powers = range(int(lengths.min()).bit_length() - 1, int(lengths.max()).bit_length())
    assert dataclasses.asdict(found.lengths) == {
        "mean": pytest.approx(lengths.mean()),
        "median": np.quantile(lengths, 0.5, method="inverted_cdf"),
        "percentile_90": np.quantile(lengths, 0.9, method="inverted_cdf"),
        "shortest": lengths.min(),
        "longest": lengths.max(),
        "histogram": tuple(
            {
                "shortest": 2**power,
                "longest": 2 ** (power + 1) - 1,
                "documents": np.count_nonzero((lengths >= 2**power) & (lengths < 2 ** (power + 1))),
            }
            for power in powers
        ),
    }


def test_frequent_tokens_equal_a_count_of_them(found):
    expected = Counter(id for texts in random_texts(0).values() for id in ids_of(texts))
    assert found.ids_used == len(expected)
    del expected[END]
    assert {token["id"]: token["count"] for token in found.frequent} == expected  # fewer than 20 occur
    assert [token["count"] for token in found.frequent] == sorted(expected.values(), reverse=True)
    assert {"a", "\n", r"\xe2", r"\x82"} <= {token["text"] for token in found.frequent}


# Duplicates


def naive_duplicates(train, validation):
    shared = [number for number, text in enumerate(validation) if text in train]
    return Duplicates(
        train=sum(text in train[:number] for number, text in enumerate(train)),
        validation=sum(text in validation[:number] for number, text in enumerate(validation)),
        validation_in_train=len(shared),
        first_in_both=shared[0] if shared else None,
    )


def test_duplicates_equal_naive_twin(found):
    expected = naive_duplicates(**random_texts(0))
    assert found.duplicates == expected
    leak, repeated, _ = found.problems
    assert leak.startswith(f"{expected.validation_in_train:,} of 40 validation documents ")
    assert repeated.startswith(f"{expected.train:,} of 150 train documents ")


@given(
    train=st.lists(st.integers(0, 12), max_size=40),
    validation=st.lists(st.integers(0, 12), max_size=20),
    at_once=st.integers(1, 30),
)
def test_digest_ranges_equal_naive_twin(train, validation, at_once):
    digests = [b"".join(bytes([n, 7 * n % 13]) * 8 for n in split) for split in (train, validation)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "DIGESTS_AT_ONCE", at_once)
        assert count_duplicates(*digests) == naive_duplicates(train, validation)


def test_half_a_digest_is_no_duplicate():
    """The negative control: all sixteen bytes count."""
    one, high, low = bytes(16), bytes(8) + b"\1" * 8, b"\1" * 8 + bytes(8)
    assert count_duplicates(one, high + low).validation_in_train == 0
    assert count_duplicates(one, high + low + one).validation_in_train == 1


# Documents at the edges


def test_empty_documents_are_counted_and_no_duplicates(write_ids):
    found = inspect_shards(write_ids([END, END, 5, 6, END, END], [END, 7, END]))
    assert [(split.documents, split.empty_documents) for split in found.splits] == [(4, 3), (2, 1)]
    assert found.duplicates.train == found.duplicates.validation_in_train == 0
    assert [problem[:12] for problem in found.problems] == ["3 documents ", "1 documents "]


def test_ids_before_the_first_separator_are_a_document(write_ids):
    """As in nanoGPT's files, where end-of-text comes after a document."""
    found = inspect_shards(write_ids([5, 6, END, 7, 8], [5, 6]))
    assert [split.documents for split in found.splits] == [2, 1]
    assert found.duplicates.validation_in_train == 1
    assert [bucket["documents"] for bucket in found.lengths.histogram] == [3]


def test_shards_that_contradict_their_manifest_are_a_problem(write_texts):
    folder = write_texts(["one", "two"], ["four"])
    assert inspect_shards(folder).problems == ()
    manifest = read_manifest(folder)
    wrong = dataclasses.replace(manifest.train[0], text_bytes=99, documents=7)
    write_manifest(folder, dataclasses.replace(manifest, train=(wrong,)))
    text_bytes, documents = inspect_shards(folder).problems
    assert "99" in text_bytes
    assert "7 documents" in documents
    path = folder / "train-00000.bin"
    path.write_bytes(path.read_bytes()[:-2] + bytes(2))
    with pytest.raises(ValueError, match=r"train-00000\.bin was changed"):
        inspect_shards(folder)


# A part, and samples


@pytest.mark.parametrize("documents", [1, 17, 150])
@pytest.mark.parametrize("shard_tokens", [23, 700])
def test_first_documents_equal_a_folder_of_them(write_texts, documents, shard_tokens):
    texts = random_texts(3)
    part = inspect_shards(write_texts(**texts, shard_tokens=shard_tokens), documents=documents)
    first = (texts[split][:documents] for split in SPLITS)
    alone = inspect_shards(write_texts(*first, shard_tokens=shard_tokens))
    assert part.first_documents_only == documents

    def comparable(found):
        splits = [
            dataclasses.replace(split, shards=tuple(each for each in split.shards if each["tokens"]))
            for split in found.splits
        ]
        changes = {"folder": "", "samples": (), "first_documents_only": None, "splits": splits}
        return dataclasses.replace(found, **changes)

    assert comparable(part) == comparable(alone)


def test_samples_are_drawn_by_seed(write_texts):
    texts = random_texts(4)
    texts["train"][5] = "€" * 500
    folder = write_texts(**texts, shard_tokens=61)
    drawn = [inspect_shards(folder, samples=12, seed=seed).samples for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert inspect_shards(folder, samples=0).samples == ()
    assert inspect_shards(folder, samples=1000).samples == tuple(
        {
            **{"split": split, "document": number, "tokens": 1 + len(text.encode())},
            **{"text": text[:240], "is_shortened": len(text) > 240},
        }
        for split in SPLITS
        for number, text in enumerate(texts[split], start=1)
    )


def test_oddities_are_counted_among_spread_documents(write_texts, monkeypatch):
    folder = write_texts(["A plain sentence.", "bad \ufffd", "42 + 17 = 59"] * 100, ["SHOUTING"] * 30)
    found = inspect_shards(folder)
    assert found.sampled_documents == 330
    expected = {"replacement_character": 100, "mostly_not_letters": 100, "mostly_upper_case": 30}
    assert {name: count for name, count in found.oddities.items() if count} == expected
    monkeypatch.setattr(statistics, "SAMPLED_DOCUMENTS", 110)
    some = inspect_shards(folder)
    assert some.sampled_documents == 110
    assert some.oddities["mostly_upper_case"] == 10  # one in three of every stretch
    assert some.duplicates == found.duplicates


def test_long_documents_are_decoded_up_to_a_limit(write_texts, monkeypatch):
    folder = write_texts(["€€€€" + "\ufffd"], ["12 bytes \ufffd"])
    for limit, count in ((10, 0), (15, 2)):  # none is made by cutting a character
        monkeypatch.setattr(statistics, "LONGEST_LOOK_TOKENS", limit)
        assert inspect_shards(folder).oddities["replacement_character"] == count


def test_inspect_memory_is_bounded(write_ids):
    """Three megabytes of shards are looked at in far less memory of Python's than they take."""
    folder = write_ids(([END] + [5] * 2999) * 500, [END, 7], 10**9)
    inspect_shards(folder)  # what is kept from the first time on
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    inspect_shards(folder, samples=0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak - before < 12e6 + 500 * 1000  # a chunk in bincount's int64 is 8.4 MB
