"""Tokenized units to shards: the status of every document, the layout of the shards, and the manifest.

First everything is decided, from a few bytes per document; then any worker can write any shard.
Nothing here depends on the number of workers.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from overnight import __version__
from overnight.data.shards import SPLITS, Manifest, Shard, TokenFile, Tokens, token_format
from overnight.preparation.decontaminate import benchmark_names
from overnight.preparation.dedup import find_near_duplicates
from overnight.preparation.documents import (
    KEPT,
    RECORD,
    STATUSES,
    DocumentStatus,
    Records,
    find_duplicates,
    is_validation,
    kept_mask,
)
from overnight.preparation.prepare_config import MOST_SHARDS, PrepareConfig
from overnight.preparation.prepare_state import PrepareState, open_tokenizer, read_state, target_units
from overnight.preparation.tokenize import count_documents, read_unit
from overnight.run_directory import write_atomically

NOT_WANTED = len(STATUSES)  # status of a document behind the last one that `tokens` asks for


@dataclass(frozen=True)
class ShardLayout:
    """Where the tokens of each unit lie in the two splits."""

    shard_tokens: int
    starts: dict[str, list[int]]
    """By split: the position of each unit's first token; last, the number of tokens."""
    first_documents: list[int]
    """The number of each unit's first document among all; last, the number of documents."""
    documents: dict[DocumentStatus, int]
    """How many documents have each status; those that are not wanted are not counted."""
    damaged_files: int
    contaminated: dict[str, int]
    """By benchmark: how many of these documents, no duplicate among them, share a passage with it."""

    @property
    def kept_documents(self) -> int:
        """How many documents are in the shards."""
        return sum(self.documents.get(status, 0) for status in KEPT)

    @property
    def tokens(self) -> int:
        """How many tokens both splits have together."""
        return sum(self.starts[split][-1] for split in SPLITS)

    def shards(self, split: str, *, only_full: bool = False) -> range:
        """The indices of the shards of a split; further documents do not change those that are full."""
        full, rest = divmod(self.starts[split][-1], self.shard_tokens)
        return range(full + (rest > 0 and not only_full))


def decide_layout(staging: Path, state: PrepareState, units: int) -> ShardLayout:
    """Decide the status of every document of the first `units` units, and where its tokens lie.

    Writes both into the staging folder. Raises ValueError if there are too many shards.
    """
    sizes = [count_documents(staging, number) for number in range(units)]
    first_documents = [0, *itertools.accumulate(sizes)]
    records = np.empty(first_documents[-1], dtype=RECORD)
    shared = np.zeros(first_documents[-1], dtype=np.uint64)
    damaged_files = {*state.damaged_files}
    for number, (begin, end) in enumerate(itertools.pairwise(first_documents)):
        unit = read_unit(staging, number)
        records[begin:end], shared[begin:end] = unit.records, unit.shared
        damaged_files |= {*unit.damaged_files}
    status = _decide_status(staging, state, records, shared, first_documents)
    np.save(staging / "status.npy", status)
    counts = np.bincount(status, minlength=NOT_WANTED + 1).tolist()
    layout = ShardLayout(
        shard_tokens=state.config.shard_tokens,
        starts={split: _starts(split, status, records, state)[first_documents].tolist() for split in SPLITS},
        first_documents=first_documents,
        documents={name: count for name, count in zip(STATUSES, counts, strict=False) if count},
        damaged_files=len(damaged_files),
        contaminated=_count_contaminated(status, shared, state.config),
    )
    for split in SPLITS:
        if (shards := len(layout.shards(split))) > MOST_SHARDS:
            tokens = layout.starts[split][-1]
            raise ValueError(
                f"{tokens:,} tokens make {shards:,} shards, more than {MOST_SHARDS:,}: "
                f"give --shard-tokens {-(-tokens // MOST_SHARDS)} or more"
            )
    write_atomically(staging / "layout.json", json.dumps(asdict(layout)) + "\n")
    return layout


def require_documents(state: PrepareState, layout: ShardLayout) -> None:
    """Raise ValueError if a split has no document."""
    if layout.kept_documents == 0 and layout.documents.get("contaminated"):
        raise ValueError(f"every document of {state.source} shares a passage with a benchmark")
    if layout.kept_documents == 0:
        raise ValueError(f"{state.source} holds no text")
    for split in SPLITS:
        if layout.starts[split][-1] == 0:
            direction = "raise" if split == "validation" else "lower"
            raise ValueError(
                f"none of the {layout.kept_documents:,} documents of {state.source} is in the {split} split, "
                f"which is chosen by their hash: {direction} --validation-fraction, or give more text"
            )


