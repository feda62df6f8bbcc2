"""What is in a prepared folder: counts, lengths, duplicates, frequent tokens, odd texts, and a few to read.

One pass over the shards, which are mapped and never loaded. What grows with the data is 16 bytes a
document, by which duplicates are known.
"""

from __future__ import annotations

import codecs
import hashlib
import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from overnight.data.shards import (
    SPLITS,
    Manifest,
    Tokens,
    byte_lengths,
    count_ids,
    load_prepared_tokenizer,
    open_tokens,
    places_of,
    verify,
)
from overnight.inspection.quality import NOT_ENGLISH_LOOKING, ODDITIES, oddities_of
from overnight.preparation.documents import HASHES_AT_ONCE
from overnight.terminal import echo, progress

SAMPLED_DOCUMENTS = 10_000  # whose text is looked at
LONGEST_LOOK_TOKENS = 100_000  # of each of them
FREQUENT_TOKENS = 20
SAMPLE_CHARACTERS = 240


@dataclass(frozen=True, kw_only=True)
class ShardCount:
    """What was found in one shard; a document counts where it begins."""

    name: str
    documents: int
    tokens: int
    text_bytes: int


@dataclass(frozen=True, kw_only=True)
class SplitCount:
    """What was found in one split."""

    split: str
    documents: int
    empty_documents: int
    """Nothing but an end-of-text id."""
    tokens: int
    text_bytes: int
    """UTF-8 bytes that the ids stand for."""
    shards: tuple[ShardCount, ...]


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Documents of at least `shortest` and at most `longest` tokens."""

    shortest: int
    longest: int
    documents: int


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Tokens per document, its end-of-text id included."""

    mean: float
    median: int
    percentile_90: int
    shortest: int
    longest: int
    histogram: tuple[Bucket, ...]
    """By powers of two."""


@dataclass(frozen=True, kw_only=True)
class TokenCount:
    """How often an id occurs, and what it stands for."""

    id: int
    text: str
    r"""Bytes that are no whole character are spelled \xe2."""
    count: int


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The beginning of a document."""

    split: str
    document: int
    """Its place in its split, counted from 1."""
    tokens: int
    text: str
    is_shortened: bool


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """Everything that was found. The order of `samples` is that of the shards."""

    folder: str
    source: str
    licence: str
    tokenizer: str
    vocab_size: int
    first_documents_only: int | None
    """Of each split; None: all."""
    problems: tuple[str, ...]
    """What needs a decision, the gravest first."""
    splits: tuple[SplitCount, ...]
    lengths: Lengths
    duplicates: Duplicates
    ids_used: int
    frequent: tuple[TokenCount, ...]
    sampled_documents: int
    oddities: dict[str, int]
    """Of the sampled documents, how many are so: see `oddities.ODDITIES`."""
    not_english_looking: int
    """Of the sampled documents: letters mostly not Latin, or almost none of English's frequent words."""
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class ShardSpan:
    """The part of a shard that is looked at."""

    shard: str
    ids: Tokens
    starts: NDArray[np.int64]
    """Where documents begin in it."""


@dataclass
class _Survey:
    """What is gathered while the documents go by."""

    token_bytes: list[bytes]
    end_of_text: int
    counts: NDArray[np.int64]
    expected_documents: int
    drawn: frozenset[int]
    """Which documents are to be shown, counted from 0 over both splits."""
    number: int = 0
    sampled: int = 0
    not_english_looking: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    oddities: Counter[str] = field(default_factory=Counter)
    samples: list[Sample] = field(default_factory=list)


