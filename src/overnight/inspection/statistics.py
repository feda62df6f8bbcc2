"""Statistics of a prepared folder: counts, lengths, duplicates, frequent tokens, quality, and a few samples.

One pass over memory-mapped shards. With the data grow only the documents' digests and lengths, 24 bytes each.
"""

from __future__ import annotations

import codecs
import random
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from overnight.data.shards import (
    SPLITS,
    Manifest,
    Tokens,
    byte_lengths,
    count_ids,
    load_prepared_tokenizer,
    verify,
)
from overnight.data.token_reader import (
    DOCUMENT_HASH_BYTES,
    ShardSpan,
    content_of,
    documents_of,
    hash_document,
    shard_spans,
)
from overnight.inspection.quality import NOT_ENGLISH_LOOKING, ODDITIES, oddities_of
from overnight.terminal import echo, progress

SAMPLED_DOCUMENTS = 10_000  # whose text is decoded
LONGEST_LOOK_TOKENS = 100_000  # of each of them
FREQUENT_TOKENS = 20
SAMPLE_CHARACTERS = 240
DIGESTS_AT_ONCE = 16_000_000  # compared at a time: about a gigabyte while they are sorted

Row = dict[str, Any]  # of a table in the JSON output


@dataclass(frozen=True, kw_only=True)
class SplitCount:
    """The counts of one split. A document counts in the shard where it begins."""

    split: str
    documents: int
    empty_documents: int
    """Nothing but an end-of-text id."""
    tokens: int
    text_bytes: int
    """UTF-8 bytes that the ids stand for."""
    shards: tuple[Row, ...]
    """name, documents, tokens, text_bytes."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Tokens per document, its end-of-text id included."""

    mean: float
    median: int
    percentile_90: int
    shortest: int
    longest: int
    histogram: tuple[Row, ...]
    """One row for each power of two: shortest, longest, documents."""


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


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """All results of an inspection."""

    folder: str
    source: str
    licence: str
    files_read: dict[str, list[int]]
    """Kind of file -> [number, bytes]."""
    files_left_alone: dict[str, list[int]]
    tokenizer: str
    vocab_size: int
    first_documents_only: int | None
    """Number of inspected documents of each split; None if all."""
    problems: tuple[str, ...]
    """Problems to solve before training, the most serious first."""
    splits: tuple[SplitCount, ...]
    lengths: Lengths
    duplicates: Duplicates
    ids_used: int
    frequent: tuple[Row, ...]
    r"""id, text, count of the most frequent tokens; bytes of incomplete characters are spelled \xe2."""
    sampled_documents: int
    oddities: dict[str, int]
    """Number of sampled documents with each of `quality.ODDITIES`."""
    not_english_looking: int
    """Sampled documents whose letters are mostly not Latin, or with almost no frequent English words."""
    samples: tuple[Row, ...]
    """split, document (counted from 1), tokens, text, is_shortened; in the order of the shards."""


def inspect_shards(
    folder: Path, *, documents: int | None = None, samples: int = 3, seed: int = 0
) -> Inspection:
    """Verify a prepared folder and inspect all of it, or the first `documents` of each split.

    Raises ValueError if it does not verify.
    """
    echo(f"verifying {folder}")
    manifest = verify(folder)
    held = [sum(shard.documents for shard in manifest.shards(split)) for split in SPLITS]
    expected = sum(held if documents is None else [min(each, documents) for each in held])
    drawn = random.Random(seed).sample(range(expected), min(samples, expected))
    token_bytes = load_prepared_tokenizer(folder, manifest).token_bytes()
    survey = _Survey(manifest, token_bytes, max(1, expected), frozenset(drawn))
    with progress("inspecting", sum(map(manifest.tokens, SPLITS)), "tokens") as advance:
        splits = [
            survey.read_split(split, shard_spans(folder, manifest, split, documents), advance)
            for split in SPLITS
        ]
    duplicates = count_duplicates(*survey.digests)
    return Inspection(
        folder=str(folder),
        source=manifest.source,
        licence=manifest.licence,
        files_read=manifest.files_read,
        files_left_alone=manifest.files_left_alone,
        tokenizer=manifest.tokenizer,
        vocab_size=manifest.vocab_size,
        first_documents_only=documents,
        problems=tuple(_problems(manifest, splits, duplicates, is_whole=documents is None)),
        splits=tuple(splits),
        lengths=describe_lengths(np.frombuffer(survey.lengths, np.int64)),
        duplicates=duplicates,
        ids_used=int(np.count_nonzero(survey.counts)),
        frequent=tuple(survey.most_frequent()),
        sampled_documents=survey.sampled,
        oddities={name: survey.oddities[name] for name in ODDITIES},
        not_english_looking=survey.not_english_looking,
        samples=tuple(survey.samples),
    )