def decide_shards(staging: Path, _rank: int = 0, _ranks: int = 1) -> None:
    """As a step of Slurm's: decide the layout. Raises ValueError if a split has no document."""
    state = read_state(staging)
    require_documents(state, decide_layout(staging, state, target_units(staging)))


def write_shards(staging: Path, rank: int = 0, ranks: int = 1, *, only_full: bool = False) -> None:
    """Write every `ranks`-th shard of both splits."""
    assembler = open_assembler(staging)
    layout = assembler.layout
    shards = [(split, index) for split in SPLITS for index in layout.shards(split, only_full=only_full)]
    for split, index in shards[rank::ranks]:
        assembler.write(split, index)


class Span(NamedTuple):
    """Tokens that lie together in a unit and in a shard."""

    ids: Tokens
    documents: int
    """How many documents begin here."""
    text_bytes: int
    """Of those documents, to their ends."""


class ShardAssembler:
    """Writes shards from the tokenized units of a staging folder whose layout is decided."""

    def __init__(self, staging: Path, state: PrepareState, layout: ShardLayout) -> None:
        self.staging, self.state, self.layout = staging, state, layout
        self._vocab_size = open_tokenizer(staging).vocab_size
        self._status = np.load(staging / "status.npy", mmap_mode="r")

    def write(self, split: str, index: int) -> Shard:
        """Write one shard, unless it is there already."""
        name, size = f"{split}-{index:05d}", self.layout.shard_tokens
        record = self.staging / f"{name}.json"
        if record.is_file():
            return Shard(**json.loads(record.read_text(encoding="utf-8")))
        end = min((index + 1) * size, self.layout.starts[split][-1])
        shard = self._write_tokens(f"{name}.bin", split, index * size, end)
        write_atomically(record, json.dumps(asdict(shard)) + "\n")
        return shard

    def write_unfinished(self, split: str) -> tuple[Shard, ...]:
        """Write what there is of the shard that is not complete yet: one shard, or none."""
        end = self.layout.starts[split][-1]
        index, rest = divmod(end, self.layout.shard_tokens)
        return (
            (self._write_tokens(f"{split}-{index:05d}-{rest}.bin", split, end - rest, end),) if rest else ()
        )

    def manifest(self, shards: dict[str, tuple[Shard, ...]]) -> Manifest:
        """The manifest of a prepared folder that holds these shards."""
        state, layout, tokenizer = self.state, self.layout, open_tokenizer(self.staging)
        return Manifest(
            overnight_version=__version__,
            source=state.source,
            licence=state.licence,
            request=state.request,
            split_rule="validation if the first 8 bytes of the text's blake2b-128 are below "
            f"{state.validation_fraction} of 2^64",
            tokenizer=tokenizer.name,
            tokenizer_fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            end_of_text=tokenizer.end_of_text,
            documents=layout.kept_documents,
            duplicate_documents=layout.documents.get("duplicate", 0),
            empty_documents=layout.documents.get("empty", 0),
            skipped_documents=layout.documents.get("skipped", 0),
            repaired_documents=layout.documents.get("repaired", 0),
            damaged_files=layout.damaged_files,
            near_duplicate_documents=layout.documents.get("near-duplicate", 0),
            contaminated_documents=layout.contaminated,
            train=shards["train"],
            validation=shards["validation"],
        )

    def _write_tokens(self, name: str, split: str, begin: int, end: int) -> Shard:
        """A shard of the tokens of a split from `begin` to before `end`."""
        file = TokenFile(self.staging / name, self._vocab_size)
        documents = text_bytes = 0
        try:
            for span in self._spans(split, begin, end):
                file.append(span.ids)
                documents += span.documents
                text_bytes += span.text_bytes
            return Shard(
                name=name, tokens=file.tokens, documents=documents, text_bytes=text_bytes, sha256=file.close()
            )
        finally:
            file.abandon()

    def _spans(self, split: str, begin: int, end: int) -> Iterator[Span]:
        """The tokens of a split from `begin` to before `end`, unit by unit."""
        starts, first_documents = self.layout.starts[split], self.layout.first_documents
        dtype = token_format(self._vocab_size).dtype
        first = int(np.searchsorted(starts, begin, side="right")) - 1
        for number in range(first, len(starts) - 1):
            if starts[number] >= end:
                return
            if starts[number] == starts[number + 1]:
                continue
            unit = read_unit(self.staging, number)
            status = self._status[first_documents[number] : first_documents[number + 1]]
            chosen = _in_split(split, status, unit.records, self.state)
            ids = np.asarray(np.memmap(unit.ids, dtype=dtype, mode="r"))
            yield from _cut(ids, unit.records, chosen, (begin - starts[number], end - starts[number]))