def inspect_shards(
    folder: Path, *, documents: int | None = None, samples: int = 3, seed: int = 0
) -> Inspection:
    """Verify a prepared folder and look at all of it, or at the first `documents` of each split.

    Raises ValueError if it does not verify.
    """
    echo(f"verifying {folder}")
    manifest = verify(folder)
    tokenizer = load_prepared_tokenizer(folder)
    expected = sum(_expected(manifest, split, documents) for split in SPLITS)
    drawn = random.Random(seed).sample(range(expected), min(samples, expected))
    survey = _Survey(
        token_bytes=tokenizer.token_bytes(),
        end_of_text=manifest.end_of_text,
        counts=np.zeros(manifest.vocab_size, dtype=np.int64),
        expected_documents=expected,
        drawn=frozenset(drawn),
    )
    splits, digests = [], []
    total = sum(manifest.tokens(split) for split in SPLITS)
    with progress("inspecting", total, "tokens") as advance:
        for split in SPLITS:
            parts = shard_spans(folder, manifest, split, documents)
            count, hashes = _inspect_split(split, parts, survey, advance)
            splits.append(count)
            digests.append(hashes)
    duplicates = count_duplicates(*digests)
    return Inspection(
        folder=str(folder),
        source=manifest.source,
        licence=manifest.licence,
        tokenizer=manifest.tokenizer,
        vocab_size=manifest.vocab_size,
        first_documents_only=documents,
        problems=tuple(_problems(manifest, splits, duplicates, documents)),
        splits=tuple(splits),
        lengths=describe_lengths(survey.lengths),
        duplicates=duplicates,
        ids_used=int(np.count_nonzero(survey.counts)),
        frequent=tuple(_most_frequent(survey.counts, survey.token_bytes, manifest.end_of_text)),
        sampled_documents=survey.sampled,
        oddities={name: survey.oddities[name] for name in ODDITIES},
        not_english_looking=survey.not_english_looking,
        samples=tuple(survey.samples),
    )


def shard_spans(folder: Path, manifest: Manifest, split: str, documents: int | None) -> Iterator[ShardSpan]:
    """The shards of a split, up to the end of its first `documents` if that is given.

    What stands before the first end-of-text id is a document too.
    """
    left = documents
    for number, shard in enumerate(manifest.shards(split)):
        ids = open_tokens(folder / shard.name)
        starts = places_of(manifest.end_of_text, ids)
        if number == 0 and (not starts.size or starts[0] != 0):
            starts = np.concatenate([np.zeros(1, dtype=np.int64), starts])
        if left is not None and starts.size > left:
            yield ShardSpan(shard.name, ids[: starts[left]], starts[:left])
            return
        left = None if left is None else left - starts.size
        yield ShardSpan(shard.name, ids, starts)


def documents_of(parts: Iterable[ShardSpan]) -> Iterator[list[Tokens]]:
    """Each document, its end-of-text id included, as the pieces that lie in different shards."""
    pieces: list[Tokens] = []
    for part in parts:
        edges = part.starts.tolist()
        before = edges[0] if edges else part.ids.size
        if before:
            pieces.append(part.ids[:before])
        for begin, end in itertools.pairwise([*edges, part.ids.size]):
            if pieces:
                yield pieces
            pieces = [part.ids[begin:end]]
    if pieces:
        yield pieces


