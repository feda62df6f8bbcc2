"""Encoded units to shards: what becomes of each document among all, and where its tokens stand.

First everything is decided, from a few bytes a document; then every shard can be written by itself,
by anyone, in any order. Nothing here depends on how many did the work.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from overnight.data.shards import SPLITS, Shard, TokenFile, Tokens, token_format
from overnight.preparation.dedup import find_near_duplicates
from overnight.preparation.documents import FATES, Fate, Records, find_duplicates, is_validation, kept_mask
from overnight.preparation.prepare_state import PrepareState, open_tokenizer, read_state, target_units
from overnight.preparation.tokenize import TokenizedUnit, count_documents, read_unit
from overnight.run_directory import write_atomically


@dataclass(frozen=True)
class ShardLayout:
    """Where the tokens of each unit stand in the two splits."""

    starts: dict[str, list[int]]
    """By split: the place of each unit's first token; last, how many tokens there are."""
    fates: dict[Fate, int]
    """How many documents met which; those behind the last that was wanted are not counted."""
    damaged_files: int
    contaminated: dict[str, int]
    """By benchmark: how many of the documents counted above, none of them a duplicate, share a passage."""

    def shards(self, split: str, shard_tokens: int) -> int:
        """How many shards a split becomes."""
        return -(-self.starts[split][-1] // shard_tokens)


def decide_layout(place: Path) -> ShardLayout:
    """Write what becomes of every document, and where everything stands, into the folder."""
    work = read_state(place)
    units = [read_unit(place, number) for number in range(target_units(place))]
    groups = [unit.records for unit in units]
    fates = [records["fate"].copy() for records in groups]
    _mark(fates, find_duplicates(groups), "duplicate")
    if work.on_contaminated == "drop":
        shared = [(unit.shared > 0) & kept_mask(group) for unit, group in zip(units, fates, strict=True)]
        _mark(fates, shared, "contaminated")
    if work.near_duplicates == "drop":
        _mark(fates, find_near_duplicates(place, fates), "near-duplicate")
    _stop_after(fates, groups, work.tokens)
    np.save(place / "fates.npy", np.concatenate(fates) if fates else np.zeros(0, np.uint8))
    layout = ShardLayout(
        starts={split: _starts(split, fates, groups, work) for split in SPLITS},
        fates=dict(Counter(FATES[code] for group in fates for code in group if code < len(FATES))),
        damaged_files=len(work.damaged_files) + len({n for unit in units for n in unit.damaged_files}),
        contaminated=_count_contaminated(fates, units, work.benchmarks),
    )
    write_atomically(place / "layout.json", json.dumps(asdict(layout)) + "\n")
    return layout


def read_layout(place: Path) -> ShardLayout:
    """What `decide_layout` wrote."""
    return ShardLayout(**json.loads((place / "layout.json").read_text(encoding="utf-8")))


def write_shard(place: Path, split: str, index: int) -> Shard:
    """Write one shard of a split from the encoded units; nothing if it is there already."""
    tokens, last = read_state(place).shard_tokens, read_layout(place).starts[split][-1]
    name = f"{split}-{index:05d}"
    about = place / f"{name}.json"
    if about.is_file():
        return Shard(**json.loads(about.read_text(encoding="utf-8")))
    shard = _write(place, f"{name}.bin", split, (index * tokens, min((index + 1) * tokens, last)))
    write_atomically(about, json.dumps(asdict(shard)) + "\n")
    return shard


def write_first_shards(place: Path, split: str) -> list[Shard]:
    """Write the beginning of the first shard that is not complete yet: what there is of it, if anything."""
    tokens, end = read_state(place).shard_tokens, read_layout(place).starts[split][-1]
    index, rest = divmod(end, tokens)
    return [_write(place, f"{split}-{index:05d}-{rest}.bin", split, (end - rest, end))] if rest else []


def _write(place: Path, name: str, split: str, wanted: tuple[int, int]) -> Shard:
    """A file of the tokens of a split from the first to before the second of these places."""
    file = TokenFile(place / name, open_tokenizer(place).vocab_size)
    documents = text_bytes = 0
    try:
        for stretch in _stretches(place, split, *wanted):
            file.append(stretch.ids)
            documents += stretch.documents
            text_bytes += stretch.text_bytes
        return Shard(
            name=name, tokens=file.tokens, documents=documents, text_bytes=text_bytes, sha256=file.close()
        )
    finally:
        file.abandon()


@dataclass(frozen=True)
class Span:
    """Tokens that stand together in a unit and in a shard."""

    ids: Tokens
    documents: int
    """How many begin here."""
    text_bytes: int
    """Of those that begin here, to their ends."""


def _stretches(place: Path, split: str, begin: int, end: int) -> Iterator[Span]:
    """What stands in a split from token `begin` to `end`."""
    work, starts = read_state(place), read_layout(place).starts[split]
    first = int(np.searchsorted(starts, begin, side="right")) - 1
    documents_before = _documents_before(place, first)
    fates = np.load(place / "fates.npy", mmap_mode="r")
    dtype = token_format(open_tokenizer(place).vocab_size).dtype
    for number in range(first, len(starts) - 1):
        if starts[number] >= end:
            return
        unit = read_unit(place, number)
        records = unit.records
        mine = _of_split(split, fates[documents_before : documents_before + len(records)], records, work)
        documents_before += len(records)
        if mine.any():
            ids = np.memmap(unit.ids, dtype=dtype, mode="r")
            yield from _cut(np.asarray(ids), records, mine, (begin - starts[number], end - starts[number]))


def _cut(ids: Tokens, records: Records, mine: NDArray[np.bool_], wanted: tuple[int, int]) -> Iterator[Span]:
    """A unit's documents of one split as stretches; only the tokens `wanted`, counted among these alone."""
    lengths = records["tokens"].astype(np.int64)
    places = np.cumsum(lengths) - lengths  # in the unit
    own = np.flatnonzero(mine)
    own_ends = np.cumsum(lengths[own])  # among the documents of this split
    own_starts = own_ends - lengths[own]
    begin, end = max(0, wanted[0]), wanted[1]
    inside = np.flatnonzero((own_ends > begin) & (own_starts < end))
    breaks = np.flatnonzero(np.diff(own[inside]) > 1) + 1
    for run in np.split(inside, breaks):
        if not run.size:
            continue
        shift = int(places[own[run[0]]] - own_starts[run[0]])  # from places in the split to the unit's
        first, last = max(begin, int(own_starts[run[0]])), min(end, int(own_ends[run[-1]]))
        begun = own[run[(own_starts[run] >= begin) & (own_starts[run] < end)]]
        yield Span(ids[first + shift : last + shift], len(begun), int(records["bytes"][begun].sum()))


def _of_split(
    split: str, fates: NDArray[np.uint8], records: Records, work: PrepareState
) -> NDArray[np.bool_]:
    """Which documents of a unit stand in the shards of a split."""
    validation = is_validation(records, work.validation_fraction)
    return kept_mask(fates) & (validation if split == "validation" else ~validation)


def _starts(
    split: str, fates: list[NDArray[np.uint8]], groups: list[Records], work: PrepareState
) -> list[int]:
    """Where each unit begins among the tokens of a split, and last where all end."""
    sizes = [
        int(records["tokens"][_of_split(split, group, records, work)].sum())
        for group, records in zip(fates, groups, strict=True)
    ]
    return [0, *np.cumsum(sizes).tolist()] if sizes else [0]


def _mark(fates: list[NDArray[np.uint8]], chosen: list[NDArray[np.bool_]], fate: Fate) -> None:
    for group, documents in zip(fates, chosen, strict=True):
        group[documents] = FATES.index(fate)


def _count_contaminated(
    fates: list[NDArray[np.uint8]], units: list[TokenizedUnit], benchmarks: Sequence[str]
) -> dict[str, int]:
    """By benchmark, how many documents share a passage with it: those kept, or left out for that."""
    counted = [kept_mask(group) | (group == FATES.index("contaminated")) for group in fates]
    shared = [unit.shared[group] for unit, group in zip(units, counted, strict=True)]
    return {
        name: sum(int(np.count_nonzero(bits & np.uint64(1 << number))) for bits in shared)
        for number, name in enumerate(benchmarks)
    }


def _stop_after(fates: Sequence[NDArray[np.uint8]], groups: Sequence[Records], tokens: int | None) -> None:
    """Drop what stands behind the document with which both splits together have so many tokens."""
    if tokens is None:
        return
    so_far, beyond = 0, np.uint8(len(FATES))  # which is no fate, and counted nowhere
    for group, records in zip(fates, groups, strict=True):
        kept = np.where(kept_mask(group), records["tokens"], 0).astype(np.int64)
        reached = so_far + np.cumsum(kept)
        so_far = int(reached[-1]) if reached.size else so_far
        group[reached - kept >= tokens] = beyond


def _documents_before(place: Path, unit: int) -> int:
    """How many documents all units before this one have."""
    return sum(count_documents(place, number) for number in range(unit))
