from __future__ import annotations

import dataclasses
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from overnight.data.shards import SPLITS, ShardWriter, TokenFile, hash_tokens, read_manifest, write_manifest
from overnight.inspection import statistics
from overnight.inspection.statistics import Inspection, count_duplicates, describe_lengths, inspect_shards
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
    folder.mkdir()
    shards = {}
    for split in SPLITS:
        writer = ShardWriter(folder, split, TOKENIZER.vocab_size, shard_tokens)
        for text in texts[split]:
            writer.add(np.array([END, *TOKENIZER.encode(text)], dtype=np.uint32), len(text.encode()))
        shards[split] = writer.finish()
    return finish(folder, shards)


def finish(folder: Path, shards: dict[str, tuple]) -> Path:  # type: ignore[type-arg]
    from overnight.data.shards import Manifest

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
        documents=sum(shard.documents for each in shards.values() for shard in each),
        duplicate_documents=0,
        empty_documents=0,
        skipped_documents=0,
        repaired_documents=0,
        train=shards["train"],
        validation=shards["validation"],
    )
    TOKENIZER.save(folder / "tokenizer")
    write_manifest(folder, manifest)
    return folder


def write_ids(folder: Path, train: list[int], validation: list[int]) -> Path:
    """A prepared folder of any ids, one shard a split, documents as its end-of-text ids say."""
    from overnight.data.shards import Shard

    folder.mkdir()
    shards = {}
    for split, ids in (("train", train), ("validation", validation)):
        file = TokenFile(folder / f"{split}-00000.bin", TOKENIZER.vocab_size)
        file.append(np.array(ids, dtype=np.uint32))
        digest = file.close()
        shards[split] = (
            Shard(
                name=file.path.name,
                tokens=len(ids),
                documents=max(1, ids.count(END)),
                text_bytes=len(ids) - ids.count(END),
                sha256=digest,
            ),
        )
    return finish(folder, shards)


def without_samples(found: Inspection) -> dict[str, object]:
    return {**dataclasses.asdict(found), "folder": "", "samples": ()}


@pytest.fixture
def found(tmp_path: Path) -> Inspection:
    return inspect_shards(write_texts(tmp_path / "made-up", random_texts(0)))


# ---------------------------------------------------------------- counts