def open_assembler(staging: Path) -> ShardAssembler:
    """Of a staging folder, with the state and the layout that are written there."""
    layout = ShardLayout(**json.loads((staging / "layout.json").read_text(encoding="utf-8")))
    return ShardAssembler(staging, read_state(staging), layout)


def _decide_status(
    staging: Path,
    state: PrepareState,
    records: Records,
    shared: NDArray[np.uint64],
    first_documents: list[int],
) -> NDArray[np.uint8]:
    """(documents,): the status codes of all documents."""
    status: NDArray[np.uint8] = records["status"].copy()
    status[find_duplicates(records)] = STATUSES.index("duplicate")
    if state.config.on_contaminated == "drop":
        status[(shared > 0) & kept_mask(status)] = STATUSES.index("contaminated")
    if state.config.near_duplicates == "drop":
        near_duplicates = find_near_duplicates(staging, status, first_documents)
        status[near_duplicates] = STATUSES.index("near-duplicate")
    if state.config.tokens is not None:
        kept_tokens = np.where(kept_mask(status), records["tokens"], 0).astype(np.int64)
        status[np.cumsum(kept_tokens) - kept_tokens >= state.config.tokens] = NOT_WANTED
    return status


def _count_contaminated(
    status: NDArray[np.uint8], shared: NDArray[np.uint64], config: PrepareConfig
) -> dict[str, int]:
    """By benchmark, how many documents share a passage with it: those kept, or left out for it."""
    found = shared[kept_mask(status) | (status == STATUSES.index("contaminated"))]
    names = benchmark_names(config.benchmark_paths)
    return {name: int(np.count_nonzero(found & np.uint64(1 << bit))) for bit, name in enumerate(names)}


def _starts(
    split: str, status: NDArray[np.uint8], records: Records, state: PrepareState
) -> NDArray[np.int64]:
    """(documents + 1,): where each document begins among the tokens of a split, or would begin."""
    tokens = np.where(_in_split(split, status, records, state), records["tokens"], 0)
    return np.concatenate([[0], np.cumsum(tokens, dtype=np.int64)])


def _in_split(
    split: str, status: NDArray[np.uint8], records: Records, state: PrepareState
) -> NDArray[np.bool_]:
    """Which documents of a unit are in the shards of a split."""
    validation = is_validation(records, state.validation_fraction)
    return kept_mask(status) & (validation if split == "validation" else ~validation)


def _cut(ids: Tokens, records: Records, chosen: NDArray[np.bool_], wanted: tuple[int, int]) -> Iterator[Span]:
    """The chosen documents of a unit as spans; only the tokens `wanted`, counted among these documents."""
    lengths = records["tokens"].astype(np.int64)
    positions = np.cumsum(lengths) - lengths  # of each document in the unit
    own = np.flatnonzero(chosen)
    own_ends = np.cumsum(lengths[own])  # of each chosen document among the chosen
    own_starts = own_ends - lengths[own]
    begin, end = max(0, wanted[0]), wanted[1]
    inside = np.flatnonzero((own_ends > begin) & (own_starts < end))
    breaks = np.flatnonzero(np.diff(own[inside]) > 1) + 1
    for run in np.split(inside, breaks):
        if not run.size:
            continue
        shift = int(positions[own[run[0]]] - own_starts[run[0]])  # from among the chosen to in the unit
        first, last = max(begin, int(own_starts[run[0]])), min(end, int(own_ends[run[-1]]))
        begun = own[run[(own_starts[run] >= begin) & (own_starts[run] < end)]]
        yield Span(ids[first + shift : last + shift], len(begun), int(records["bytes"][begun].sum()))