class _Survey:
    """Reads the documents of both splits in order and collects what is found."""

    def __init__(
        self, manifest: Manifest, token_bytes: list[bytes], expected: int, drawn: frozenset[int]
    ) -> None:
        self.counts = np.zeros(manifest.vocab_size, dtype=np.int64)
        self.digests: list[bytearray] = []
        self.lengths = array("q")
        self.sampled = self.not_english_looking = 0
        self.oddities: Counter[str] = Counter()
        self.samples: list[Row] = []
        self._end_of_text, self._token_bytes = manifest.end_of_text, token_bytes
        self._byte_lengths = byte_lengths(token_bytes)
        self._expected, self._drawn = expected, drawn

    def read_split(self, split: str, parts: Iterable[ShardSpan], advance: Callable[..., None]) -> SplitCount:
        """The counts of a split. Its documents' digests are appended to `digests`."""
        shards: list[Row] = []
        digests = bytearray()
        documents = empty = 0
        for documents, pieces in enumerate(documents_of(self._counted(parts, shards, advance)), start=1):
            text = content_of(pieces, self._end_of_text)
            digest = hash_document(text)
            if not any(piece.size for piece in text):
                empty += 1
                digest.update(f"{split} {documents}".encode())  # empty documents are not duplicates
            digests += digest.digest()
            self.lengths.append(sum([piece.size for piece in pieces]))
            self._look_at(split, documents, text)
        self.digests.append(digests)
        totals = {name: sum(shard[name] for shard in shards) for name in ("tokens", "text_bytes")}
        return SplitCount(
            split=split, documents=documents, empty_documents=empty, shards=tuple(shards), **totals
        )

    def most_frequent(self) -> Iterator[Row]:
        """The ids that occur most, without end-of-text."""
        order = np.argsort(-self.counts, kind="stable")[: FREQUENT_TOKENS + 1].tolist()
        for id in [id for id in order if id != self._end_of_text and self.counts[id]][:FREQUENT_TOKENS]:
            text = self._token_bytes[id].decode(errors="backslashreplace")
            yield {"id": id, "text": text, "count": int(self.counts[id])}

    def _counted(
        self, parts: Iterable[ShardSpan], shards: list[Row], advance: Callable[..., None]
    ) -> Iterator[ShardSpan]:
        """Yields `parts` and adds a row to `shards` for each."""
        for part in parts:
            yield part
            counts = count_ids(part.ids, self.counts.size)
            self.counts += counts
            sizes = {"documents": part.starts.size, "tokens": part.ids.size}
            text_bytes = int(counts @ self._byte_lengths)
            shards.append({"name": part.shard, **sizes, "text_bytes": text_bytes})
            advance(part.ids.size)

    def _look_at(self, split: str, document: int, text: list[Tokens]) -> None:
        """Decode the latest document if it is one of those spread evenly, or drawn as a sample."""
        number = len(self.lengths) - 1
        # True for SAMPLED_DOCUMENTS of the expected ones, at equal distances.
        if number * SAMPLED_DOCUMENTS // self._expected != (number - 1) * SAMPLED_DOCUMENTS // self._expected:
            self.sampled += 1
            found = oddities_of(self._decode(text, LONGEST_LOOK_TOKENS))
            self.oddities.update(found)
            self.not_english_looking += bool(found & NOT_ENGLISH_LOOKING)
        if number in self._drawn:
            beginning = self._decode(text, 4 * SAMPLE_CHARACTERS + 4)  # a character has at most 4 bytes
            row = {"split": split, "document": document, "tokens": self.lengths[-1]}
            is_shortened = len(beginning) > SAMPLE_CHARACTERS
            self.samples.append({**row, "text": beginning[:SAMPLE_CHARACTERS], "is_shortened": is_shortened})

    def _decode(self, text: list[Tokens], most: int) -> str:
        """The text of the first `most` ids, without a character that is cut off there."""
        ids = np.concatenate([piece[:most] for piece in text])
        is_whole = ids.size == sum(piece.size for piece in text) and ids.size <= most
        content = b"".join(map(self._token_bytes.__getitem__, ids[:most].tolist()))
        return codecs.getincrementaldecoder("utf-8")("replace").decode(content, final=is_whole)