def test_counts_are_those_of_the_texts(found: Inspection) -> None:
    texts = random_texts(0)
    for split in found.splits:
        written = texts[split.split]
        assert split.documents == len(written)
        assert split.text_bytes == sum(len(text.encode()) for text in written)
        assert split.tokens == split.text_bytes + len(written)
        assert len(split.shards) == -(-split.tokens // 700)
        for name in ("documents", "tokens", "text_bytes"):
            assert sum(getattr(shard, name) for shard in split.shards) == getattr(split, name)
    assert [shard.tokens for shard in found.splits[0].shards][:-1] == [700] * (
        len(found.splits[0].shards) - 1
    )


def test_lengths_are_those_of_the_texts(found: Inspection) -> None:
    lengths = np.array([1 + len(text.encode()) for each in random_texts(0).values() for text in each])
    told = found.lengths
    assert told.mean == pytest.approx(lengths.mean())
    assert told.median == np.quantile(lengths, 0.5, method="inverted_cdf")
    assert told.percentile_90 == np.quantile(lengths, 0.9, method="inverted_cdf")
    assert (told.shortest, told.longest) == (lengths.min(), lengths.max())
    edges = [bucket.shortest for bucket in told.histogram] + [told.histogram[-1].longest + 1]
    first = edges[0].bit_length() - 1
    assert edges == [2 ** (first + number) for number in range(len(edges))]
    assert [bucket.longest + 1 for bucket in told.histogram] == edges[1:]
    assert [bucket.documents for bucket in told.histogram] == np.histogram(lengths, edges)[0].tolist()


def test_tokens_are_counted_as_numpy_counts_them(found: Inspection, tmp_path: Path) -> None:
    contents = [path.read_bytes()[1024:] for path in sorted((tmp_path / "made-up").glob("*.bin"))]
    values, counts = np.unique(np.frombuffer(b"".join(contents), dtype="<u2"), return_counts=True)
    expected = Counter(dict(zip(values.tolist(), counts.tolist(), strict=True)))
    assert found.ids_used == len(expected)
    del expected[END]
    assert {one.id: one.count for one in found.frequent} == expected  # fewer than 20 occur
    assert [one.count for one in found.frequent] == sorted(expected.values(), reverse=True)
    spelled = {one.text for one in found.frequent}
    assert {"a", "\n", r"\xe2", r"\x82"} <= spelled


# ---------------------------------------------------------------- duplicates


def naive_duplicates(texts: Texts) -> tuple[int, int, int, int | None]:
    train, validation = texts["train"], texts["validation"]
    shared = [number for number, text in enumerate(validation) if text in train]
    return (
        sum(text in train[:number] for number, text in enumerate(train)),
        sum(text in validation[:number] for number, text in enumerate(validation)),
        len(shared),
        shared[0] if shared else None,
    )


@pytest.mark.parametrize("shard_tokens", [700, 23])
def test_equal_documents_are_found_within_and_across_the_splits(tmp_path: Path, shard_tokens: int) -> None:
    """Also those that lie across the end of a shard."""
    texts = random_texts(1)
    found = inspect_shards(write_texts(tmp_path / "made-up", texts, shard_tokens))
    expected = naive_duplicates(texts)
    assert dataclasses.astuple(found.duplicates) == expected
    assert min(expected[:3]) > 0
    first, *others = found.problems
    assert first.startswith(f"{expected[2]:,} of 40 validation documents ")
    assert "are also in training, the first of them number" in first
    assert any("train documents" in line and "repeat an earlier one" in line for line in others)


def test_shards_of_one_length_or_another_tell_the_same(tmp_path: Path) -> None:
    told = []
    for shard_tokens in (700, 23, 10_000):
        folder = write_texts(tmp_path / str(shard_tokens), random_texts(2), shard_tokens)
        found = without_samples(inspect_shards(folder))
        told.append({name: found[name] for name in ("lengths", "duplicates", "frequent", "oddities")})
    assert told[0] == told[1] == told[2]


@given(
    train=st.lists(st.integers(0, 12), max_size=40),
    validation=st.lists(st.integers(0, 12), max_size=20),
    at_once=st.integers(1, 30),
)
def test_digests_are_compared_as_one_would_by_hand(
    train: list[int], validation: list[int], at_once: int
) -> None:
    digests = [b"".join(bytes([n, 7 * n % 13]) * 8 for n in split) for split in (train, validation)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "HASHES_AT_ONCE", at_once)
        told = count_duplicates(*digests)
    texts = {"train": list(map(str, train)), "validation": list(map(str, validation))}
    assert dataclasses.astuple(told) == naive_duplicates(texts)


def test_half_a_digest_is_not_enough() -> None:
    """The negative control: all sixteen bytes count."""
    one, high, low = bytes(16), bytes(8) + b"\1" * 8, b"\1" * 8 + bytes(8)
    assert count_duplicates(one, high + low).validation_in_train == 0
    assert count_duplicates(one, high + low + one).validation_in_train == 1


def test_sound_shards_have_no_problems(tmp_path: Path) -> None:
    texts = {"train": ["one", "two", "three"], "validation": ["four"]}
    assert inspect_shards(write_texts(tmp_path / "sound", texts)).problems == ()


# ---------------------------------------------------------------- documents at the edges


def test_empty_documents_are_told_and_are_no_duplicates(tmp_path: Path) -> None:
    folder = write_ids(tmp_path / "x", [END, END, 5, 6, END, END], [END, 7, END])
    found = inspect_shards(folder)
    assert [(split.documents, split.empty_documents) for split in found.splits] == [(4, 3), (2, 1)]
    assert found.duplicates.train == found.duplicates.validation_in_train == 0
    assert found.problems == ("3 documents of train are empty", "1 documents of validation are empty")


def test_what_stands_before_the_first_separator_is_a_document(tmp_path: Path) -> None:
    """As in nanoGPT's files, where end-of-text comes after a document."""
    found = inspect_shards(write_ids(tmp_path / "x", [5, 6, END, 7, 8], [5, 6]))
    assert [split.documents for split in found.splits] == [2, 1]
    assert found.duplicates.validation_in_train == 1
    assert Counter(length.documents for length in found.lengths.histogram) == {3: 1}


def test_a_manifest_that_counts_otherwise_is_told(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "x", {"train": ["one", "two"], "validation": ["four"]})
    manifest = read_manifest(folder)
    wrong = dataclasses.replace(manifest.train[0], text_bytes=99, documents=7)
    write_manifest(folder, dataclasses.replace(manifest, train=(wrong,)))
    assert inspect_shards(folder).problems == (
        "train has 99 bytes of text by its manifest, and its ids decode to 6",
        "train has 7 documents by its manifest, and 2 by its ids",
    )


def test_what_does_not_verify_is_refused(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "x", random_texts(0))
    path = folder / "train-00001.bin"
    content = bytearray(path.read_bytes())
    content[1500] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"train-00001\.bin was changed since it was written"):
        inspect_shards(folder)