def describe_lengths(lengths: Counter[int]) -> Lengths:
    """The usual figures of how many documents have which length."""
    documents = lengths.total()
    in_order = sorted(lengths.items())
    powers: Counter[int] = Counter()
    for length, count in in_order:
        powers[length.bit_length() - 1] += count
    return Lengths(
        mean=sum(length * count for length, count in in_order) / documents,
        median=_percentile(in_order, (documents + 1) // 2),
        percentile_90=_percentile(in_order, -(-9 * documents // 10)),
        shortest=in_order[0][0],
        longest=in_order[-1][0],
        histogram=tuple(
            Bucket(shortest=2**power, longest=2 ** (power + 1) - 1, documents=powers[power])
            for power in range(min(powers), max(powers) + 1)
        ),
    )


def _percentile(in_order: Sequence[tuple[int, int]], rank: int) -> int:
    """The length of the `rank`-th shortest document, counted from 1."""
    so_far = 0
    for length, count in in_order:
        so_far += count
        if so_far >= rank:
            return length
    raise AssertionError(rank)


def _inspect_split(
    split: str, parts: Iterable[ShardSpan], survey: _Survey, advance: Callable[..., None]
) -> tuple[SplitCount, bytearray]:
    """The counts of a split and its documents' digests."""
    shards: list[ShardCount] = []
    digests = bytearray()
    lengths = byte_lengths(survey.token_bytes)
    documents = empty = 0

    def counted() -> Iterator[ShardSpan]:
        for part in parts:
            yield part
            counts = count_ids(part.ids, survey.counts.size)
            survey.counts += counts
            shards.append(
                ShardCount(
                    name=part.shard,
                    documents=part.starts.size,
                    tokens=part.ids.size,
                    text_bytes=int(counts @ lengths),
                )
            )
            advance(part.ids.size)

    for pieces in documents_of(counted()):
        documents += 1
        text = _without_separator(pieces, survey.end_of_text)
        tokens = sum([piece.size for piece in pieces])
        digest = hashlib.blake2b(text[0].data, digest_size=16)
        for piece in text[1:]:
            digest.update(piece.data)
        if not any([piece.size for piece in text]):
            empty += 1
            digest.update(f"{split} {documents}".encode())  # equal to no other
        digests += digest.digest()
        _look_at(split, documents, tokens, text, survey)
    count = SplitCount(
        split=split,
        documents=documents,
        empty_documents=empty,
        tokens=sum(shard.tokens for shard in shards),
        text_bytes=sum(shard.text_bytes for shard in shards),
        shards=tuple(shards),
    )
    return count, digests


def _without_separator(pieces: list[Tokens], end_of_text: int) -> list[Tokens]:
    first, *others = pieces
    return [first[1:] if first[0] == end_of_text else first, *others]


def _look_at(split: str, document: int, tokens: int, text: list[Tokens], survey: _Survey) -> None:
    """Note the document's length; read it, if it is one of those spread evenly, or drawn to be shown."""
    number, expected = survey.number, max(1, survey.expected_documents)
    survey.number += 1
    survey.lengths[tokens] += 1
    if number * SAMPLED_DOCUMENTS // expected != (number - 1) * SAMPLED_DOCUMENTS // expected:
        survey.sampled += 1
        found = oddities_of(_read(text, survey.token_bytes, LONGEST_LOOK_TOKENS))
        survey.oddities.update(found)
        survey.not_english_looking += bool(found & NOT_ENGLISH_LOOKING)
    if number in survey.drawn:
        beginning = _read(
            text, survey.token_bytes, 4 * SAMPLE_CHARACTERS + 4
        )  # a character is 4 bytes at most
        survey.samples.append(
            Sample(
                split=split,
                document=document,
                tokens=tokens,
                text=beginning[:SAMPLE_CHARACTERS],
                is_shortened=len(beginning) > SAMPLE_CHARACTERS,
            )
        )


def _read(text: list[Tokens], token_bytes: list[bytes], most: int) -> str:
    """What the first `most` ids decode to; a character that is cut off there is left out."""
    ids = np.concatenate([piece[:most] for piece in text])
    is_whole = ids.size == sum(piece.size for piece in text) and ids.size <= most
    content = b"".join(map(token_bytes.__getitem__, ids[:most].tolist()))
    return codecs.getincrementaldecoder("utf-8")("replace").decode(content, final=is_whole)


def _most_frequent(
    counts: NDArray[np.int64], token_bytes: list[bytes], end_of_text: int
) -> Iterator[TokenCount]:
    """The ids that occur most, end-of-text left out."""
    order = np.argsort(-counts, kind="stable")[: FREQUENT_TOKENS + 1]
    found = [int(id) for id in order if id != end_of_text and counts[id]]
    for id in found[:FREQUENT_TOKENS]:
        yield TokenCount(id=id, text=token_bytes[id].decode(errors="backslashreplace"), count=int(counts[id]))


def _expected(manifest: Manifest, split: str, documents: int | None) -> int:
    """How many documents of a split will be seen, as its manifest counts them."""
    held = sum(shard.documents for shard in manifest.shards(split))
    return held if documents is None else min(held, documents)


def _problems(
    manifest: Manifest, splits: Sequence[SplitCount], duplicates: Duplicates, limit: int | None
) -> Iterator[str]:
    """What a person must know before training on this, the gravest first."""
    train, validation = splits
    if duplicates.validation_in_train:
        assert duplicates.first_in_both is not None
        share = duplicates.validation_in_train / validation.documents
        yield (
            f"{duplicates.validation_in_train:,} of {validation.documents:,} validation documents "
            f"({share:.2%}) are also in training, the first of them number {duplicates.first_in_both + 1:,}: "
            "a validation loss on them measures memory"
        )
    for split, again in ((train, duplicates.train), (validation, duplicates.validation)):
        if again:
            share = again / split.documents
            counts = f"{again:,} of {split.documents:,}"
            yield f"{counts} {split.split} documents ({share:.2%}) repeat an earlier one"
        if split.empty_documents:
            yield f"{split.empty_documents:,} documents of {split.split} are empty"
        said = sum(shard.documents for shard in manifest.shards(split.split))
        if limit is None and manifest.text_bytes(split.split) != split.text_bytes:
            yield (
                f"{split.split} has {manifest.text_bytes(split.split):,} bytes of text by its manifest, and "
                f"its ids decode to {split.text_bytes:,}"
            )
        if limit is None and said not in {split.documents, split.documents - 1}:
            yield f"{split.split} has {said:,} documents by its manifest, and {split.documents:,} by its ids"


# ---------------------------------------------------------------- documents that are equal to one another, within a split and across both, by 16 bytes each


HALVES = np.dtype([("high", "<u8"), ("low", "<u8")])


@dataclass(frozen=True, kw_only=True)
class Duplicates:
    """How many documents are equal to another one."""

    train: int
    """Training documents that are equal to an earlier training document."""
    validation: int
    """Validation documents that are equal to an earlier validation document."""
    validation_in_train: int
    """Validation documents that are equal to a training document."""
    first_in_both: int | None
    """The first validation document of that kind, counted from 0."""


def count_duplicates(train: bytes | bytearray, validation: bytes | bytearray) -> Duplicates:
    """Count equal digests; each split is its documents' 16-byte digests, end to end.

    Memory holds what sorting the digests of one range takes, so any number will do.
    """
    splits = [np.frombuffer(digests, dtype=HALVES) for digests in (train, validation)]
    ranges = -(-max(1, sum(map(len, splits))) // HASHES_AT_ONCE)
    repeated = np.zeros(2, dtype=np.int64)
    in_both: list[NDArray[np.int64]] = []
    for number in range(ranges):
        places = [np.flatnonzero(split["high"] % ranges == number) for split in splits]
        again, shared = _compare([split[place] for split, place in zip(splits, places, strict=True)])
        repeated += again
        in_both.append(places[1][shared])
    shared_places = np.concatenate(in_both)
    return Duplicates(
        train=int(repeated[0]),
        validation=int(repeated[1]),
        validation_in_train=shared_places.size,
        first_in_both=int(shared_places.min()) if shared_places.size else None,
    )


def _compare(splits: Sequence[NDArray[np.void]]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """(2,) how many are there again in each split; which of validation are also in training."""
    digests = np.concatenate(splits)
    order = np.lexsort((digests["low"], digests["high"]))
    ordered = digests[order]
    group = np.zeros(len(digests), dtype=np.int64)
    group[order[1:]] = np.cumsum(ordered[1:] != ordered[:-1])
    trained, validated = group[: len(splits[0])], group[len(splits[0]) :]
    groups = int(group.max()) + 1 if group.size else 0
    counts = [np.bincount(each, minlength=groups) for each in (trained, validated)]
    again = np.array([np.maximum(count - 1, 0).sum() for count in counts], dtype=np.int64)
    return again, counts[0][validated] > 0