def describe_lengths(lengths: NDArray[np.int64]) -> Lengths:
    """The statistics of all documents' lengths."""
    median, percentile_90 = map(int, np.quantile(lengths, (0.5, 0.9), method="inverted_cdf"))
    powers = np.frexp(lengths)[1] - 1  # of two
    return Lengths(
        mean=float(lengths.mean()),
        median=median,
        percentile_90=percentile_90,
        shortest=int(lengths.min()),
        longest=int(lengths.max()),
        histogram=tuple(
            {"shortest": 2**power, "longest": 2 ** (power + 1) - 1, "documents": count}
            for power, count in enumerate(np.bincount(powers).tolist())
            if power >= powers.min()
        ),
    )


def _problems(
    manifest: Manifest, splits: Sequence[SplitCount], duplicates: Duplicates, *, is_whole: bool
) -> Iterator[str]:
    """Problems to solve before training, the most serious first."""
    validation = splits[1]
    if duplicates.first_in_both is not None:
        share = duplicates.validation_in_train / validation.documents
        yield (
            f"{duplicates.validation_in_train:,} of {validation.documents:,} validation documents "
            f"({share:.2%}) are also in training, the first of them number {duplicates.first_in_both + 1:,}: "
            "a validation loss on them measures memorisation"
        )
    for split, repeated in zip(splits, (duplicates.train, duplicates.validation), strict=True):
        name = split.split
        if repeated:
            share = repeated / split.documents
            yield f"{repeated:,} of {split.documents:,} {name} documents ({share:.2%}) repeat an earlier one"
        if split.empty_documents:
            yield f"{split.empty_documents:,} documents of {name} are empty"
        if is_whole and manifest.text_bytes(name) != split.text_bytes:
            yield (
                f"{name} has {manifest.text_bytes(name):,} bytes of text in its manifest, but its ids decode "
                f"to {split.text_bytes:,}"
            )
        expected = sum(shard.documents for shard in manifest.shards(name))
        if is_whole and expected not in {split.documents, split.documents - 1}:
            yield f"{name} has {expected:,} documents in its manifest, but {split.documents:,} in its ids"


# Duplicates


def count_duplicates(train: bytes | bytearray, validation: bytes | bytearray) -> Duplicates:
    """Count equal digests; each split is its documents' 16-byte digests, end to end.

    Digests are compared in ranges that hold about DIGESTS_AT_ONCE of them, which bounds the memory.
    """
    # Sixteen bytes as a numpy byte string, since numpy has no integers of that size.
    splits = [np.frombuffer(digests, dtype=f"S{DOCUMENT_HASH_BYTES}") for digests in (train, validation)]
    ranges = -(-max(1, sum(map(len, splits))) // DIGESTS_AT_ONCE)
    repeated = np.zeros(2, dtype=np.int64)
    in_both: list[NDArray[np.int64]] = []
    for number in range(ranges):
        indices = [np.flatnonzero(split.view("<u8")[::2] % ranges == number) for split in splits]
        trained, validated = (split[chosen] for split, chosen in zip(splits, indices, strict=True))
        repeated += [each.size - np.unique(each).size for each in (trained, validated)]
        in_both.append(indices[1][np.isin(validated, trained)])
    shared = np.concatenate(in_both)
    return Duplicates(
        train=int(repeated[0]),
        validation=int(repeated[1]),
        validation_in_train=shared.size,
        first_in_both=int(shared.min()) if shared.size else None,
    )