# ---------------------------------------------------------------- a part, and samples


@pytest.mark.parametrize("documents", [1, 17, 39, 150, 1000])
@pytest.mark.parametrize("shard_tokens", [23, 700])
def test_the_first_documents_alone_are_as_a_folder_of_them(
    tmp_path: Path, documents: int, shard_tokens: int
) -> None:
    texts = random_texts(3)
    first = {split: texts[split][:documents] for split in SPLITS}
    whole = write_texts(tmp_path / "full", texts, shard_tokens)
    found = without_samples(inspect_shards(whole, documents=documents))
    alone = without_samples(inspect_shards(write_texts(tmp_path / "first", first, shard_tokens)))
    for told in (found, alone):
        for split in told["splits"]:  # type: ignore[attr-defined]
            split["shards"] = [shard for shard in split["shards"] if shard["tokens"]]
    assert found == {**alone, "first_documents_only": documents}


def test_samples_are_drawn_by_the_seed_and_are_the_texts(tmp_path: Path) -> None:
    texts = random_texts(4)
    texts["train"][5] = "€" * 500
    folder = write_texts(tmp_path / "x", texts, shard_tokens=61)
    drawn = [inspect_shards(folder, samples=12, seed=seed).samples for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    everything = inspect_shards(folder, samples=1000).samples
    assert len(everything) == 190
    for sample in everything:
        text = texts[sample.split][sample.document - 1]
        assert sample.text == text[:240]
        assert sample.is_shortened == (len(text) > 240)
        assert sample.tokens == 1 + len(text.encode())
    assert sum(sample.is_shortened for sample in everything) == 1
    assert inspect_shards(folder, samples=0).samples == ()


def test_odd_documents_are_counted_among_those_spread_evenly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_very_long_documents_are_read_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "LONGEST_LOOK_TOKENS", 10)
    texts = {"train": ["€€€€" + "\ufffd"], "validation": ["12 bytes \ufffd"]}
    found = inspect_shards(write_texts(tmp_path / "x", texts))
    assert found.oddities["replacement_character"] == 0  # nor one made by cutting a character
    monkeypatch.setattr(statistics, "LONGEST_LOOK_TOKENS", 15)
    assert inspect_shards(tmp_path / "x").oddities["replacement_character"] == 2


def test_percentiles_of_a_single_document() -> None:
    told = describe_lengths(Counter({1: 1}))
    assert (told.median, told.percentile_90, told.mean) == (1, 1, 1.0)
    assert dataclasses.astuple(told.histogram[0]) == (1, 1, 1)


def test_ids_are_mapped_and_hashes_are_all_that_grows(tmp_path: Path) -> None:
    """Three megabytes of shards are looked at in far less memory of Python's than they take."""
    import tracemalloc

    ids = ([END] + [5] * 2999) * 500
    folder = write_ids(tmp_path / "x", ids, [END, 7])
    assert hash_tokens(folder / "train-00000.bin").highest_id == END
    inspect_shards(folder)  # what is kept from the first time on
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    inspect_shards(folder, samples=0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak - before < 12e6 + 500 * 1000  # a chunk in bincount's int64 is 8.4 MB
